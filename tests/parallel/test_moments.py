"""State of optimizers that train spread experts: as the model's, the whole or a sentence."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from synchromesh import Grid, MLPExperts, ModuleExperts, MoE, Sharded, TopKRouter, parallelize, whole_state
from synchromesh.errors import InputError
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, E, HALF, END = 8, 4, 2, 4
FULL = StateDictOptions(full_state_dict=True)


def net(seed):
    torch.manual_seed(seed)
    experts = MLPExperts(E, D, hidden=16)
    return nn.Sequential(nn.Linear(D, D), MoE(TopKRouter(D, E, k=2), experts)).double()


def batch(step):
    return torch.randn(12, D, generator=torch.Generator().manual_seed(step)).double()


def train(run, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        run(batch(step)).square().mean().backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def alone():
    """One process: its state half way, by numbers and by names, and what it computes at the end."""
    model = net(0)
    optimizer = adam(model)
    train(model, optimizer, 0, HALF)
    half = copy.deepcopy((model.state_dict(), optimizer.state_dict(), get_optimizer_state_dict(model, optimizer)))
    train(model, optimizer, HALF, END)
    return *half, model(batch(END)).detach()


def spread(seed):
    grid, model = Grid.from_group(dist.group.WORLD), net(seed)
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    return model, run, adam(run)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def resumes(folder):
    weights, numbered, named, wanted = alone()
    model, run, optimizer = spread(0)
    train(run, optimizer, 0, HALF)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    for name, options in (("nested", StateDictOptions()), ("flat", flat)):
        dcp.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder / name)
    with whole_state(model):
        gathered = through_a_file(optimizer.state_dict())
    shown = copy.deepcopy(optimizer.state_dict())
    assert all(isinstance(shown["state"][3][kind], DTensor) for kind in ("exp_avg", "exp_avg_sq"))
    with pytest.raises(ValueError, match="with whole_state"):
        torch.save(optimizer.state_dict(), io.BytesIO())
    both = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))

    def stored(name, options):
        def load(model, _run, optimizer):
            state = {"o": get_optimizer_state_dict(model, optimizer, options=options)}
            dcp.load(state, checkpoint_id=folder / name)
            set_optimizer_state_dict(model, optimizer, state["o"], options=options)

        return load

    def broadcast(model, _run, optimizer):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        given = copy.deepcopy(named) if dist.get_rank() == 0 else {}
        set_optimizer_state_dict(model, optimizer, given, options=options)

    def warm(_model, run, optimizer):
        train(run, optimizer, 0, 1)
        run.load_state_dict({f"module.{name}": tensor for name, tensor in weights.items()})
        optimizer.load_state_dict(copy.deepcopy(numbered))

    ways = {
        "one process's, before the first step": lambda m, r, o: o.load_state_dict(copy.deepcopy(numbered)),
        "one process's, after a step": warm,
        "gathered, through a file": lambda m, r, o: o.load_state_dict(gathered),
        "this rank's": lambda m, r, o: o.load_state_dict(shown),
        "full": lambda m, r, o: set_optimizer_state_dict(m, o, copy.deepcopy(named), options=FULL),
        "full, of rank 0": broadcast,
        "torch's checkpoint": stored("nested", StateDictOptions()),
        "torch's checkpoint, flat": stored("flat", flat),
        "model and optimizer": lambda m, r, o: set_state_dict(
            m, o, model_state_dict=dict(both[0]), optim_state_dict=copy.deepcopy(both[1]), options=FULL
        ),
    }
    for way, load in ways.items():
        other, other_run, other_optimizer = spread(7)
        other.load_state_dict(weights)
        load(other, other_run, other_optimizer)
        train(other_run, other_optimizer, HALF, END)
        assert_close(way, other_run(batch(END)), wanted)


@pytest.mark.parametrize("world", [2, 8])  # two experts on a rank; two ranks for an expert
def test_training_goes_on_as_in_one_process_however_the_optimizer_was_stored(world, tmp_path):
    run_ranks(resumes, world, tmp_path)


def shows_the_whole():
    _, _, named, _ = alone()
    model, run, optimizer = spread(0)
    train(run, optimizer, 0, HALF)
    got = get_optimizer_state_dict(model, optimizer, options=FULL)
    assert got["state"].keys() == named["state"].keys()
    for name, state in named["state"].items():
        for kind, value in state.items():
            assert_close(f"{kind} of {name}", got["state"][name][kind], value)
    twin = copy.deepcopy(model)
    other = adam(twin)
    train(twin, other, HALF, END)
    assert isinstance(other.state_dict()["state"][3]["exp_avg"], DTensor)
    assert not isinstance(other.state[twin[1].experts.up]["exp_avg"], DTensor)


def test_the_optimizer_of_a_model_and_of_its_copy_shows_the_whole():
    run_ranks(shows_the_whole, 2)


def refuses():
    model, run, optimizer = spread(0)
    train(run, optimizer, 0, HALF)
    part = {index: dict(state) for index, state in optimizer.state_dict()["state"].items()}
    part[3]["exp_avg"] = part[3]["exp_avg"].to_local()
    with pytest.raises(ValueError, match=r"(?s)exp_avg.*part of the experts.*with whole_state"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": part})
    optimizer.state[model[1].experts.up]["odd"] = torch.zeros(3)
    with pytest.raises(ValueError, match="'odd'"):
        optimizer.state_dict()


def test_a_part_is_refused_and_so_is_state_that_is_laid_out_otherwise():
    run_ranks(refuses, 2)


class ByRows(torch.optim.Optimizer):
    """Keeps the mean square of each row of each expert."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            rows = parameter.grad.square().mean(-1)
            self.state[parameter]["rows"] = rows
            parameter.sub_(0.01 * parameter.grad / (rows.sqrt()[..., None] + 1e-8))


def factored():
    grid = Grid.from_group(dist.group.WORLD)
    whole, model = (MoE(TopKRouter(D, E, k=2), experts(seed)).double() for seed in (0, 0))
    model.router.load_state_dict(whole.router.state_dict())
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    states = []
    for each, its_run in ((whole, whole), (model, run)):
        optimizer = ByRows(each.experts.parameters(), {})
        train(its_run, optimizer, 0, 1)
        states.append(get_optimizer_state_dict(each, optimizer, options=FULL)["state"])
    for name, state in states[0].items():
        for kind, value in state.items():
            assert_close(f"{kind} of {name}", states[1][name][kind], value)


def experts(seed):
    torch.manual_seed(seed)
    return MLPExperts(E, D, hidden=16, up_bias=False, down_bias=False)


def test_statistics_of_rows_and_columns_are_stacked_by_expert():
    """Of matrices; those of stacked biases run through all experts, and are refused."""
    run_ranks(factored, 2)


def asks_for_norms():
    grid = Grid.from_group(dist.group.WORLD)
    model = MoE(TopKRouter(D, E, k=2), experts(0)).double()
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    run(torch.randn(5, D).double()).square().sum().backward()
    for optimizer in (torch.optim.Adafactor(run.parameters()), torch.optim.LBFGS(run.parameters())):
        with pytest.raises(InputError, match="whose step depends on norms of whole tensors"):
            optimizer.step(lambda: 0.0)
    torch.optim.LBFGS(model.router.parameters()).step(lambda: torch.zeros(()))


def test_optimizers_that_ask_for_norms_of_whole_tensors_are_refused():
    run_ranks(asks_for_norms, 2)


def whole_modules():
    torch.manual_seed(0)
    grid = Grid.from_group(dist.group.WORLD)
    model = MoE(TopKRouter(D, E), ModuleExperts([nn.Linear(D, D) for _ in range(E)])).double()
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    optimizer = adam(run)
    train(run, optimizer, 0, 1)
    with pytest.raises(ValueError, match="with whole_state"):
        torch.save(optimizer.state_dict(), io.BytesIO())
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(before)
    train(run, optimizer, 1, 2)


def test_the_moments_of_modules_are_not_pickled_for_all():
    run_ranks(whole_modules, 2)
