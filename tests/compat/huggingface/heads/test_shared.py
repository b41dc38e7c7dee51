import torch
from torch import nn

from synchromesh.compat.huggingface.heads.shared import keep_once, other_names


class Twice(nn.Module):
    """One layer under two names, inside of another module that is there once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.apart = nn.Linear(2, 2)
        self.second = nn.ModuleList([self.first])
        keep_once(self)


def test_a_layer_of_two_names_is_kept_under_the_first_and_loads_from_it() -> None:
    outer, other = nn.Sequential(Twice()), nn.Sequential(Twice())
    assert other_names(outer) == {"0.second.0.weight": "0.first.weight", "0.second.0.bias": "0.first.bias"}
    state = outer.state_dict()
    assert list(state) == ["0.first.weight", "0.first.bias", "0.apart.weight", "0.apart.bias"]
    other.load_state_dict(state)  # strict
    assert all(torch.equal(a, b) for a, b in zip(outer.parameters(), other.parameters(), strict=True))
    assert other[0].second[0] is other[0].first


def test_a_state_that_lacks_a_layer_is_refused_by_name() -> None:
    model = Twice()
    state = {name: tensor for name, tensor in model.state_dict().items() if "first" not in name}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert "first.weight" in missing
