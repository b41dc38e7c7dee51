import copy
import io

import pytest
import torch
from torch import nn

from synchromesh import Adapted, MoE
from synchromesh.adapt.adaptation import adapt, after_step, merge_all
from synchromesh.adapt.low_rank import LowRank
from synchromesh.adapt.sparse import StaticSparsity
from synchromesh.adapt.split import SplitFFN
from synchromesh.moe.experts import StackedExperts


class Scaled(Adapted):
    """A linear layer with a factor of each output, which begins at one and counts its steps."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.frozen = copy.deepcopy(old).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(old.out_features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) * self.scale

    def after_step(self) -> None:
        self.steps += 1

    def merged(self) -> nn.Module:
        plain = copy.deepcopy(self.frozen).requires_grad_(True)
        with torch.no_grad():
            plain.weight.mul_(self.scale[:, None])
            plain.bias.mul_(self.scale)
        return plain


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2))


def scaled(name: str, old: nn.Module) -> nn.Module:
    return Scaled(old)


def trained(adaptation) -> None:
    model = adaptation.model
    optimizer = torch.optim.SGD(adaptation.trained().values(), lr=0.1, momentum=0.9)
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        adaptation.after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("select", "names"),
    [
        (nn.Linear, ("0", "1.0", "2")),
        ((nn.Linear, nn.Tanh), ("0", "1.0", "2")),  # the factory leaves the tanh
        (["0", "2"], ("0", "2")),
        ("1.*", ("1.0",)),
        ("[02]", ("0", "2")),
        (lambda name, module: isinstance(module, nn.Linear) and module.in_features == 4, ("0",)),
    ],
    ids=["type", "types", "list", "pattern", "choice", "function"],
)
def test_modules_are_chosen_by_type_by_name_and_by_function(select, names):
    model, x = network(), torch.randn(3, 4)
    wanted = model(x)
    adaptation = adapt(model, select, lambda name, old: Scaled(old) if isinstance(old, nn.Linear) else None)
    assert adaptation.names == names
    assert torch.equal(model(x), wanted)


def test_a_module_that_is_left_is_looked_into():
    model = network()
    found = adapt(model, (nn.Sequential, nn.Linear), lambda name, old: Scaled(old) if name == "1.0" else None)
    assert found.names == ("1.0",)


def test_what_learns_is_named_as_in_the_model_and_nothing_else_moves():
    model = network()
    adaptation = adapt(model, nn.Linear, scaled)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert list(adaptation.trained()) == ["0.scale", "1.0.scale", "2.scale"]
    trained(adaptation)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == [f"{path}.{own}" for path in ("0", "1.0", "2") for own in ("scale", "steps")]
    assert model[2].steps == 3
    after_step(model)
    assert model[2].steps == 4


def test_merging_makes_plain_modules_of_the_same_function_and_undoing_those_of_before():
    model, x = network(), torch.randn(3, 4)
    first, state = model(x), copy.deepcopy(model.state_dict())
    adaptation = adapt(model, nn.Linear, scaled)
    trained(adaptation)
    undone = copy.deepcopy(adaptation)
    assert torch.equal(undone.undo()(x), first)
    assert undone.model is not model
    wanted = model(x)
    assert not torch.allclose(wanted, first)
    assert adaptation.merge() is model
    torch.testing.assert_close(model(x), wanted)
    assert [type(module) for module in model.modules()] == [type(module) for module in network().modules()]
    assert model.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match=r"0, 1\.0, 2 are no longer in Sequential: merge or undo an adaptation once"):
        adaptation.undo()


def test_state_goes_through_a_file_into_a_model_adapted_alike():
    adaptation = adapt(network(), nn.Linear, scaled)
    trained(adaptation)
    file = io.BytesIO()
    torch.save(adaptation.model.state_dict(), file)
    file.seek(0)
    other = adapt(network(), nn.Linear, scaled)
    other.model.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 4)
    assert torch.equal(other.model(x), adaptation.model(x))
    assert torch.equal(other.merge()(x), adaptation.merge()(x))


def test_a_module_in_two_places_stays_one_there_and_back():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    adaptation = adapt(model, nn.Linear, scaled)
    assert adaptation.names == ("0", "2")
    assert len(adaptation.changes) == 1
    assert model[0] is model[2]
    assert list(adaptation.trained()) == ["0.scale"]
    assert adaptation.undo()[0] is shared
    assert model[2] is shared


class Wrapped(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 1


def test_what_others_wrapped_around_a_module_stays_around_it():
    model, x = network(), torch.randn(3, 4)
    adaptation = adapt(model, "2", scaled)
    model[2] = Wrapped(model[2])
    wanted = model(x)
    adaptation.merge()
    assert isinstance(model[2], Wrapped)
    assert type(model[2].base_layer) is nn.Linear
    assert torch.equal(model(x), wanted)


def test_new_modules_train_or_evaluate_as_those_of_before():
    model = network()
    model[1].eval()
    adaptation = adapt(model, nn.Linear, scaled)
    assert [model[0].training, model[1][0].training] == [True, False]
    model.eval()
    adaptation.merge()
    assert not model[0].training


def test_a_compiled_model_is_the_adapted_one():
    model, x = network(), torch.randn(3, 4)
    adapt(model, nn.Linear, scaled)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


def test_nothing_chosen_nothing_made_and_no_plain_form_are_said():
    model = network()
    with pytest.raises(ValueError, match="chose no module of Sequential; names look like"):
        adapt(model, nn.Conv2d, scaled)
    with pytest.raises(ValueError, match="the model itself"):
        adapt(model, lambda name, module: True, scaled)
    with pytest.raises(ValueError, match=r"left all 3 chosen modules as they are: 0, 1\.0, 2"):
        adapt(model, nn.Linear, lambda name, old: None)
    foreign = adapt(model, "0", lambda name, old: nn.Linear(4, 6))
    with pytest.raises(ValueError, match="0 became a Linear, which has no plain form"):
        foreign.merge()


def test_a_model_that_is_itself_of_the_type_is_looked_into():
    assert adapt(network(), nn.Sequential, lambda name, old: nn.Identity()).names == ("1",)


def test_a_factory_that_fails_leaves_the_model_whole():
    def second_fails(name: str, old: nn.Module) -> nn.Module:
        if name == "2":
            raise ValueError("cannot be split")
        return Scaled(old)

    model = network()
    with pytest.raises(ValueError, match="cannot be split"):
        adapt(model, nn.Linear, second_fails)
    assert [type(module) for module in model.modules()] == [type(module) for module in network().modules()]


def test_a_model_is_made_plain_by_whoever_has_no_adaptation_of_it():
    model, x = network(), torch.randn(3, 4)
    adapt(model, nn.Linear, scaled)
    with torch.no_grad():
        model[0].scale.mul_(3)
    wanted = model(x)
    with pytest.raises(ValueError, match="got a Scaled itself, wanted a model around it"):
        merge_all(model[0])
    assert merge_all(model) == ["0", "1.0", "2"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), wanted)
    assert merge_all(model) == []


def test_what_was_frozen_before_is_frozen_after_merging_and_the_rest_learns_again():
    model = network()
    model[0].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapt(model, nn.Linear, LowRank(rank=1)).merge()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_part_of_an_adapted_module_is_not_adapted_behind_its_back():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
    split = adapt(model, "1", SplitFFN(num_experts=4, k=4))
    with pytest.raises(ValueError, match=r"1\.moe is a part of 1, which is adapted already"):
        adapt(model, MoE, LowRank())
    after_step(model)
    assert adapt(model, StackedExperts, StaticSparsity(0.5)).names == ("1.moe.experts",)  # a mask over tensors may be
    split.undo()
