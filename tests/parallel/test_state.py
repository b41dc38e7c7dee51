"""State of spread experts, as torch's own tools ask for it: what one process has, or a sentence on what to do."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from synchromesh import (
    FullySharded,
    Grid,
    MLPExperts,
    ModuleExperts,
    MoE,
    Sharded,
    TopKRouter,
    parallelize,
    quantize_experts,
    whole_state,
)
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, E = 8, 4
FULL = StateDictOptions(full_state_dict=True)
SENTENCE = "with whole_state"


def net(seed: int, **options) -> nn.Sequential:
    torch.manual_seed(seed)
    experts = MLPExperts(E, D, hidden=16)
    return nn.Sequential(nn.Linear(D, D), MoE(TopKRouter(D, E, k=2), experts, **options)).double()


def modules(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    experts = ModuleExperts([nn.Linear(D, D) for _ in range(E)])
    return nn.Sequential(nn.Linear(D, D), MoE(TopKRouter(D, E, k=2), experts)).double()


def tokens() -> torch.Tensor:
    return torch.randn(12, D, generator=torch.Generator().manual_seed(9)).double()


def ranks() -> Grid:
    return Grid.from_group(dist.group.WORLD)


def spread(seed: int, build: Callable[[int], nn.Sequential] = net) -> tuple[nn.Sequential, nn.Module]:
    grid, model = ranks(), build(seed)
    return model, parallelize(model, grid, strategy=lambda: Sharded(grid))


def check(run: nn.Module, build: Callable[[int], nn.Sequential] = net) -> None:
    """Hold a model to what seed 0 computes in one process, with all experts."""
    assert_close("y", run(tokens()), build(0)(tokens()))


def is_whole(state: dict[str, torch.Tensor], build: Callable[[int], nn.Sequential] = net) -> None:
    wanted = build(0).state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert type(state[name]) is torch.Tensor, name
        assert torch.equal(state[name].cpu(), tensor), name


def shows_and_takes():
    model, run = spread(0)
    wanted, whole = net(0), net(0).state_dict()
    for keep in (False, True):
        state = model.state_dict(keep_vars=keep)
        assert {name: v.shape for name, v in state.items()} == {name: v.shape for name, v in whole.items()}
        assert all(isinstance(v, DTensor) == ("experts" in name) for name, v in state.items())
    assert all(not isinstance(p, DTensor) for p in model.parameters())
    check(run)
    for given in (whole, model.state_dict(), copy.deepcopy(model.state_dict()), get_model_state_dict(model)):
        for assign in (False, True):
            other, other_run = spread(7)
            other.load_state_dict(given, assign=assign)
            check(other_run)
            own = other[1].experts.up
            if given is whole:  # no rank keeps the memory of the whole
                assert own.untyped_storage().nbytes() == own.numel() * own.element_size()
    alone = net(7)
    alone.load_state_dict(get_model_state_dict(model, options=FULL))
    assert torch.equal(alone(tokens()), wanted(tokens()))
    check(copy.deepcopy(run))
    assert isinstance(copy.deepcopy(model).state_dict()["1.experts.up"], DTensor)


@pytest.mark.parametrize("world", [2, 8])  # two experts on a rank; two ranks for an expert
def test_a_state_dict_shows_the_whole_and_the_whole_can_be_loaded(world):
    run_ranks(shows_and_takes, world)


def refuses():
    model, run = spread(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    part = {name: p.detach() + 1 for name, p in model.named_parameters()}
    with pytest.raises(
        RuntimeError, match=f"(?s)1.experts.up: got .*wanted the whole .*part of the experts.*{SENTENCE}"
    ):
        model.load_state_dict(part)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if "experts" in name)
    with pytest.raises(RuntimeError, match=r"1\.experts\.up: got \(8, 16, 8\), wanted the whole \(4, 16, 8\)"):
        model.load_state_dict({**net(0).state_dict(), "1.experts.up": torch.zeros(8, 16, 8)})
    for state in (model.state_dict(), {"model": copy.deepcopy(model.state_dict())}, run.state_dict()):
        with pytest.raises(ValueError, match=SENTENCE):
            torch.save(state, io.BytesIO())
    with pytest.raises(ValueError, match=SENTENCE):
        torch.save(model, io.BytesIO())


def test_a_part_is_refused_on_the_way_in_and_on_the_way_to_a_file():
    run_ranks(refuses, 2)


def gathers():
    model, run = spread(0)
    is_whole(get_model_state_dict(model, options=FULL))
    is_whole(get_model_state_dict(run, options=FULL))
    on_first = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        is_whole(on_first)
    else:
        assert on_first == {}
    with whole_state(run):
        is_whole(model.state_dict())
    assert isinstance(model.state_dict()["1.experts.up"], DTensor)
    file = io.BytesIO()
    with whole_state(model):
        torch.save(model.state_dict(), file)
    file.seek(0)
    other, other_run = spread(7)
    other.load_state_dict(torch.load(file))
    check(other_run)


def scatters():
    whole = net(0).state_dict()
    model, _ = spread(0)
    options = [{"full_state_dict": True}, {"full_state_dict": True, "broadcast_from_rank0": True}]
    options += [{**options[1], "cpu_offload": True}, {}, {"cpu_offload": True}]
    for kind in options:
        given = whole
        if kind.get("broadcast_from_rank0") and dist.get_rank():
            given = {}
        if not kind.get("full_state_dict"):
            given = get_model_state_dict(model, options=StateDictOptions(**kind))
        other, run = spread(7)
        set_model_state_dict(run, dict(given), options=StateDictOptions(**kind))
        check(run)
        if kind.get("full_state_dict"):  # what is sharded here is of replicas, which FSDP2 has none of
            grid, other = ranks(), net(7)
            run = parallelize(other, grid, strategy=lambda: Sharded(ranks()), shared=FullySharded())
            set_model_state_dict(run, dict(given), options=StateDictOptions(**kind))
            if not kind.get("cpu_offload"):
                check(run)


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("what", [gathers, scatters])
def test_torch_gathers_and_scatters_the_state(world, what):
    run_ranks(what, world)


def saves(folder):
    model, _ = spread(0)
    dcp.save({"m": model.state_dict()}, checkpoint_id=folder / "plain")
    dcp.async_save({"m": model.state_dict()}, checkpoint_id=folder / "async").result()


def loads(folder):
    for kind in ("plain", "async"):
        model, run = spread(7) if dist.is_initialized() else (net(7),) * 2
        state = {"m": model.state_dict()}
        dcp.load(state, checkpoint_id=folder / kind, no_dist=not dist.is_initialized())
        model.load_state_dict(state["m"])
        check(run)


@pytest.mark.parametrize(("writers", "readers"), [(2, 4), (4, 2), (8, 2), (2, 8)])
def test_torchs_checkpoint_of_some_ranks_is_read_by_any_other_number(tmp_path, writers, readers):
    run_ranks(saves, writers, tmp_path)
    run_ranks(loads, readers, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.distributed is (disabled|unavailable)")
def test_torchs_checkpoint_of_ranks_is_read_by_one_process(tmp_path):
    run_ranks(saves, 2, tmp_path)
    loads(tmp_path)


def whole_modules(folder):
    model, run = spread(0, modules)
    numbers = {name.split(".")[3] for name in model.state_dict() if "experts.experts" in name}
    assert len(numbers) == E // dist.get_world_size()
    whole = modules(0).state_dict()
    with whole_state(model):
        gathered = model.state_dict()
    is_whole(gathered, modules)
    dcp.save({"m": model.state_dict()}, checkpoint_id=folder)
    stored = {"m": spread(7, modules)[0].state_dict()}
    dcp.load(stored, checkpoint_id=folder)
    for given in (whole, model.state_dict(), gathered, stored["m"]):
        other, other_run = spread(7, modules)
        other.load_state_dict(given)
        check(other_run, modules)
    with pytest.raises(ValueError, match=SENTENCE):
        torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(RuntimeError, match="Missing key"):  # its own modules only: nothing that passes for the whole
        modules(7).load_state_dict(get_model_state_dict(model, options=FULL))
    check(run, modules)


def test_modules_as_experts_are_taken_from_the_whole_and_kept_by_name(tmp_path):
    run_ranks(whole_modules, 2, tmp_path)


def eight_bits():
    wanted = net(0).float()
    quantize_experts(wanted)
    first, grid = net(0).float(), ranks()
    quantize_experts(first)
    then = net(0).float()
    for model in (first, then):
        parallelize(model, grid, strategy=lambda: Sharded(grid))
    quantize_experts(then)
    for model in (first, then):
        state = get_model_state_dict(model, options=FULL)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.state_dict().items())
        model.load_state_dict(wanted.state_dict())
        assert_close("y", model(tokens().float()), wanted(tokens().float()))


def test_eight_bit_experts_are_shown_as_the_whole_whenever_they_were_quantized():
    run_ranks(eight_bits, 2)


def averages():
    model, run = spread(0)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, value in state.items():  # as averages of weights by state dicts do
            value.copy_(value * 0.5 + model.state_dict()[name] * 0.5)
    other, other_run = spread(7)
    other.load_state_dict(state)
    check(other_run)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    check(averaged)
    other.load_state_dict(averaged.module.state_dict())
    check(other_run)
    check(run)


def test_averaged_copies_hold_their_ranks_part_and_show_the_whole():
    run_ranks(averages, 2)


def one_of_two_grids():
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    grid, model = Grid.from_group(groups[dist.get_rank() // 2]), net(0)
    model[1].distribute(Sharded(grid))
    is_whole(get_model_state_dict(model, options=FULL))
    other = net(7)
    other[1].distribute(Sharded(grid))
    other.load_state_dict(net(0).state_dict())
    check(other)


def test_a_grid_of_some_ranks_is_no_different():
    run_ranks(one_of_two_grids, 4)
