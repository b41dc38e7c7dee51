"""Experts are a module like any other: others hook, adapt, parametrize, prune, offload, shard and serve them."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, parametrize, prune

from synchromesh import (
    FixedCapacity,
    GatedMLPExperts,
    Grid,
    LoadBalance,
    MLPExperts,
    ModuleExperts,
    MoE,
    Plan,
    Sharded,
    Softmax,
    TopKRouter,
    aux_loss,
    distribute,
    expert_parameters,
    parallelize,
)
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import rank_device, run_ranks

D, E, F, T = 8, 4, 16, 9


def model(experts=None, **options):
    torch.manual_seed(0)
    router = TopKRouter(D, E, k=2, scores=Softmax(dtype=torch.float64))
    own = MLPExperts(E, D, hidden=F) if experts is None else experts()
    return nn.Sequential(nn.Linear(D, D), MoE(router, own, **options)).double()


def here(what):
    """A model or tensor where this rank computes."""
    return what.to(rank_device())


def tokens(number=T):
    return torch.randn(number, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def with_weights(changed):
    """A plain model with some of its experts' weights replaced."""
    plain = model()
    with torch.no_grad():
        for name, weight in changed.items():
            getattr(plain[1].experts, name).copy_(weight)
    return plain


EXPERTS = {
    "plain": lambda: MLPExperts(E, D, hidden=F),
    "gated": lambda: GatedMLPExperts(E, D, hidden=F),
    "modules": lambda: ModuleExperts([nn.Linear(D, D) for _ in range(E)]),
}


@pytest.mark.parametrize("experts", list(EXPERTS))
@pytest.mark.parametrize("learning", [True, False])
def test_hooks_of_the_experts_fire_once_a_call(experts, learning):
    net, seen = model(EXPERTS[experts]), []
    own = net[1].experts
    own.register_forward_pre_hook(lambda module, inputs: seen.append(("before", inputs[0].shape)))
    own.register_forward_hook(lambda module, inputs, output: seen.append(("after", output.shape)))
    own.register_full_backward_hook(lambda module, before, after: seen.append(("backward", after[0].shape)))
    with torch.set_grad_enabled(learning):
        y = net(tokens())
    if learning:
        y.sum().backward()
    assert seen == [(when, (T, D)) for when in ("before", "after", "backward")[: 3 if learning else 2]]


def test_a_hook_can_change_what_experts_return():
    net = model()
    wanted = 2 * net(tokens())
    net[1].experts.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_close("y", net(tokens()), wanted)


@pytest.mark.parametrize("targets", [["up"], ["up", "down"], ["down"]])
def test_lora_of_peft_adds_a_low_rank_product_to_every_expert(targets):
    names = [f"1.experts.{name}" for name in targets]
    net = get_peft_model(model(), LoraConfig(r=2, target_modules=[], target_parameters=names)).double()
    assert_close("at first", net(tokens()), model()(tokens()))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    x = tokens()
    y = net(x)
    y.square().sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    merged = net.merge_and_unload()
    assert_close("merged", merged(x), y)
    changed = {name: getattr(merged[1].experts, name).detach() for name in targets}
    assert all((changed[name] - getattr(model()[1].experts, name)).abs().max() > 1e-3 for name in targets)
    assert_close("the definition", y, with_weights(changed)(x))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("name", ["up", "up_bias", "down", "down_bias"])
def test_a_parametrized_weight_is_what_is_computed_with_and_its_origin_learns(name):
    net = model()
    plain = with_weights({name: getattr(net[1].experts, name).detach() / 2})
    parametrize.register_parametrization(net[1].experts, name, Half())
    x = tokens()
    y, wanted = net(x), plain(x)
    assert_close("y", y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    origin = getattr(net[1].experts.parametrizations, name).original
    assert_close("gradient", origin.grad, getattr(plain[1].experts, name).grad / 2)


def test_weight_norm_and_pruning():
    x = tokens()
    net = model()
    parametrizations.weight_norm(net[1].experts, "up")
    assert_close("weight norm", net(x), model()(x))
    net(x).sum().backward()
    assert net[1].experts.parametrizations.up.original0.grad is not None
    net = model()
    prune.l1_unstructured(net[1].experts, "up", amount=0.5)
    pruned = net[1].experts.up_orig.detach() * net[1].experts.up_mask
    assert (pruned == 0).sum() == pruned.numel() // 2
    assert_close("pruned", net(x), with_weights({"up": pruned})(x))
    net(x).sum().backward()
    assert (net[1].experts.up_orig.grad[pruned == 0] == 0).all()


@pytest.mark.parametrize("experts", list(EXPERTS))
def test_offloaded_models_fetch_their_weights_for_the_call(experts, tmp_path):
    x, wanted = tokens(), model(EXPERTS[experts])(tokens())
    cpu = torch.device("cpu")
    with torch.no_grad():
        assert_close("from memory", cpu_offload(model(EXPERTS[experts]), execution_device=cpu)(x), wanted)
        kept = disk_offload(model(EXPERTS[experts]), str(tmp_path), execution_device=cpu)
        assert_close("from disk", kept(x), wanted)


class Residual(nn.Module):
    """Adds in place to what a layer returns."""

    def __init__(self, net):
        super().__init__()
        self.first, self.moe = net

    def forward(self, x):
        h = self.first(x)
        y = self.moe(h)
        y += h
        return y


def fully_sharded(what):
    net, x = here(Residual(model())), here(tokens() * (1 + dist.get_rank()))
    plain = copy.deepcopy(net)
    fully_shard(net.moe.experts if what == "experts" else net.moe)
    fully_shard(net)
    for one in (net, plain):
        one(x).square().sum().backward()
    for (name, got), wanted in zip(net.named_parameters(), plain.parameters(), strict=True):
        dist.all_reduce(wanted.grad, dist.ReduceOp.SUM)
        grad = got.grad
        assert isinstance(grad, DTensor)
        assert_close(name, grad.full_tensor(), wanted.grad / dist.get_world_size())
    return True


@pytest.mark.parametrize("what", ["experts", "layer"])
def test_fsdp2_shards_experts_of_their_own_and_layers(what, device):
    assert run_ranks(fully_sharded, 2, what, device=device) == [True, True]


def adapters_on_ranks(ranks_first):
    """LoRA of each rank's experts equals LoRA of the whole, whose numbers it is given."""
    grid = Grid.from_group(dist.group.WORLD)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["1.experts.up"])
    whole = here(get_peft_model(model(), config).double())
    torch.manual_seed(5)
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    if not ranks_first:
        with pytest.raises(ValueError, match="distribute the layer first"):
            distribute(whole, grid, strategy=lambda: Sharded(grid))
        return True
    part = here(model())
    distribute(part, grid, strategy=lambda: Sharded(grid))
    part = here(get_peft_model(part, config).double())
    each, own = E // grid.size, slice(grid.rank * (E // grid.size), (grid.rank + 1) * (E // grid.size))
    named = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if "lora_A" in name:  # [E * r, D]
                parameter.copy_(named[name].view(E, -1, named[name].shape[1])[own].flatten(0, 1))
            if "lora_B" in name:  # [F, r * E]
                parameter.copy_(named[name].view(len(parameter), -1, E)[..., own].flatten(1))
    assert each * grid.size == E
    assert all(name in expert_parameters(part) for name, _ in part.named_parameters() if "lora_" in name)
    run = parallelize(part, grid)
    for plan in (Plan(), Plan(gather=2), Plan(chunks=2)):
        part.zero_grad()
        whole.zero_grad()
        part.base_model.model[1].options = part.base_model.model[1].options.__class__(plan=plan)
        (run(here(tokens()) * (1 + grid.rank)).square().sum()).backward()
        sum(whole(here(tokens()) * (1 + rank)).square().sum() for rank in range(grid.size)).div(grid.size).backward()
        for name, parameter in part.named_parameters():
            if "lora_A" in name:
                assert_close(name, parameter.grad, named[name].grad.view(E, -1, D)[own].flatten(0, 1))
            if "lora_B" in name:
                assert_close(name, parameter.grad, named[name].grad.view(len(parameter), -1, E)[..., own].flatten(1))
    return True


@pytest.mark.parametrize("ranks_first", [True, False])
def test_each_rank_adapts_its_own_experts(ranks_first, device):
    assert run_ranks(adapters_on_ranks, 2, ranks_first, device=device) == [True, True]


def adapted_under_fsdp2():
    """LoRA of experts that FSDP2 shards learns what it learns in one process."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["1.experts.up", "1.experts.down"])
    net, x = here(get_peft_model(model(), config).double()), here(tokens() * (1 + dist.get_rank()))
    torch.manual_seed(5)
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    plain = copy.deepcopy(net)
    fully_shard(net.base_model.model[1])
    fully_shard(net)
    sharded, alone = (torch.optim.SGD((p for p in m.parameters() if p.requires_grad), lr=0.1) for m in (net, plain))
    for _ in range(2):
        for one, optimizer in ((net, sharded), (plain, alone)):
            optimizer.zero_grad()
            one(x).square().mean().backward()
        for parameter in plain.parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
                parameter.grad /= dist.get_world_size()
        sharded.step()
        alone.step()
    for (name, got), wanted in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert got.requires_grad == ("lora_" in name)
        assert_close(name, got.full_tensor(), wanted)
    return True


def test_fsdp2_shards_the_adapters_of_experts_with_them(device):
    assert run_ranks(adapted_under_fsdp2, 2, device=device) == [True, True]


def serve(answer, requests, threads):
    """Ask from several threads at once, 2,000 times in all; return the requests whose answer was not their own."""
    with torch.no_grad():
        wanted = [answer(number, x) for number, x in enumerate(requests)]
    wrong, done = [], []

    def ask(thread):
        with torch.no_grad():
            for number in range(2000 // threads):
                at = (number * 7 + thread) % len(requests)
                got = answer(at, requests[at])
                if got.shape != wanted[at].shape or not torch.equal(got, wanted[at]):
                    wrong.append(at)
        done.append(thread)

    workers = [threading.Thread(target=ask, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == list(range(threads))
    return wrong


def test_one_model_serves_several_threads():
    """Requests of other lengths, with masks and other k."""
    net = model(capacity=FixedCapacity(2.0), losses=(LoadBalance(0.1),)).eval()
    requests = [tokens(1 + number % 13) * (1 + number % 7) for number in range(50)]

    def answer(number, x):
        mask = torch.arange(len(x)) % 3 != 0 if number % 4 == 0 else None
        return net[1](net[0](x), k=1 + number % 3, mask=mask)

    assert serve(answer, requests, threads=8) == []
    assert aux_loss(net) == 0


FEWER = [pytest.param(one, marks=pytest.mark.exhaustive) for one in ("alone", "on a grid of one rank")]


@pytest.mark.parametrize("spread", [*FEWER, "adaptive on a grid of one rank"])
def test_one_transformers_model_serves_several_threads(spread):
    from transformers import MixtralConfig, MixtralForCausalLM

    from synchromesh.compat.huggingface import parallelize_experts, register

    register()
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=31, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, experts_implementation="synchromesh",
    )  # fmt: skip
    net = MixtralForCausalLM(config).eval()
    if spread != "alone":
        adaptive = spread.startswith("adaptive")
        parallelize_experts(net, Grid(None), strategy=None if adaptive else lambda: Sharded(Grid(None)))
    requests = [torch.arange(1 + number % 11)[None] * (number + 1) % 31 for number in range(20)]
    assert serve(lambda _, ids: net(input_ids=ids, use_cache=False).logits, requests, threads=8) == []


class Doubled(nn.Module):
    """Experts of the user's own, who look at the dims that a call reserves."""

    def __init__(self, model_dim, **_):
        super().__init__()

    def forward(self, rows, _layer):
        return rows * (1 + torch.arange(rows.shape[2]).view(-1, *[1] * (rows.dim() - 3)))


def test_tutels_layer_serves_several_threads():
    from synchromesh.compat.tutel import moe

    torch.manual_seed(0)
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": 2},
        model_dim=D,
        experts={"type": "custom", "module": Doubled, "num_experts_per_device": E},
    ).eval()
    shapes = [(D,), (2, D // 2), (4, D // 4), (2, 2, D // 4)]
    requests = [torch.randn(2 + number % 5, *shapes[number % 4]) for number in range(24)]
    assert serve(lambda _, x: layer(x, reserve_dims=x.dim() - 1), requests, threads=8) == []
