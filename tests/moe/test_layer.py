import copy
import io
import math
import pickle
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh import (
    CosineRouter,
    Dropless,
    ExpertChoiceRouter,
    FixedCapacity,
    GatedMLPExperts,
    LoadBalance,
    Local,
    MLPExperts,
    ModuleExperts,
    MoE,
    NeededCapacity,
    Plan,
    Sigmoid,
    Softmax,
    TopKRouter,
    aux_loss,
    batch_prioritized,
    load_stats,
    quantize_experts,
    record_load,
    routing_options,
)
from synchromesh.testing.compare import assert_close
from synchromesh.types import Routing

D, F_, E = 8, 16, 4


class Fixed(nn.Module):
    """A router that returns one routing, so that a test says where tokens go."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing

    def forward(self, x: torch.Tensor, k: int | None = None) -> Routing:
        return self.routing


def one_expert(experts: nn.Module, e: int, x: torch.Tensor) -> torch.Tensor:
    """The network of one expert, by its definition."""
    if isinstance(experts, ModuleExperts):
        return experts.experts[str(e)](x)

    def bias(name: str) -> torch.Tensor | float:
        value = getattr(experts, name)
        return 0.0 if value is None else value[e]

    hidden = x @ experts.up[e].T + bias("up_bias")
    if isinstance(experts, GatedMLPExperts):
        hidden = experts.activation(x @ experts.gate[e].T + bias("gate_bias")) * hidden
    else:
        hidden = experts.activation(hidden)
    return hidden @ experts.down[e] + bias("down_bias")


def defined(moe: MoE, x: torch.Tensor, capacity=None, k=None) -> torch.Tensor:
    """y[t] = sum_k weights[t, k] expert[ids[t, k]](x[t]), pair by pair."""
    routing = moe.router(x, k)
    rowmap = (capacity or moe.capacity)(routing, lambda value: value)
    y = []
    for t in range(len(x)):
        terms = [
            routing.weights[t, c] * one_expert(moe.experts, int(routing.expert_ids[t, c]), x[t : t + 1])[0]
            for c in range(routing.expert_ids.shape[1])
            if rowmap.rows[t, c] >= 0
        ]
        y.append(torch.stack([*terms, 0 * x[t]]).sum(0))
    return torch.stack(y) if y else x * 1


def assert_equal_to_definition(moe: MoE, x: torch.Tensor, **options) -> None:
    dy = torch.randn_like(x)
    results = []
    for run in (moe, lambda x, **o: defined(moe, x, **o)):
        own = x.clone().requires_grad_()
        moe.zero_grad()
        y = run(own, **options)
        (y * dy).sum().backward()
        grads = {name: None if p.grad is None else p.grad.clone() for name, p in moe.named_parameters()}
        results.append((y, own.grad, grads))
    (y, dx, grads), (wanted_y, wanted_dx, wanted_grads) = results
    assert_close("output", y, wanted_y)
    assert_close("gradient of x", dx, wanted_dx)
    for name, wanted in wanted_grads.items():
        nothing = torch.zeros_like(moe.get_parameter(name))  # the definition never touches an expert without tokens
        assert_close(
            f"gradient of {name}",
            nothing if grads[name] is None else grads[name],
            nothing if wanted is None else wanted,
        )


ROUTERS = {
    "top1": lambda: TopKRouter(D, E),
    "top3": lambda: TopKRouter(D, E, k=3, scores=Softmax(normalize=True)),
    "all": lambda: TopKRouter(D, E, k=E, scores=Sigmoid()),
    "cosine": lambda: CosineRouter(D, E, k=2),
    "expert choice": lambda: ExpertChoiceRouter(D, E, k=2),
}
EXPERTS = {
    "mlp": lambda: MLPExperts(E, D, hidden=F_),
    "relu, no bias": lambda: MLPExperts(E, D, hidden=F_, activation=F.relu, up_bias=False, down_bias=False),
    "any activation": lambda: MLPExperts(E, D, hidden=F_, activation=torch.tanh, up_bias=False),
    "swiglu": lambda: GatedMLPExperts(E, D, hidden=F_),
    "geglu, bias": lambda: GatedMLPExperts(E, D, hidden=F_, activation=F.gelu, bias=True),
    "modules": lambda: ModuleExperts(
        [nn.Sequential(nn.Linear(D, 5 + e), nn.Tanh(), nn.Linear(5 + e, D)) for e in range(E)]
    ),
}
CAPACITIES = {
    "dropless": Dropless(),
    "fixed": FixedCapacity(0.6),
    "prioritized": FixedCapacity(0.6, priority=batch_prioritized),
    "needed": NeededCapacity(max_factor=0.7),
    "nothing": FixedCapacity(0.0),
}


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_output_and_every_gradient_equal_the_definition(router, experts, capacity):
    moe = MoE(ROUTERS[router](), EXPERTS[experts](), capacity=CAPACITIES[capacity]).double()
    for tokens in (0, 1, 13):
        assert_equal_to_definition(moe, torch.randn(tokens, D, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", EXPERTS)
def test_lower_precisions_agree_with_double(experts, dtype):
    lower = MoE(TopKRouter(D, E, k=2), EXPERTS[experts]()).to(dtype)
    exact = copy.deepcopy(lower).double()
    x = torch.randn(50, D, dtype=dtype)
    got, wanted = lower(x), exact(x.double())
    got.sum().backward()
    wanted.sum().backward()
    assert_close("output", got, wanted.to(dtype))
    for (name, p), q in zip(lower.experts.named_parameters(), exact.experts.parameters(), strict=True):
        assert_close(f"gradient of {name}", p.grad, q.grad.to(dtype))


@pytest.mark.parametrize("ids", [[[0]] * 9, [[1], [3]] * 4, [[0, -1], [-1, -1], [2, 0]]])
def test_experts_without_tokens_get_zero_gradients_and_the_others_right_ones(ids):
    ids = torch.tensor(ids)
    weights, scores = torch.rand(ids.shape, dtype=torch.float64), torch.rand(len(ids), E, dtype=torch.float64)
    moe = MoE(Fixed(Routing(ids, weights, scores, scores)), MLPExperts(E, D, hidden=F_)).double()
    x = torch.randn(len(ids), D, dtype=torch.float64)
    assert_equal_to_definition(moe, x)
    moe.zero_grad()
    moe(x).sum().backward()
    for e in range(E):
        assert bool(moe.experts.up.grad[e].any()) == bool((ids == e).any())


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("experts", ["mlp", "any activation", "swiglu", "modules"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_broken_token_is_nan_and_alone_even_where_it_was_dropped(router, experts, capacity):
    moe = MoE(ROUTERS[router](), EXPERTS[experts](), capacity=CAPACITIES[capacity])
    x = torch.randn(12, D)
    bad = {2: math.nan, 7: math.inf, 8: -math.inf}
    for t, value in bad.items():
        x[t, 3] = value
    y = moe(x)
    good = [t for t in range(len(x)) if t not in bad]
    assert y[list(bad)].isnan().all()
    assert y[good].isfinite().all()
    if router != "expert choice" and capacity == "dropless":  # else what a token gets depends on the other tokens
        assert_close("the others", y[good], moe(x[good]))


def test_a_nan_gate_makes_nan_and_no_crash():
    moe = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=F_))
    with torch.no_grad():
        moe.router.weight[1, 0] = math.nan
    assert moe(torch.randn(5, D)).isnan().all()


@pytest.mark.parametrize("eight_bits", [False, True], ids=["as they are", "8 bits"])
@pytest.mark.parametrize("experts", [MLPExperts, GatedMLPExperts])
def test_few_tokens_in_inference_get_what_they_get_in_training(experts, eight_bits):
    """They go without a map of rows, unless somebody drops or watches."""
    moe = MoE(TopKRouter(D, E, k=2), experts(E, D, hidden=F_), shared=nn.Linear(D, D))
    if eight_bits:
        quantize_experts(moe)
    x = torch.randn(9, D)
    x[3] = math.nan
    wanted = moe(x)
    for run in (torch.no_grad(), torch.inference_mode()):
        with run, patch.object(Local, "run", side_effect=AssertionError("a map was made")):
            assert_close("y", moe(x), wanted)
            assert moe(x[:0]).shape == (0, D)
    with torch.no_grad(), patch.object(Local, "direct", side_effect=AssertionError("pairs were kept")):
        assert_close("y", moe(x, capacity=FixedCapacity(4.0)), wanted)
        with record_load(moe) as loads:
            assert_close("y", moe(x), wanted)
    assert int(loads[""].tokens_per_expert.sum()) == 18


def test_autocast_casts_weights_once_in_inference_of_many_tokens() -> None:
    moe, x = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=F_)), torch.randn(600, D)
    casts = []
    for direct in (Local.direct, lambda *_: None):
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with patch.object(Local, "direct", direct), torch.no_grad(), torch.autocast("cpu", torch.bfloat16), profile:
            moe(x)
        casts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy"))
    assert casts[0] == casts[1]


def test_any_leading_dims_are_tokens():
    moe = MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=F_))
    x = torch.randn(2, 3, 5, D)
    assert_close("y", moe(x), moe(x.reshape(-1, D)).view(x.shape))
    assert_close("transposed", moe(x.transpose(0, 2)), moe(x).transpose(0, 2))
    assert_close("one token", moe(x[0, 0, 0]), moe(x)[0, 0, 0])


def test_shared_experts_see_every_token_beside_the_routed_ones():
    shared = nn.Linear(D, D)
    moe = MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=F_), shared=shared)
    routed = MoE(moe.router, moe.experts)
    x = torch.randn(6, D)
    assert_close("y", moe(x), routed(x) + shared(x))


@pytest.mark.parametrize("kind", [MLPExperts, GatedMLPExperts])
def test_dropout_acts_in_training_only(kind):
    moe = MoE(TopKRouter(D, E), kind(E, D, hidden=F_, dropout=0.5))
    x = torch.randn(20, D)
    assert not torch.equal(moe(x), moe(x))
    assert_equal_to_definition(moe.eval(), x)


def test_k_and_capacity_of_the_call_hold_for_this_call_only():
    moe = MoE(TopKRouter(D, E, k=1), MLPExperts(E, D, hidden=F_)).double()
    x = torch.randn(9, D, dtype=torch.float64)
    before = moe(x)
    assert_equal_to_definition(moe, x, k=3, capacity=FixedCapacity(0.5))
    assert_close("y", moe(x), before)


def test_routing_options_reach_inner_layers_and_yield_to_the_call():
    model = nn.Sequential(nn.Linear(D, D), MoE(TopKRouter(D, E, k=1), MLPExperts(E, D, hidden=F_)))
    x = torch.randn(9, D)
    inner, moe = model[0](x), model[1]
    with routing_options(model, k=3):
        assert_close("k", model(x), MoE(moe.router, moe.experts)(inner, k=3))
        with routing_options(model, capacity=FixedCapacity(0.5)):
            both = MoE(moe.router, moe.experts, capacity=FixedCapacity(0.5))(inner, k=3)
            assert_close("nested", model(x), both)
        assert_close("call", moe(inner, k=2), MoE(moe.router, moe.experts)(inner, k=2))
    assert_close("after", model(x), moe(inner, k=1))
    with pytest.raises(ValueError, match="no MoE layer in Linear"), routing_options(model[0], k=1):
        pass


def test_the_trivial_plan_is_the_only_one_on_one_rank():
    moe = MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=F_))
    assert_close("y", moe(torch.ones(2, D), plan=Plan()), moe(torch.ones(2, D)))
    with pytest.raises(ValueError, match="one rank"):
        moe(torch.ones(2, D), plan=Plan(gather=2))


def test_autocast_computes_in_its_dtype_and_leaves_master_weights():
    moe = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=F_))
    x = torch.randn(30, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert moe.experts.up.grad.dtype == torch.float32
    assert_close("y", y, moe(x).to(torch.bfloat16))


def test_grad_scaler_unscales_to_the_same_gradients():
    moe = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=F_), losses=(LoadBalance(0.01),))
    x = torch.randn(30, D)
    (moe(x).square().mean() + aux_loss(moe)).backward()
    wanted = {name: p.grad.clone() for name, p in moe.named_parameters()}
    moe.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    scaler.scale(moe(x).square().mean() + aux_loss(moe)).backward()
    scaler.unscale_(optimizer)
    for name, p in moe.named_parameters():
        assert_close(f"gradient of {name}", p.grad, wanted[name])
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0


def test_grad_scaler_skips_the_step_when_an_expert_overflows():
    moe = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=F_))
    before = copy.deepcopy(moe.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    scaler.scale(moe(torch.randn(30, D)).sum() * 3e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())


def test_copies_and_pickles_after_a_forward_start_empty():
    moe = MoE(TopKRouter(D, E, noise=1.0), MLPExperts(E, D, hidden=F_), losses=(LoadBalance(0.01),))
    moe(torch.randn(30, D))
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    x = torch.ones(3, D)
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), torch.load(buffer, weights_only=False)):
        assert aux_loss(twin).item() == 0
        assert load_stats(twin) == {}
        assert_close("y", twin.eval()(x), copy.deepcopy(moe).eval()(x))
        twin.train()(x)
        assert aux_loss(twin).item() > 0
    assert aux_loss(moe).item() > 0


def test_an_averaged_model_follows_a_trained_one():
    moe = MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=F_), losses=(LoadBalance(0.01),))
    moe(torch.randn(30, D))
    averaged = torch.optim.swa_utils.AveragedModel(moe)
    averaged.update_parameters(moe)
    assert_close("y", averaged(torch.ones(3, D)), moe(torch.ones(3, D)))


class NotARouting(nn.Module):
    def forward(self, x, k=None):
        return x


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(3, D + 1), rf"\(3, {D + 1}\), wanted a last dim of {D}"),
        (torch.ones(3, D, dtype=torch.int64), "int64, wanted a floating dtype"),
        (torch.ones(3, D, dtype=torch.float64), r"float64, its experts are torch\.float32.*autocast"),
        (torch.ones(3, D, device="meta"), "input on meta, its router is on cpu"),
        (torch.tensor(1.0), r"shape \(\), wanted a last dim"),
    ],
)
def test_wrong_input_says_what_got_and_wanted(x, says):
    with pytest.raises(ValueError, match=says):
        MoE(TopKRouter(D, E), MLPExperts(E, D, hidden=F_))(x)


def test_parts_that_do_not_fit_are_refused():
    experts = MLPExperts(E, D, hidden=F_)
    with pytest.raises(ValueError, match="tokens of width 9, got experts of width 8"):
        MoE(TopKRouter(9, E), experts)
    with pytest.raises(ValueError, match="its router is on meta"):
        MoE(TopKRouter(D, E).to("meta"), experts)(torch.ones(3, D))
    with pytest.raises(ValueError, match=r"shared expert returned shape \(3, 1\), wanted \(3, 8\)"):
        MoE(TopKRouter(D, E), experts, shared=nn.Linear(D, 1))(torch.ones(3, D))
    with pytest.raises(ValueError, match=r"expert 0 returned rows of shape \(3, 5\), wanted \(3, 8\)"):
        MoE(TopKRouter(D, 1), ModuleExperts([nn.Linear(D, 5)]))(torch.ones(3, D))
    with pytest.raises(ValueError, match="chooses among 5 experts, got 4"):
        MoE(TopKRouter(D, 5), experts)
    with pytest.raises(ValueError, match=r"returned Tensor, wanted synchromesh\.Routing"):
        MoE(NotARouting(), experts)(torch.ones(3, D))
    scores = torch.rand(2, E)
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), scores[:, :1], scores, scores)
    with pytest.raises(ValueError, match=r"2 tokens to 4 experts, wanted \(3, 4\)"):
        MoE(Fixed(routing), experts)(torch.ones(3, D))
