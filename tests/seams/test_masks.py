"""What a mask leaves out changes no result, loss, load or capacity, under any router and plan."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from synchromesh import (
    BiasBalance,
    CosineRouter,
    Dropless,
    ExpertChoiceRouter,
    FixedCapacity,
    Grid,
    ImportanceLoad,
    LoadBalance,
    MLPExperts,
    MoE,
    NeededCapacity,
    OverRanks,
    Plan,
    Sharded,
    TokenRounding,
    TopKRouter,
    ZLoss,
    aux_loss,
    batch_prioritized,
    load_stats,
    routing_options,
)
from synchromesh.models.swin_v2_moe import swin_v2_moe_demo
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, E, REAL, PADDED = 8, 4, 11, 30
ROUTERS = {
    "top": lambda: TopKRouter(D, E, k=2),
    "biased": lambda: TopKRouter(D, E, k=2, balance=BiasBalance(E)),
    "cosine": lambda: CosineRouter(D, E, k=1),
    "expert choice": lambda: ExpertChoiceRouter(D, E, k=2),
    "rounded": lambda: TokenRounding(TopKRouter(D, E, k=2), tile=4),
}
CAPACITIES = {
    "dropless": Dropless(),
    "fixed": FixedCapacity(1.0),
    "prioritized": FixedCapacity(0.5, priority=batch_prioritized),
    "needed": NeededCapacity(),
}


def layer_of(router="top", capacity="dropless", **options):
    torch.manual_seed(0)
    losses = (LoadBalance(0.5), ZLoss(0.1))
    experts = MLPExperts(E, D, hidden=16)
    return MoE(ROUTERS[router](), experts, capacity=CAPACITIES[capacity], losses=losses, **options).double()


def padded(where, filling):
    """Real tokens among others; and the mask."""
    torch.manual_seed(1)
    real = torch.randn(REAL, D, dtype=torch.float64)
    mask = torch.zeros(PADDED, dtype=torch.bool)
    mask[{"right": slice(0, REAL), "left": slice(-REAL, None), "among": slice(0, 2 * REAL, 2)}[where]] = True
    x = torch.full((PADDED, D), filling, dtype=torch.float64)
    x[mask] = real
    return real, x, mask


def run(layer, x, **call):
    x = x.clone().requires_grad_()
    y = layer(x, **call)
    (y.square().sum() + aux_loss(layer)).backward()
    (load,) = load_stats(layer).values()
    return y.detach(), x.grad, load, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("router", list(ROUTERS))
@pytest.mark.parametrize("capacity", list(CAPACITIES))
@pytest.mark.parametrize(("where", "filling"), [("right", 0.3), ("left", 1e6), ("among", float("nan"))])
def test_padding_changes_nothing(router, capacity, where, filling):
    real, x, mask = padded(where, filling)
    layer = layer_of(router, capacity)
    y, dx, load, grads = run(copy.deepcopy(layer), real)
    got_y, got_dx, got_load, got_grads = run(layer, x.view(5, 6, D), mask=mask.view(5, 6))
    got_y, got_dx = got_y.view(PADDED, D), got_dx.view(PADDED, D)
    assert torch.equal(got_y[mask], y)
    assert torch.equal(got_dx[mask], dx)
    assert (got_y[~mask] == 0).all()
    assert (got_dx[~mask] == 0).all()
    assert torch.equal(got_load.tokens_per_expert, load.tokens_per_expert)
    assert torch.equal(got_load.dropped, load.dropped)
    for got, wanted in zip(got_grads, grads, strict=True):
        assert torch.equal(got, wanted)


def test_importance_and_noise_are_of_real_tokens():
    real, x, mask = padded("among", 0.3)
    torch.manual_seed(0)
    layer = MoE(TopKRouter(D, E, k=2, noise=1.0), MLPExperts(E, D, hidden=16), losses=(ImportanceLoad(0.5),)).double()
    found = []
    for given, call in ((real, {}), (x, {"mask": mask})):
        torch.manual_seed(9)
        layer(given, **call)
        found.append(aux_loss(layer))
    assert torch.equal(*found)


def test_a_shared_expert_sees_no_padding():
    real, x, mask = padded("left", float("nan"))
    layer = layer_of(shared=torch.nn.Linear(D, D))
    wanted = layer(real)
    got = layer(x, mask=mask)
    assert torch.equal(got[mask], wanted)
    assert (got[~mask] == 0).all()


@pytest.mark.parametrize("masked", [True, False])
def test_the_result_is_no_view_that_a_residual_would_write_through(masked):
    _, x, mask = padded("among", 0.3)
    y = layer_of()(x.view(5, 6, D), mask=mask.view(5, 6) if masked else None)
    assert not y._is_view()
    y += x.view(5, 6, D)
    y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_no_token_and_all_tokens(training):
    _, x, _ = padded("right", 0.3)
    layer = layer_of().train(training)
    with torch.set_grad_enabled(training):
        assert (layer(x, mask=torch.zeros(PADDED, dtype=torch.bool)) == 0).all()
        assert aux_loss(layer) == 0
        assert torch.equal(layer(x, mask=torch.ones(PADDED, dtype=torch.bool)), layer(x))


def test_every_layer_of_a_model_is_given_the_mask():
    real, x, mask = padded("among", 0.3)
    model = torch.nn.Sequential(layer_of(), layer_of("cosine"))
    wanted = model(real)
    with routing_options(model, mask=mask):
        got = model(x)
    assert torch.equal(got[mask], wanted)
    assert model[0].options.mask is None


@pytest.mark.parametrize("when", ["inside", "after", "under another"])
def test_a_recomputation_keeps_the_mask_of_its_forward(when):
    _, x, mask = padded("among", 0.3)
    layer = layer_of()
    (layer(x, mask=mask).square().sum() + aux_loss(layer)).backward()
    wanted = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with routing_options(layer, mask=mask):
        loss = checkpoint(layer, x.requires_grad_(), use_reentrant=False).square().sum() + aux_loss(layer)
        if when == "inside":
            loss.backward()
    if when == "after":
        loss.backward()
    if when == "under another":
        with routing_options(layer, mask=mask.roll(1)):
            loss.backward()
    for got, one in zip(layer.parameters(), wanted, strict=True):
        assert torch.equal(got.grad, one)


@pytest.mark.parametrize("mask", [torch.ones(PADDED - 1, dtype=torch.bool), torch.ones(PADDED)])
def test_a_mask_of_another_shape_or_kind_is_refused(mask):
    _, x, _ = padded("right", 0.3)
    with pytest.raises(ValueError, match="True for tokens"):
        layer_of()(x, mask=mask)


def on_ranks(plan):
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    torch.manual_seed(0)
    capacity = FixedCapacity(1.0, tokens=16)
    layers = [
        MoE(
            TopKRouter(D, E, k=2),
            MLPExperts(E, D, hidden=16),
            capacity=capacity,
            losses=(OverRanks(LoadBalance(0.5)),),
            strategy=Sharded(grid),
        ).double()
        for _ in range(2)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    torch.manual_seed(grid.rank)
    x = torch.randn(PADDED, D, dtype=torch.float64)
    mask = torch.rand(PADDED) < (0.0 if grid.rank == 1 else 0.5)  # on one rank all is padding
    wanted = run(layers[0], x[mask], plan=plan)
    got = run(layers[1], x, mask=mask, plan=plan)
    assert_close("y", got[0][mask], wanted[0])
    assert_close("dx", got[1][mask], wanted[1])
    assert torch.equal(got[2].tokens_per_expert, wanted[2].tokens_per_expert)
    for one, other in zip(got[3], wanted[3], strict=True):
        assert_close("gradient", one, other)
    return True


@pytest.mark.parametrize(
    "plan",
    [Plan(), Plan(gather=2), Plan(gather=4), Plan(chunks=2), Plan(two_level=True), Plan(ragged=False)],
    ids=str,
)
def test_ranks_pad_as_they_like(plan):
    assert run_ranks(on_ranks, 4, plan) == [True] * 4


def test_swin_v2_moe_counts_the_pictures_of_a_padded_batch_alone():
    torch.manual_seed(0)
    backbone = swin_v2_moe_demo().backbone.double()
    images = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, :24, :20] = True
    mask[1] = True
    found = []
    for filling in (0.0, 5.0):
        torch.manual_seed(3)
        given = images.where(mask[:, None], filling)
        features = backbone(given, mask=mask)
        found.append([*features.maps, features.pooled, aux_loss(backbone)])
        counts = [int(load.tokens_per_expert.sum()) for load in load_stats(backbone).values()]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    for x, stride in zip(found[0], backbone.strides, strict=False):
        height, width = -(-24 // stride), -(-20 // stride)
        x[0, :, :height, :width] = 0
        assert (x[0] == 0).all(), "a position without a picture"
        assert x[1].abs().min() > 0
    whole, part = (32 // backbone.strides[-1]) ** 2, -(-24 // backbone.strides[-1]) * -(-20 // backbone.strides[-1])
    assert counts == [whole + part] * 2


def test_windows_that_are_padded_reach_no_expert():
    torch.manual_seed(0)
    backbone = swin_v2_moe_demo().backbone
    backbone(torch.randn(1, 1, 28, 20))
    tokens = {int(load.tokens_per_expert.sum()) for load in load_stats(backbone).values()}
    assert tokens <= {-(-28 // stride) * -(-20 // stride) for stride in backbone.strides}


def test_swin_v2_moe_refuses_a_mask_that_is_none():
    backbone = swin_v2_moe_demo().backbone
    with pytest.raises(ValueError, match="True for pixels"):
        backbone(torch.randn(1, 1, 32, 32), mask=torch.ones(1, 32, 31, dtype=torch.bool))
    with pytest.raises(ValueError, match="without a pixel"):
        backbone(torch.randn(1, 1, 32, 32), mask=torch.zeros(1, 32, 32, dtype=torch.bool))


def test_a_mask_that_vmap_runs_over_is_refused_in_a_sentence_and_one_mask_for_all_is_not():
    layer = MoE(TopKRouter(8, 4, k=2), MLPExperts(4, 8, hidden=16)).double()
    x, masks = torch.randn(3, 6, 8).double(), torch.rand(3, 6) > 0.4
    with pytest.raises(ValueError, match=r"a mask that torch\.vmap runs over"):
        torch.vmap(lambda x, mask: layer(x, mask=mask))(x, masks)
    got = torch.vmap(lambda x: layer(x, mask=masks[0]))(x)
    assert_close("y", got, torch.stack([layer(one, mask=masks[0]) for one in x]))
