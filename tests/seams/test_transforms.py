"""torch.func and forward mode give the values of the dense definition: on the layer, SwinV2-MoE, and transformers."""

import dataclasses

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from synchromesh import (
    BiasBalance,
    CosineRouter,
    ExpertChoiceRouter,
    FixedCapacity,
    GatedMLPExperts,
    Grid,
    LoadBalance,
    MLPExperts,
    ModuleExperts,
    MoE,
    NeededCapacity,
    NodeLimit,
    Sharded,
    Softmax,
    TopKRouter,
    aux_loss,
    batch_prioritized,
    load_stats,
)
from synchromesh.compat.huggingface import register
from synchromesh.kernels import Float8Products
from synchromesh.models.swin_v2_moe import swin_v2_moe_demo
from synchromesh.moe.experts import set_products
from synchromesh.testing.distributed import run_ranks

T, D, E, F = 5, 6, 4, 7
WIDE = Softmax(dtype=torch.float64)
EPSILON = 1e-6


def modules():
    return ModuleExperts([nn.Sequential(nn.Linear(D, F), nn.Tanh(), nn.Linear(F, D)) for _ in range(E)])


ROUTERS = {
    "top": lambda: TopKRouter(D, E, k=2, scores=WIDE),
    "normalized": lambda: TopKRouter(D, E, k=2, scores=Softmax(normalize=True, dtype=torch.float64)),
    "biased": lambda: TopKRouter(D, E, k=2, scores=WIDE, balance=BiasBalance(E)),
    "limited": lambda: TopKRouter(D, E, k=2, scores=WIDE, limit=NodeLimit(2, 1)),
    "cosine": lambda: CosineRouter(D, E, k=2, scores=WIDE),
    "expert choice": lambda: ExpertChoiceRouter(D, E, k=2, dtype=torch.float64),
}
EXPERTS = {
    "plain": lambda: MLPExperts(E, D, hidden=F),
    "gated": lambda: GatedMLPExperts(E, D, hidden=F),
    "unknown activation": lambda: MLPExperts(E, D, hidden=F, activation=torch.tanh),
    "modules": modules,
}
CAPACITIES = {
    "fixed": FixedCapacity(0.5),
    "prioritized": FixedCapacity(0.5, priority=batch_prioritized),
    "needed": NeededCapacity(),
    "needed at most": NeededCapacity(0.5),
}


def layer_of(router="top", experts="plain", **options):
    torch.manual_seed(0)
    return MoE(ROUTERS[router](), EXPERTS[experts](), **options).double()


LAYERS = {
    **{router: lambda router=router: layer_of(router) for router in ROUTERS},
    **{experts: lambda experts=experts: layer_of(experts=experts) for experts in EXPERTS},
    **{name: lambda capacity=capacity: layer_of(capacity=capacity) for name, capacity in CAPACITIES.items()},
}
every_layer = pytest.mark.parametrize("layer", [make() for make in LAYERS.values()], ids=list(LAYERS))


def tokens(*batch):
    torch.manual_seed(1)
    return torch.randn(*batch, T, D, dtype=torch.float64)


def difference(function, x, tangent):
    with torch.no_grad():
        return (function(x + EPSILON * tangent) - function(x - EPSILON * tangent)) / (2 * EPSILON)


def close(got, wanted, bound=1e-12):
    assert (got - wanted).norm() <= bound * wanted.norm().clamp(min=1e-6)


@every_layer
def test_forward_mode_is_the_derivative(layer):
    x, tangent = tokens(), torch.randn(T, D, dtype=torch.float64)
    wanted = difference(layer, x, tangent)
    close(jvp(layer, (x,), (tangent,))[1], wanted, 1e-7)
    with fw.dual_level():
        close(fw.unpack_dual(layer(fw.make_dual(x, tangent))).tangent, wanted, 1e-7)


@every_layer
def test_gradients_by_transforms_are_those_of_backward(layer):
    x = tokens()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    got = grad(lambda p: functional_call(layer, p, (x,)).square().sum())(parameters)
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        close(got[name], torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    cotangent = torch.randn(T, D, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(layer(leaf), leaf, cotangent)
    close(vjp(layer, x)[1](cotangent)[0], wanted)


@every_layer
def test_a_batch_of_calls_is_the_calls_one_by_one(layer):
    xs = tokens(3)
    close(vmap(layer)(xs), torch.stack([layer(x) for x in xs]))


@every_layer
def test_gradients_of_each_sample_are_those_of_the_sample_alone(layer):
    xs = tokens(3)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p, x):
        return functional_call(layer, p, (x,)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, xs)
    for number, x in enumerate(xs):
        for name, wanted in grad(loss)(parameters, x).items():
            close(got[name][number], wanted)


@pytest.mark.parametrize("experts", list(EXPERTS))
def test_jacobians_and_second_derivatives(experts):
    layer, x = layer_of(experts=experts), tokens()
    wanted = torch.autograd.functional.jacobian(layer, x)
    close(jacrev(layer)(x), wanted)
    close(jacfwd(layer)(x), wanted)
    leaf = x.requires_grad_()
    (slope,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad(slope.sin().sum(), leaf)
    second = hessian(lambda x: layer(x).square().sum())(x.detach())
    close(torch.einsum("abcd,ab->cd", second, slope.detach().cos()), wanted)


@pytest.mark.parametrize("experts", list(EXPERTS))
@pytest.mark.parametrize("k", [1, 2])
def test_a_backward_can_be_differentiated(experts, k):
    layer = layer_of(experts=experts)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"k": k})

    assert torch.autograd.gradgradcheck(run, (tokens()[:3].requires_grad_(), *parameters), fast_mode=True)


def test_several_models_run_as_one():
    layers = [layer_of(), layer_of()]
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.mul_(1.5)
    x, (parameters, buffers) = tokens(), stack_module_state(layers)
    got = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    close(got, torch.stack([layer(x) for layer in layers]))


def test_the_balance_loss_of_a_transform_is_read_inside_it_and_nowhere_else():
    layer, x = layer_of(losses=(LoadBalance(0.5),)), tokens()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p):
        return functional_call(layer, p, (x,)).square().sum() + aux_loss(layer)

    got = grad(loss)(parameters)
    (layer(x).square().sum() + aux_loss(layer)).backward()
    load_stats(layer)
    for name, parameter in layer.named_parameters():
        close(got[name], parameter.grad)
    grad(lambda p: functional_call(layer, p, (x,)).sum())(parameters)  # nobody reads this one
    vmap(layer)(tokens(2))
    assert aux_loss(layer) == 0
    assert load_stats(layer) == {}
    close(torch.stack(list(grad(loss)(parameters).values())[:1]), torch.stack(list(got.values())[:1]))


@pytest.mark.parametrize("train", [False, True])
def test_swin_v2_moe(train):
    torch.manual_seed(0)
    model = swin_v2_moe_demo().double().train(train)
    for module in model.modules():
        if isinstance(module, TopKRouter | CosineRouter):
            module.scores, module.noise = dataclasses.replace(module.scores, dtype=torch.float64), 0.0
    x, tangent = torch.randn(2, 1, 32, 32, dtype=torch.float64), torch.randn(2, 1, 32, 32, dtype=torch.float64)
    close(jvp(model, (x,), (tangent,))[1], difference(model, x, tangent), 1e-6)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    close(grad(lambda x: model(x).square().sum())(x), wanted)
    if not train:
        each = vmap(grad(lambda x: model(x[None]).square().sum()))(x)
        alone = torch.stack([grad(lambda x: model(x[None]).square().sum())(one) for one in x])
        close(each, alone)


def test_experts_of_transformers():
    register()
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    experts = MixtralExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    weights, x = torch.rand(T, 2, dtype=torch.float64), tokens()
    tangent = torch.randn(T, D, dtype=torch.float64)
    found = {}
    for name in ("eager", "synchromesh"):
        experts.config._experts_implementation = name

        def run(x):
            return experts(x, ids, weights)

        found[name] = [
            difference(run, x, tangent) if name == "eager" else jvp(run, (x,), (tangent,))[1],
            torch.autograd.functional.jacobian(run, x) if name == "eager" else jacrev(run)(x),
        ]
    for got, wanted, bound in zip(found["synchromesh"], found["eager"], (1e-7, 1e-12), strict=True):
        close(got, wanted, bound)


def test_products_of_8_bit_numbers_say_that_they_have_no_such_derivative():
    layer = layer_of()
    set_products(layer, Float8Products())
    with pytest.raises(ValueError, match=r"set_products\(model, None\)"):
        jvp(layer, (tokens(),), (tokens(),))


def on_ranks():
    layer = layer_of(strategy=Sharded(Grid.from_group(dist.group.WORLD)))
    with pytest.raises(ValueError, match="on one rank"):
        jvp(layer, (tokens(),), (tokens(),))
    return True


def test_a_layer_on_several_ranks_says_that_it_cannot_be_transformed():
    assert run_ranks(on_ranks, 2) == [True, True]
