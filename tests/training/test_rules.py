import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from synchromesh.errors import InputError
from synchromesh.moe.experts import MLPExperts
from synchromesh.moe.layer import MoE
from synchromesh.moe.routing import TopKRouter
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import parallelize
from synchromesh.parallel.sharded import Sharded
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.checkpoint import restore_model, restore_optimizer, save_checkpoint
from synchromesh.training.config import TrainConfig
from synchromesh.training.muon import ExpertMuon, hidden_matrices, orthogonalized
from synchromesh.training.optim import Optim, build_optimizer, group_steps, set_group_steps, set_learning_rate
from synchromesh.training.rules import RULES, SGD, Adafactor, AdamW, Lamb, Lion, Muon, UpdateRule
from synchromesh.training.run_folder import build_model

D, E, F = 8, 4, 12
RATE = 0.02


class Net(nn.Module):
    """A layer of experts between two that Muon leaves alone."""

    def __init__(self, num_experts: int = E) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D, D)
        self.block = MoE(TopKRouter(D, num_experts, k=min(2, num_experts)), MLPExperts(num_experts, D, hidden=F))
        self.block.layer_depth = 1  # pyright: ignore[reportArgumentType]
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.first(x)))


def optimizer_of(model: nn.Module, rule: UpdateRule, **others: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, Optim(weight_decay=0.1, eps=1e-3, rule=rule, **others))


def step(model: nn.Module, run: nn.Module, optimizer: torch.optim.Optimizer, number: int, part: slice) -> None:
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    run(x[part]).square().mean().backward()
    set_learning_rate(optimizer, RATE)
    optimizer.step()


@pytest.mark.parametrize("kind", RULES)
def test_training_goes_on_bit_for_bit_from_what_is_stored(kind: type[UpdateRule], tmp_path: Path) -> None:
    model = Net()
    optimizer = optimizer_of(model, kind())
    for number in range(3):
        step(model, model, optimizer, number, slice(None))
    folder = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    other = Net()
    empty = optimizer_of(other, kind())
    restore_model(folder, other)
    restore_optimizer(folder, other, empty)
    set_group_steps(empty, group_steps(optimizer))
    before = copy.deepcopy(model.state_dict())
    for one, two in ((model, optimizer), (other, empty)):
        step(one, one, two, 3, slice(None))
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_lions_step_is_that_of_its_paper() -> None:
    model, rule = Net(), Lion((0.8, 0.9))
    optimizer = optimizer_of(model, rule)
    weight, mean = model.head.weight.detach().clone(), torch.zeros_like(model.head.weight)
    for number in range(3):
        step(model, model, optimizer, number, slice(None))
        grad = model.head.weight.grad
        assert grad is not None
        weight = weight - RATE * ((0.8 * mean + 0.2 * grad).sign() + 0.1 * weight)
        mean = 0.9 * mean + 0.1 * grad
    torch.testing.assert_close(model.head.weight.detach(), weight)


def test_lambs_step_is_as_long_as_the_weights_of_the_tensor() -> None:
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, Optim(weight_decay=0.0, rule=Lamb()))
    step(model, model, optimizer, 0, slice(None))
    for name in ("head.weight", "block.experts.up"):  # of all experts together
        moved = (model.get_parameter(name) - before[name]).norm()
        torch.testing.assert_close(moved, RATE * before[name].norm(), rtol=1e-3, atol=0)


def test_adafactor_keeps_means_of_each_experts_rows_and_columns() -> None:
    model = Net()
    optimizer = optimizer_of(model, Adafactor())
    step(model, model, optimizer, 0, slice(None))
    up = model.get_parameter("block.experts.up")
    state, grad = optimizer.state[up], up.grad
    assert grad is not None
    for expert in range(E):
        torch.testing.assert_close(state["row_var"][expert, :, 0], grad[expert].square().mean(1))
        torch.testing.assert_close(state["col_var"][expert, 0], grad[expert].square().mean(0))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_treats_every_expert_as_torch_treats_its_matrix(nesterov: bool) -> None:
    stack = nn.Parameter(torch.randn(E, F, D))
    apart = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    groups = [{"params": [stack], "orthogonal": True, "weight_decay": 0.1}]
    own = ExpertMuon(groups, lr=RATE, momentum=0.9, nesterov=nesterov)
    oracle = torch.optim.Muon(
        apart, lr=RATE, momentum=0.9, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        grad = torch.randn(E, F, D) * torch.tensor([1.0, 10.0, 0.1, 1.0])[:, None, None]
        stack.grad = grad
        for number, matrix in enumerate(apart):
            matrix.grad = grad[number].clone()
        own.step()
        oracle.step()
    # Steps are RATE * 0.2 * sqrt(F) * about 1 / sqrt(D) a number; bfloat16 leaves two digits of them.
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in apart]), rtol=0, atol=3e-4)


def test_singular_values_of_every_expert_come_near_one_and_those_of_the_stack_would_not() -> None:
    grad = torch.randn(E, F, D) * torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None]
    values = torch.linalg.svdvals(orthogonalized(grad))
    assert float(values.min()) > 0.4
    assert float(values.max()) < 1.4
    flat = torch.linalg.svdvals(orthogonalized(grad.flatten(0, 1)).unflatten(0, (E, F)))
    assert float(flat[2].max()) < 0.1  # the expert of few tokens would hardly move


def test_muon_trains_the_matrices_of_layers_and_adamw_the_rest(tiny: TrainConfig) -> None:
    assert hidden_matrices(Net()) == {"block.experts.up", "block.experts.down"}
    model = build_model(tiny.task, tiny.model, {"classes": list("abcdefgh")})
    found = hidden_matrices(model)
    assert {f"backbone.stages.1.blocks.1.ffn.experts.{name}" for name in ("up", "down")} < found
    assert not [name for name in found if name.startswith("head") or "router" in name or "patch" in name]
    assert {model.get_parameter(name).ndim for name in found} == {2, 3}
    optimizer = optimizer_of(Net(), Muon())
    assert [group["orthogonal"] for group in optimizer.param_groups] == [False, False, True]


def test_what_adamw_trains_beside_muon_is_trained_as_by_adamw() -> None:
    one, two = Net(), Net()
    for model, rule in ((one, Muon()), (two, AdamW())):
        optimizer = optimizer_of(model, rule)
        step(model, model, optimizer, 0, slice(None))
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.get_parameter("block.experts.up"), two.get_parameter("block.experts.up"))


def test_muon_without_layers_says_what_it_looks_for() -> None:
    with pytest.raises(ValueError, match="its blocks need a `layer_depth`"):
        optimizer_of(nn.Linear(2, 2), Muon())


@pytest.mark.parametrize("name", ["Lion", "Lamb"])
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(module: str, *others: Any) -> Any:
        if module == "pytorch_optimizer":
            raise ImportError(module)
        return real(module, *others)

    monkeypatch.setattr(builtins, "__import__", absent)
    rule = {"Lion": Lion(), "Lamb": Lamb()}[name]
    with pytest.raises(
        InputError, match=rf"--optim\.rule {name.lower()} needs the package pytorch_optimizer: .*optimizers"
    ):
        optimizer_of(Net(), rule)


def on_ranks(rule: UpdateRule, num_experts: int) -> dict[str, Any] | str:
    grid, model = Grid.from_group(dist.group.WORLD), Net(num_experts)
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    optimizer = optimizer_of(model, rule)
    each = 24 // grid.size
    try:
        for number in range(2):
            step(model, run, optimizer, number, slice(grid.rank * each, (grid.rank + 1) * each))
    except ValueError as error:
        return str(error)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return {name: tensor.tolist() for name, tensor in whole.items()}


@pytest.mark.parametrize("rule", [Muon(), SGD(), Lion()])
def test_two_ranks_step_as_one_process_does(rule: UpdateRule) -> None:
    model = Net()
    optimizer = optimizer_of(model, rule)
    for number in range(2):
        step(model, model, optimizer, number, slice(None))
    tolerance = 3e-4 if isinstance(rule, Muon) else 1e-5
    for found in run_ranks(on_ranks, 2, rule, E):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(torch.tensor(found[name]), tensor, rtol=0, atol=tolerance)


def test_rules_that_ask_for_more_than_a_rank_holds_are_refused_there() -> None:
    assert "wanted whole experts: take as many ranks as experts at most" in run_ranks(on_ranks, 2, Muon(), 1)[0]
    assert "whose step depends on norms of whole tensors" in run_ranks(on_ranks, 2, Lamb(), E)[1]
