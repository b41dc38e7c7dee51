import dataclasses
import math

import pytest
import torch
from torch import nn

from synchromesh import (
    BiasBalance,
    CosineRouter,
    ExpertChoiceRouter,
    FixedCapacity,
    LoadBalance,
    MLPExperts,
    MoE,
    NodeLimit,
    Ones,
    Sigmoid,
    Softmax,
    TokenRounding,
    TopKRouter,
    update_balance,
)
from synchromesh.testing.compare import assert_close

T, D, E = 13, 8, 6


@pytest.mark.parametrize("k", range(1, E + 1))
def test_top_k_takes_the_largest_scores_for_every_k(k):
    router = TopKRouter(D, E, k=k)
    x = torch.randn(T, D)
    routing = router(x)
    scores = (x @ router.weight.T).softmax(1)
    assert_close("scores", routing.scores, scores)
    assert torch.equal(routing.expert_ids, scores.argsort(dim=1, descending=True)[:, :k])
    assert_close("weights", routing.weights, scores.sort(dim=1, descending=True).values[:, :k])


def test_k_of_the_call_comes_before_the_routers_own():
    router = TopKRouter(D, E, k=1)
    assert router(torch.randn(T, D), 3).expert_ids.shape == (T, 3)
    assert router(torch.randn(T, D)).expert_ids.shape == (T, 1)


def test_normalized_weights_sum_to_one_and_equal_softmax_after_selection():
    x, before, after = (
        torch.randn(T, D),
        TopKRouter(D, E, k=3, scores=Softmax(normalize=True)),
        TopKRouter(D, E, k=3, scores=Softmax(after_selection=True)),
    )
    after.load_state_dict(before.state_dict())
    assert_close("sum", before(x).weights.sum(1), torch.ones(T))
    assert_close("weights", before(x).weights, after(x).weights)


def test_one_choice_is_never_normalized_away():
    weights = TopKRouter(D, E, k=1, scores=Softmax(normalize=True))(torch.randn(T, D)).weights
    assert (weights < 1).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid_scores_are_independent_of_the_other_experts(normalize):
    router = TopKRouter(D, E, k=2, scores=Sigmoid(normalize=normalize))
    x = torch.randn(T, D)
    best = (x @ router.weight.T).sigmoid().topk(2, dim=1).values
    assert_close("weights", router(x).weights, best / best.sum(1, keepdim=True) if normalize else best)


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gate_computes_in_its_own_dtype_whatever_the_models(model_dtype, gate_dtype):
    router = TopKRouter(D, E, k=2, scores=Softmax(dtype=gate_dtype)).to(model_dtype)
    x = torch.randn(T, D, dtype=model_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert routing.weights.dtype == routing.logits.dtype == gate_dtype
    assert_close("logits", routing.logits, x.to(gate_dtype) @ router.weight.to(gate_dtype).T)


def test_noise_comes_while_training_only_and_leaves_the_clean_logits():
    router = TopKRouter(D, E, k=2, noise=1.0)
    x = torch.randn(4096, D)
    routing = router(x)
    assert routing.noisy_logits is not None
    assert routing.noise_std == 1 / E
    assert (routing.noisy_logits - routing.logits).std().item() == pytest.approx(1 / E, rel=0.05)
    assert_close("scores", routing.scores, routing.noisy_logits.softmax(1))
    assert_close("clean logits", routing.logits, x @ router.weight.T)
    assert router.eval()(x).noisy_logits is None


def test_cosine_router_is_equation_2_of_the_paper():
    router = CosineRouter(D, E, k=2, dim=5, temperature=0.3)
    x = torch.randn(T, D)
    projected = router.projector(x)
    norms = projected.norm(dim=1)[:, None] * router.directions.norm(dim=1)[None]
    assert_close("logits", router(x).logits, projected @ router.directions.T / norms / 0.3)


def test_cosine_temperature_never_falls_below_its_floor():
    router = CosineRouter(D, E)
    with torch.no_grad():
        router.log_scale.fill_(50.0)
    assert router(torch.randn(T, D)).logits.abs().max() <= 100.001
    with pytest.raises(ValueError, match=r"0\.001.*0\.01"):
        CosineRouter(D, E, temperature=0.001)


def test_expert_choice_gives_every_expert_the_same_load_and_its_best_tokens():
    router = ExpertChoiceRouter(D, E, k=2)
    routing = router(torch.randn(T, D))
    share = math.ceil(2 * T / E)
    assert routing.tokens_per_expert().tolist() == [share] * E
    for e in range(E):
        chosen = (routing.expert_ids == e).any(1)
        assert routing.scores[chosen, e].min() >= routing.scores[~chosen, e].max()


def test_capacity_and_balance_loss_know_that_columns_of_expert_choice_are_no_choices():
    routing = ExpertChoiceRouter(D, 4, k=1)(torch.randn(8, D))
    assert FixedCapacity(1.0)(routing, lambda value: value).capacity == 2
    even = LoadBalance(1.0)(routing, lambda value: value)
    assert_close("load balance", even, torch.ones(()))


def test_bias_balance_moves_selection_but_not_weights_and_evens_the_load():
    router = TopKRouter(D, 4, k=1, balance=BiasBalance(4, rate=0.02))
    x = torch.randn(256, D) + 1
    moe = MoE(router, MLPExperts(4, D, hidden=4))
    before = router(x).tokens_per_expert()
    for _ in range(60):
        moe(x)
        update_balance(moe)
    routing = router(x)
    assert routing.tokens_per_expert().max() < before.max()
    assert routing.tokens_per_expert().max() <= 1.3 * 256 / 4
    assert_close("weights", routing.weights, routing.scores.gather(1, routing.expert_ids))


def test_bias_balance_is_exact_in_a_half_precision_model():
    router = TopKRouter(D, 4, balance=BiasBalance(4, rate=1e-3)).to(torch.bfloat16)
    for _ in range(1000):
        router.balance.observe(torch.tensor([4, 0, 2, 2]))
        update_balance(router)
    assert router.balance.bias.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])


def test_node_limit_keeps_each_tokens_experts_on_its_best_groups():
    router = TopKRouter(D, 8, k=3, scores=Sigmoid(), limit=NodeLimit(groups=4, selected=2))
    routing = router(torch.randn(50, D))
    group_scores = routing.scores.unflatten(1, (4, 2)).sum(2)
    for ids, groups in zip(routing.expert_ids // 2, group_scores.topk(2, dim=1).indices, strict=True):
        assert set(ids.tolist()) <= set(groups.tolist())


def test_a_broken_token_gets_nan_weights_and_moves_nobody_else():
    for router in (
        TopKRouter(D, E, k=2),
        TopKRouter(D, E, k=2, scores=Sigmoid()),
        CosineRouter(D, E, k=2),
    ):
        x = torch.randn(T, D)
        clean = router(x)
        x[3], x[5, 0] = math.nan, math.inf
        broken = router(x)
        assert broken.weights[[3, 5]].isnan().all()
        rest = [t for t in range(T) if t not in (3, 5)]
        assert torch.equal(broken.expert_ids[rest], clean.expert_ids[rest])
        assert_close("weights of the others", broken.weights[rest], clean.weights[rest])
        assert broken.expert_ids.min() >= 0
        assert broken.expert_ids.max() < E


@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_a_k_that_no_token_can_have_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}, wanted an integer 1 <= k <= {E}"):
        TopKRouter(D, E, k=k)
    with pytest.raises(ValueError, match=f"k is {k}"):
        TopKRouter(D, E)(torch.randn(T, D), k)
    with pytest.raises(ValueError, match="1 <= k <= 4"):
        TopKRouter(D, 8, k=5, limit=NodeLimit(groups=4, selected=2))


@pytest.mark.parametrize(
    "build",
    [
        lambda: TopKRouter(D, E, noise=-1.0),
        lambda: TopKRouter(D, E, noise=float("nan")),
        lambda: TopKRouter(0, E),
        lambda: ExpertChoiceRouter(D, 0),
        lambda: CosineRouter(D, E, dim=0),
        lambda: CosineRouter(D, E, temperature=float("nan")),
        lambda: TopKRouter(D, E, balance=BiasBalance(E + 1)),
        lambda: BiasBalance(E, rate=0.0),
        lambda: NodeLimit(groups=2, selected=3),
        lambda: TopKRouter(D, 6, limit=NodeLimit(groups=4, selected=2)),
    ],
)
def test_settings_without_meaning_are_refused(build):
    with pytest.raises(ValueError, match="wanted"):
        build()


def test_no_tokens_route_nowhere():
    for router in (TopKRouter(D, E, k=2), CosineRouter(D, E), ExpertChoiceRouter(D, E, k=2)):
        routing = router(torch.randn(0, D))
        assert routing.expert_ids.shape[0] == 0
        assert isinstance(router, nn.Module)
        assert routing.tokens_per_expert().tolist() == [0] * E


@pytest.mark.parametrize("tile", [1, 4, 8, 16])
@pytest.mark.parametrize("k", [1, 2, E])
def test_rounding_gives_experts_whole_tiles_by_adding_the_best_and_leaving_out_the_worst(tile, k):
    router, x = TopKRouter(D, E, k=k), torch.randn(50, D)
    base, routing = router(x), TokenRounding(router, tile=tile)(x)
    for e in range(E):
        before, after = ((r.expert_ids == e).any(1) for r in (base, routing))
        count, rounded, score = int(before.sum()), int(after.sum()), base.scores[:, e]
        assert rounded % tile == 0 or rounded == count < tile / 2 or rounded == count == 50
        assert abs(rounded - count) <= tile
        added, left_out = after & ~before, before & ~after
        assert not (added.any() and left_out.any())
        if added.any():
            assert score[added].min() >= score[~after].max() if (~after).any() else True
        if left_out.any():
            assert score[left_out].max() <= score[before & after].min()
    assert int((routing.expert_ids >= 0).sum()) <= routing.max_pairs


def test_rounded_weights_are_the_routers_own_and_follow_the_scores_where_tokens_are_added():
    router, x = TopKRouter(D, E, k=2, scores=Softmax(normalize=True)), torch.randn(50, D)
    base, routing = router(x), TokenRounding(router, tile=16)(x)
    chosen = base.scores.gather(1, base.expert_ids).sum(1, keepdim=True)
    assert_close("weights", routing.weights, base.scores / chosen)
    assert torch.equal(TokenRounding(router, tile=16).eval()(x).expert_ids, base.expert_ids)


def test_a_layer_learns_through_rounding_and_absent_pairs_stay_absent():
    layer = MoE(TokenRounding(TopKRouter(D, E, k=2), tile=8), MLPExperts(E, D, hidden=4), losses=(LoadBalance(0.01),))
    layer(torch.randn(50, D)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.router.parameters())

    class Holes(TopKRouter):
        def forward(self, x, k=None):
            routing = super().forward(x, k)
            return dataclasses.replace(routing, expert_ids=torch.where(routing.expert_ids == 0, -1, routing.expert_ids))

    rounded = TokenRounding(Holes(D, E, k=2), tile=1)(torch.randn(50, D))
    assert not (rounded.expert_ids == 0).any()


@pytest.mark.parametrize("broken", [False, True])
def test_no_routing_carries_sums_of_another(broken):
    """What a router says of its experts' load and scores is what a count of its pairs and scores gives."""

    class Fewer(TopKRouter):
        def forward(self, x, k=None):
            routing = super().forward(x, k)
            return dataclasses.replace(routing, expert_ids=torch.where(routing.expert_ids == 0, -1, routing.expert_ids))

    x = torch.randn(50, D)
    x[7] = torch.nan if broken else 0.0
    plain = TopKRouter(D, E, k=3, balance=BiasBalance(E))
    plain.balance.steps += torch.arange(E) * 300
    routers = [plain, Fewer(D, E, k=2), TokenRounding(plain, tile=8), TokenRounding(Fewer(D, E), tile=8).eval()]
    routers += [TopKRouter(D, E, k=2, noise=1.0, limit=NodeLimit(groups=3, selected=2)), ExpertChoiceRouter(D, E)]
    routers += [CosineRouter(D, E, k=E, noise=1.0), TopKRouter(D, E, scores=Sigmoid(dtype=torch.float64))]
    for router in routers:
        routing = router(x)
        for choices in (None, 1, 2):
            ids = routing.expert_ids[:, :choices]
            assert routing.tokens_per_expert(choices).tolist() == [int((ids == e).sum()) for e in range(E)]
        assert_close("sums", routing.scores_per_expert(), routing.scores.sum(0))
    for router in (plain, CosineRouter(D, E)):  # sums are made where somebody will ask for them
        assert router.train()(x).score_sums is not None
        assert router.eval()(x).score_sums is None


@pytest.mark.parametrize("scores", [Softmax(), Sigmoid()])
def test_a_token_whose_gate_is_broken_is_not_rounded_away(scores):
    x = torch.randn(20, D)
    x[3] = torch.nan
    routing = TokenRounding(TopKRouter(D, E, k=2, scores=scores), tile=8)(x)
    kept = routing.expert_ids >= 0
    assert (routing.weights[3].isnan() & kept[3]).any()
    assert routing.weights[[0, 1, 2, *range(4, 20)]].isfinite().all()


def test_a_tile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="tile is 0"):
        TokenRounding(TopKRouter(D, E), tile=0)


def test_weights_of_one_leave_the_choice_to_the_scores_and_the_router_without_a_gradient():
    x, router = torch.randn(7, 6), TopKRouter(6, 4, k=2, scores=Ones())
    x[3] = torch.nan
    routing, wanted = router(x), Softmax()
    router.scores = wanted
    assert torch.equal(routing.expert_ids, router(x).expert_ids)
    assert routing.weights.nan_to_num(7).tolist() == [[1, 1]] * 3 + [[7, 7]] + [[1, 1]] * 3
    assert not routing.weights.requires_grad
    assert routing.scores.requires_grad
