import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from synchromesh import Grid
from synchromesh.errors import InputError
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.agree import ALONE
from synchromesh.training.checkpoint import Snapshot, newest_checkpoint, restore_model
from synchromesh.training.saver import Saver


def nothing(_folder: Path) -> None:
    pass


def trained() -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, SGD(model.parameters(), lr=0.1)


def test_what_training_changes_meanwhile_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    before, goes_on = model.weight.detach().clone(), threading.Event()
    saver = Saver(tmp_path, ALONE)
    state = {"step": 1, "window": [1.0]}
    snapshot = Snapshot.of(model, optimizer, state, copy=True)

    def then(_folder: Path) -> None:
        goes_on.wait()

    saver.start(snapshot, then)
    with torch.no_grad():
        model.weight.zero_()
    state["window"].append(2.0)
    assert saver.busy
    goes_on.set()
    saver.join()
    assert not saver.busy
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.state["window"] == [1.0]
    other, _ = trained()
    with torch.no_grad():
        other.weight.zero_()
    restore_model(found.folder, other)
    assert torch.equal(other.weight, before)


def test_an_error_of_the_thread_is_raised_where_it_is_joined(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saver = Saver(tmp_path / "file", ALONE)
    saver.start(Snapshot.of(*trained(), {"step": 1}, copy=True), nothing)
    with pytest.raises((InputError, OSError), match="file"):
        saver.join()
    saver.join()  # raised once


def saves_beside_collectives(folder: str) -> str:
    grid = Grid.from_group(dist.group.WORLD)
    saver = Saver(Path(folder), grid.with_own_group())
    model, optimizer = trained()
    for step in range(1, 4):
        saver.start(Snapshot.of(model, optimizer, {"step": step}, saver.grid, copy=True), nothing)
        for number in range(200):
            value = torch.full((8,), float(grid.rank + number))
            dist.all_reduce(value)
            assert value[0] == 2 * number + 1
        saver.join()
    found = newest_checkpoint(Path(folder), pytest.fail, grid)
    assert found is not None
    return found.folder.name


def test_collectives_of_training_and_of_a_save_never_mix(tmp_path: Path) -> None:
    assert run_ranks(saves_beside_collectives, 2, str(tmp_path)) == ["step-00000003"] * 2
