import pytest
import torch
from torch import nn

from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.low_rank import Factors, LowRank, LowRankUpdate
from tests.adapt.conftest import moved


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)).double()


def test_the_first_output_is_the_frozen_one_bit_for_bit_and_only_factors_learn():
    model, x = network(), torch.randn(4, 5).double()
    wanted = model(x)
    adaptation = adapt(model, nn.Linear, LowRank(rank=2, scale=3.0))
    assert torch.equal(model(x), wanted)
    below = "parametrizations.weight.0.factors"
    assert list(adaptation.trained()) == [f"{n}.{below}.{f}" for n in (0, 2) for f in ("down", "up")]
    assert sum(p.numel() for p in adaptation.trained().values()) == 2 * (5 + 8) + 2 * (8 + 3)


def test_an_update_is_what_it_says_merged_too_and_undo_gives_back_what_was():
    model, x = network(), torch.randn(4, 5).double()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adaptation = adapt(model, nn.Linear, LowRank(rank=2, scale=3.0))
    moved(adaptation.trained().values())
    down, up = list(adaptation.trained().values())[:2]
    rows = x @ before["0.weight"].T + before["0.bias"] + 3 * (x @ down.T) @ up.T
    torch.testing.assert_close(model[0](x), rows)
    after = model(x)
    adaptation.merge()
    assert set(model.state_dict()) == set(before)
    torch.testing.assert_close(model(x), after)
    again = network()
    adaptation = adapt(again, nn.Linear, LowRank(rank=2))
    moved(adaptation.trained().values())
    adaptation.undo()
    assert all(torch.equal(p, before[name]) for name, p in again.state_dict().items())


def test_factors_depend_on_seed_and_name_alone_and_their_product_is_their_forward():
    layer, x = nn.Linear(5, 8).double(), torch.randn(4, 5).double()
    one, other, third = (
        LowRank(2, 3.0, seed=seed).factors(name, layer) for seed, name in ((0, "a"), (0, "a"), (1, "a"))
    )
    assert torch.equal(one.down, other.down)
    assert not torch.equal(one.down, third.down)
    assert one.down.abs().max() <= 5**-0.5
    moved(one.parameters())
    torch.testing.assert_close(one(x), x @ one.product().T)
    assert isinstance(one, Factors)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="rank"):
        LowRank(rank=0)
    with pytest.raises(ValueError, match="wanted one of experts"):
        LowRankUpdate(LowRank().factors("a", nn.Linear(2, 2))).hold(lambda x: x)
    assert LowRank()("a", nn.LayerNorm(3)) is None
