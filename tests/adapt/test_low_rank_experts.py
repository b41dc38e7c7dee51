import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh import GatedMLPExperts, Grid, MLPExperts, ModuleExperts, MoE, Sharded, TopKRouter, distribute
from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.low_rank import LowRank
from synchromesh.adapt.low_rank_experts import SHARED, LowRankExperts, LowRankMoE, Update
from synchromesh.adapt.sparse import StaticSparsity
from synchromesh.moe.cut import Cut
from synchromesh.moe.places import PlacedRouter
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan
from tests.adapt.conftest import moved

UPDATES = {SHARED: Update(3, 2.0), "a": Update(2, 0.5), "b": Update(1, 1.5)}


def layer(*, gated: bool = False) -> MoE:
    torch.manual_seed(0)
    made = GatedMLPExperts(4, 6, hidden=5, bias=True) if gated else MLPExperts(4, 6, hidden=5)
    return MoE(TopKRouter(6, 4, k=2), made).double()


def made(*, gated: bool, per_expert: bool, with_shared: bool = False) -> tuple[MoE, LowRankMoE]:
    plain = layer(gated=gated)
    adapted = LowRankMoE(
        plain, UPDATES, per_expert=per_expert, with_shared=with_shared, generator=torch.Generator().manual_seed(2)
    )
    return plain, adapted


def definition(plain: MoE, adapted: LowRankMoE, x: torch.Tensor, *, with_shared: bool) -> torch.Tensor:
    """Every token, choice and stream by itself."""
    experts = adapted.moe.experts
    weights, frozen = experts.weights(), plain.experts.weights()
    out = torch.zeros_like(x)
    routing = plain.router(x[:, :6])
    act = plain.experts.activation

    def product(name: str, expert: int, streams: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        matrix = frozen[name][expert] if name != "down" else frozen[name][expert].T
        base = matrix @ streams[SHARED] + frozen[f"{name}_bias"][expert]
        found = {}
        for stream, own in streams.items():
            prefix = f"{stream}_" if stream else ""
            down, up = (weights[f"{prefix}{name}_{factor}"][expert] for factor in ("down", "up"))
            found[stream] = base + UPDATES[stream].scale * up @ (down @ own)
            base = found[SHARED] if with_shared else base
        return found

    for token in range(len(x)):
        streams = dict(zip(UPDATES, x[token].split(6), strict=True))
        for choice, expert in enumerate(routing.expert_ids[token].tolist()):
            hidden = product("up", expert, streams)
            if "gate" in frozen:
                gate = product("gate", expert, streams)
                hidden = {stream: act(gate[stream]) * own for stream, own in hidden.items()}
            else:
                hidden = {stream: act(own) for stream, own in hidden.items()}
            y = torch.cat(list(product("down", expert, hidden).values()))
            out[token] += routing.weights[token, choice] * y
    return out


@pytest.mark.parametrize(("gated", "per_expert", "with_shared"), [(False, False, False), (True, True, True)])
def test_every_stream_is_the_definition_by_loops_with_every_gradient(gated: bool, per_expert: bool, with_shared: bool):
    plain, adapted = made(gated=gated, per_expert=per_expert, with_shared=with_shared)
    learned = [p for p in adapted.parameters() if p.requires_grad]
    moved(learned)
    x = torch.randn(9, 18).double()
    got, wanted = adapted(x), definition(plain, adapted, x, with_shared=with_shared)
    torch.testing.assert_close(got, wanted)
    weight = torch.randn(9, 18).double()
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), learned), torch.autograd.grad((wanted * weight).sum(), learned),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("per_expert", [False, True])
def test_zero_factors_are_the_frozen_layer_and_streams_follow_the_shared_routing(per_expert: bool):
    plain, adapted = made(gated=False, per_expert=per_expert)
    x = torch.randn(9, 6).double()
    y = adapted(torch.cat((x, torch.randn(9, 12).double()), 1))  # what tasks see changes neither routing nor W x
    for stream in y.split(6, dim=1):
        assert torch.equal(stream, plain(x))
    numbers = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert numbers == (4 if per_expert else 1) * 2 * (3 + 2 + 1) * (6 + 5)


def test_a_router_that_sees_places_sees_those_of_its_streams():
    plain, x = layer(), torch.randn(2, 3, 4, 6).double()
    plain.router = PlacedRouter(plain.router)
    nn.init.normal_(plain.router.code)
    adapted = LowRankMoE(plain, UPDATES, per_expert=False, generator=torch.Generator().manual_seed(2))
    for stream in adapted(torch.cat((x, torch.randn(2, 3, 4, 12).double()), -1)).split(6, dim=-1):
        assert torch.equal(stream, plain(x))


@pytest.mark.parametrize("per_expert", [False, True])
def test_merge_keeps_the_output_of_a_layer_without_tasks(per_expert: bool):
    model, x = nn.Sequential(nn.Linear(6, 6), layer(gated=True)).double(), torch.randn(9, 6).double()
    adaptation = adapt(model, MoE, LowRank(rank=2, scale=2.0, per_expert=per_expert))
    moved(adaptation.trained().values())
    after, copied = model(x), copy.deepcopy(model)
    torch.testing.assert_close(copied(x), after)
    adaptation.merge()
    assert type(model[1].experts) is GatedMLPExperts
    torch.testing.assert_close(model(x), after)


def ranks_do_as_one(gather: int) -> None:
    rank, grid = dist.get_rank(), Grid.from_group(dist.group.WORLD)
    whole, x = made(gated=False, per_expert=True)[1], torch.randn(8, 18, generator=torch.Generator().manual_seed(3))
    shared = made(gated=False, per_expert=False)[1]
    for alone in (whole, shared):
        moved([p for p in alone.parameters() if p.requires_grad])
        spread, x = copy.deepcopy(alone), x.double()
        distribute(spread, grid, strategy=lambda: Sharded(grid, plan=Plan(gather)))
        own = slice(4 * rank, 4 * rank + 4)
        torch.testing.assert_close(spread(x[own]), alone(x)[own])
        spread(x[own]).square().sum().backward()
        alone(x).square().sum().backward()
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                held = spread.get_parameter(name).grad
                assert held is not None
                if alone is shared:
                    dist.all_reduce(held)
                    torch.testing.assert_close(held / 2, parameter.grad / 2)
                else:
                    torch.testing.assert_close(held, parameter.grad.chunk(2)[rank] / 2)  # means over ranks
        experts = spread.merged().experts
        torch.testing.assert_close(experts.up, alone.merged().experts.up.chunk(2)[rank])


@pytest.mark.parametrize("gather", [1, 2])
def test_ranks_compute_and_learn_what_one_process_does(gather: int):
    run_ranks(ranks_do_as_one, 2, gather)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="wanted whole experts"):
        LowRankExperts(
            MLPExperts(2, 4, hidden=4), updates=UPDATES, shared=False, with_shared=False, generator=None
        ).hold(Cut(0, 4))
    with pytest.raises(ValueError, match="ModuleExperts"):
        LowRank()("moe", MoE(TopKRouter(4, 2), ModuleExperts([nn.Linear(4, 4), nn.Linear(4, 4)])))
    masked = MoE(TopKRouter(4, 2), MLPExperts(2, 4, hidden=4))
    adapt(masked, "experts", StaticSparsity(0.5))
    with pytest.raises(ValueError, match="masked or adapted already"):
        LowRank()("moe", masked)
    with pytest.raises(ValueError, match="a shared expert"):
        LowRankMoE(MoE(TopKRouter(4, 2), MLPExperts(2, 4, hidden=4), shared=nn.Linear(4, 4)), UPDATES, per_expert=True)
