import torch
from torch import nn

from synchromesh.testing.randomised import gradients, randomise


def test_no_parameter_keeps_its_first_value_or_stays_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    nn.init.zeros_(model[0].bias)
    before = {name: p.clone() for name, p in model.named_parameters()}
    randomise(model)
    assert all(not (p == before[name]).any() for name, p in model.named_parameters())
    assert (model[1].weight > 0.4).all()


def test_gradients_are_of_parameters_that_have_one() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    model(torch.ones(3)).sum().backward()
    assert list(gradients(model)) == ["1.weight", "1.bias"]
