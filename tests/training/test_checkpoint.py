from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from synchromesh.errors import InputError
from synchromesh.training.checkpoint import (
    best_folder,
    newest_checkpoint,
    read_checkpoint,
    restore_model,
    restore_optimizer,
    save_best,
    save_checkpoint,
)


def trained(steps: int = 2) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = AdamW(
        [
            {"params": [model[2].weight]},
            {"params": [p for n, p in model.named_parameters() if n != "2.weight" and p.requires_grad]},
        ]
    )
    for _ in range(steps):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, {"step": 2, "note": 0.1 + 0.2})
    found = read_checkpoint(folder)
    assert found.state == {"step": 2, "note": 0.1 + 0.2}
    other, empty = trained(steps=0)
    restore_model(folder, other)
    assert {k: v.tolist() for k, v in other.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    restore_optimizer(folder, other, empty)
    wanted, got = optimizer.state_dict(), empty.state_dict()
    assert wanted["state"].keys() == got["state"].keys()
    for index, tensors in wanted["state"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, got["state"][index][name]), (index, name)
            assert tensor.dtype == got["state"][index][name].dtype


def test_a_kill_between_the_renames_of_a_second_save_loses_nothing(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, {"step": 2, "evaluated": False})
    folder.rename(folder.with_name(folder.name + ".old"))
    (tmp_path / "step-00000002.tmp").mkdir()
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.folder == folder
    assert save_checkpoint(tmp_path, model, optimizer, {"step": 2, "evaluated": True}) == folder
    assert read_checkpoint(folder).state["evaluated"]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, optimizer, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = trained()
    for step in (1, 2):
        save_checkpoint(tmp_path, model, optimizer, {"step": step})
    path = tmp_path / "step-00000002" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None
    assert found.state["step"] == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_a_half_written_checkpoint_is_not_looked_at(tmp_path: Path) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "weights.safetensors").write_bytes(b"half")
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.state["step"] == 1
    save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_crash_while_writing_leaves_the_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, model, optimizer, {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synchromesh.training.checkpoint.sync_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert found.state["step"] == 1


def test_the_best_survives_the_clearing_and_is_replaced_by_a_better_one(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (1, 2, 3, 4):
        folder = save_checkpoint(tmp_path, model, optimizer, {"step": step})
        if step in (1, 3):
            save_best(tmp_path, folder)
    best = best_folder(tmp_path)
    assert best == tmp_path / "best-00000003"
    assert read_checkpoint(best).state["step"] == 3
    assert sorted(p.name for p in tmp_path.glob("best-*")) == ["best-00000003"]


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(InputError, match="which this run does not train"):
        restore_optimizer(folder, other, AdamW(other.parameters()))
