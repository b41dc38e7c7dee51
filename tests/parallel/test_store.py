"""What some ranks write, others read: weights and optimizer state, any number of ranks to any other."""

import errno
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh import Grid, MLPExperts, ModuleExperts, MoE, Sharded, TopKRouter
from synchromesh.errors import InputError
from synchromesh.parallel.store import (
    StoreError,
    make_optimizer_state,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    stored_shapes,
    write_tensors,
)
from synchromesh.testing.distributed import run_ranks
from synchromesh.training import checkpoint
from synchromesh.training.checkpoint import newest_checkpoint, save_checkpoint

D, F = 4, 8


def world() -> Grid:
    return Grid.from_group(dist.group.WORLD) if dist.is_initialized() else Grid(None)


def built(grid, seed, experts=4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, D), MoE(TopKRouter(D, experts), MLPExperts(experts, D, hidden=F)))
    model[1].distribute(Sharded(grid))
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer


def known(tensors):
    """Fill tensors with numbers that follow from their names and places in the whole."""
    for name, tensor in tensors.items():
        local, first = tensor, 0
        if hasattr(tensor, "to_local"):
            local = tensor.to_local()
            first = local.numel() * dist.get_rank()
        values = torch.arange(first, first + local.numel()) + 1000 * (sum(map(ord, name)) % 97)
        local.copy_(values.view(local.shape).to(local.dtype))


def with_state(model, optimizer, grid):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tensors = model_tensors(model, grid) | optimizer_tensors(model, optimizer, grid)
    with torch.no_grad():
        known(tensors)


def write(folder):
    grid = world()
    model, optimizer = built(grid, 0)
    with_state(model, optimizer, grid)
    write_tensors(folder, "weights", model_tensors(model, grid), grid)
    write_tensors(folder, "optimizer", optimizer_tensors(model, optimizer, grid), grid)


def read(folder):
    grid = world()
    wanted, wanted_optimizer = built(grid, 0)
    with_state(wanted, wanted_optimizer, grid)
    model, optimizer = built(grid, 1)
    make_optimizer_state(model, optimizer, folder, grid)
    read_tensors(folder, model_tensors(model, grid), grid)
    read_tensors(folder, optimizer_tensors(model, optimizer, grid), grid)
    for (name, got), right in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(got, right), name
    for own, other in zip(model.parameters(), wanted.parameters(), strict=True):
        for kind, value in wanted_optimizer.state[other].items():
            assert torch.equal(optimizer.state[own][kind], value), kind
            assert optimizer.state[own][kind].dtype == value.dtype


@pytest.mark.parametrize(
    ("writers", "readers"), [(1, 1), (1, 4), (4, 1), (4, 2), (2, 4), (8, 2), (2, 8), (1, 8)], ids=str
)
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    """Four experts: eight ranks hold half an expert each."""
    run_ranks(write, writers, tmp_path)
    names = {file.name for file in tmp_path.glob("*.safetensors")}
    assert len(names) == 2 * writers
    assert stored_shapes(tmp_path)["1.experts.up"] == (4 * F, D)
    run_ranks(read, readers, tmp_path)


def test_a_process_without_ranks_writes_and_reads_the_same_files(tmp_path: Path) -> None:
    write(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"weights.safetensors", "optimizer.safetensors"}
    read(tmp_path)
    run_ranks(read, 2, tmp_path)


def refuses(folder):
    grid = world()
    model, _ = built(grid, 0, experts=8)
    with pytest.raises(StoreError, match=r"experts.up of shape|shape"):
        read_tensors(folder, model_tensors(model, grid), grid)
    model, _ = built(grid, 0)
    with pytest.raises(StoreError, match="missing more"):
        read_tensors(folder, {**model_tensors(model, grid), "more": torch.zeros(1)}, grid)
    fewer = model_tensors(model, grid)
    fewer.pop("0.bias")
    with pytest.raises(StoreError, match=r"not used 0\.bias"):
        read_tensors(folder, fewer, grid)


def test_what_is_missing_left_over_or_of_another_shape_is_named(tmp_path: Path) -> None:
    run_ranks(write, 2, tmp_path)
    run_ranks(refuses, 2, tmp_path)
    (tmp_path / "weights-00001-of-00002.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StoreError, match="cannot read"):
        stored_shapes(tmp_path)


def modules_keep_their_names(folder):
    grid = world()
    torch.manual_seed(0)
    experts = [nn.Linear(D, D) for _ in range(4)]
    wanted = {f"experts.experts.{n}.weight": expert.weight.clone() for n, expert in enumerate(experts)}
    layer = MoE(TopKRouter(D, 4), ModuleExperts(experts), strategy=Sharded(grid))
    write_tensors(folder, "weights", model_tensors(layer, grid), grid)
    stored = stored_shapes(folder)
    kept = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    make_optimizer_state(layer, optimizer, folder, grid)
    read_tensors(folder, model_tensors(layer, grid), grid)
    assert all(torch.equal(p, kept[name]) for name, p in layer.named_parameters())
    return all(name in stored for name in wanted)


def test_modules_as_experts_are_kept_under_their_own_numbers(tmp_path: Path) -> None:
    assert all(run_ranks(modules_keep_their_names, 2, tmp_path))


def saves_on_a_full_disk(folder):
    grid = world()
    model, optimizer = built(grid, 0)
    with_state(model, optimizer, grid)
    save_checkpoint(folder, model, optimizer, {"step": 1}, grid)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    own = full if grid.rank == 1 else checkpoint.sync_file
    with patch.object(checkpoint, "sync_file", own), pytest.raises(InputError, match="No space left"):
        save_checkpoint(folder, model, optimizer, {"step": 2}, grid)
    found = newest_checkpoint(folder, pytest.fail, grid)
    assert found is not None
    save_checkpoint(folder, model, optimizer, {"step": 3}, grid)  # and the next one works
    return found.state["step"], sorted(p.name for p in folder.iterdir())


def test_a_full_disk_on_one_rank_is_every_ranks_error_and_loses_nothing(tmp_path: Path) -> None:
    for step, names in run_ranks(saves_on_a_full_disk, 2, tmp_path):
        assert step == 1
        assert {"step-00000001", "step-00000003"} <= set(names)
