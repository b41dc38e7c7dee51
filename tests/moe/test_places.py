import math

import pytest
import torch

from synchromesh import CosineRouter, Dropless, MLPExperts, MoE, Softmax, TokenRounding, TopKRouter
from synchromesh.moe.places import PlacedRouter, places_of, waves
from synchromesh.moe.routing import Router
from synchromesh.testing.compare import assert_close

D, E = 6, 4
SHAPE = (2, 3, 5, D)
EXACT = Softmax(dtype=torch.float64)


def maps(seed=0):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(router=None):
    torch.manual_seed(1)
    router = PlacedRouter(router or TopKRouter(D, E, k=2, scores=EXACT), frequencies=2)
    return MoE(router, MLPExperts(E, D, hidden=8), capacity=Dropless()).double()


def learnt(made):
    """Give the code of a layer's router values, as if it had learnt."""
    with torch.no_grad():
        made.router.code.copy_(torch.randn(8, D, generator=torch.Generator().manual_seed(2)))
    return made


def code_by_loops(code, row, column):
    """The code of one cell of a map of 3 x 5."""
    turns = [math.pi * place * 2**n for place in ((row + 0.5) / 3, (column + 0.5) / 5) for n in range(2)]
    found = [math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns]
    return sum(value * own for value, own in zip(found, code, strict=True))


def test_the_router_sees_each_token_with_the_code_of_its_cell_and_the_experts_see_it_alone():
    made, x = learnt(layer()), maps()
    seen = x.clone()
    for b in range(2):
        for row in range(3):
            for column in range(5):
                seen[b, row, column] += code_by_loops(made.router.code.detach(), row, column)
    routing = made.router.router(seen.view(-1, D))
    assert_close("logits", made.router(x.view(-1, D), places=places_of(x)).logits, routing.logits)
    assert_close("y", made(x), made(x, routing=routing))
    assert not torch.equal(routing.expert_ids, made.router.router(x.view(-1, D)).expert_ids)


def test_it_begins_as_the_other_router_does():
    made, x = layer(), maps()
    plain = MoE(made.router.router, made.experts, capacity=Dropless())
    assert torch.equal(made(x), plain(x))
    made.router.initialize(0.02)
    assert not made.router.code.any()


@pytest.mark.parametrize(
    "router",
    [TopKRouter(D, E, k=2, scores=EXACT), CosineRouter(D, E, k=2, dim=5, scores=EXACT)],
    ids=["linear", "cosine"],
)
def test_the_code_learns_with_the_gradient_of_finite_differences(router):
    made, x = learnt(layer(router)), maps()

    def run(code):
        return torch.func.functional_call(made, {"router.code": code}, (x,))

    assert torch.autograd.gradcheck(run, made.router.code.detach().clone().requires_grad_(), fast_mode=True)
    made = layer(router)
    made(x).square().sum().backward()
    assert made.router.code.grad.abs().sum() > 0  # zero at first, and not for ever


def test_a_mask_leaves_the_other_tokens_their_places():
    made, x = learnt(layer()), maps()
    mask = torch.rand(SHAPE[:3], generator=torch.Generator().manual_seed(4)) < 0.5
    whole = made(x)
    assert_close("tokens", made(x, mask=mask)[mask], whole[mask])


def test_equal_maps_of_twice_the_size_have_codes_of_the_same_shares():
    small, large = (waves(places_of(torch.zeros(1, side, side, D).double()), 3).view(side, side, -1) for side in (2, 6))
    assert_close("middles of the quarters", large[1::3, 1::3], small)


def test_tiles_are_rounded_inside_and_tied_to_the_same_experts():
    made = learnt(layer(TokenRounding(TopKRouter(D, E, k=1), tile=5)))
    x = maps()
    routing = made.train().router(x.view(-1, D), places=places_of(x))
    counts = (routing.expert_ids >= 0).sum(0)
    assert all(int(count) % 5 == 0 or int(count) < 3 for count in counts)


def test_what_is_no_map_is_refused_and_a_router_that_is_told_no_places_says_so():
    made = layer()
    with pytest.raises(ValueError, match=r"shape \(2, 15, 6\), wanted maps"):
        made(maps().flatten(1, 2))
    with pytest.raises(ValueError, match="got none"):
        made.router(maps().view(-1, D))
    with pytest.raises(ValueError, match="0 frequencies"):
        PlacedRouter(TopKRouter(D, E), frequencies=0)


def test_a_module_around_it_without_places_is_refused_in_a_sentence():
    class Around(Router):
        def __init__(self, router):
            super().__init__()
            self.router, self.k, self.num_experts = router, router.k, router.num_experts

        def forward(self, x, k=None):
            return self.router(x, k)

    made = layer()
    made.router = Around(made.router)
    with pytest.raises(ValueError, match="got none"):
        made(maps())
