"""`synchromesh convert` between the files of the released Swin-MoE and one file of safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from synchromesh import cli
from synchromesh.commands import convert
from synchromesh.compat.swin import read_swin, save_swin
from synchromesh.models.swin_v2_moe import swin_v2_moe_demo
from synchromesh.recipes.catalog import CATALOG
from synchromesh.tasks.classification import Classification
from synchromesh.training.run_folder import Trained
from synchromesh.training.start import load_weights


def test_released_files_become_weights_that_training_starts_from(tmp_path):
    model = swin_v2_moe_demo()
    save_swin(model, tmp_path / "released.pth", ranks=4)
    file = tmp_path / "weights.safetensors"
    assert cli.main(["convert", str(tmp_path / "released.pth"), str(file), "--from-swin"]) == 0
    assert set(load_file(file)) == set(model.state_dict())
    other = swin_v2_moe_demo()
    assert load_weights(other, file, CATALOG).taken == len(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_a_run_becomes_released_files(tmp_path, monkeypatch, capsys):
    model = swin_v2_moe_demo()
    trained = Trained(model, Classification(), {"classes": ["a"]}, tmp_path / "step-1")
    monkeypatch.setattr(convert, "load_trained", lambda run, catalog, best, student: trained)
    assert cli.main(["convert", "run", str(tmp_path / "demo.pth"), "--to-swin", "2"]) == 0
    assert "and 2 more" in capsys.readouterr().out
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in read_swin(tmp_path / "demo.pth").items())
    assert cli.main(["convert", "run", str(tmp_path / "demo.pth"), "--to-swin", "2"]) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["absent.pth", "x.safetensors", "--from-swin"], "absent.pth.rank0 is missing"),
        (["absent.pth", "x.safetensors", "--from-swin", "--to-swin", "2"], "got --to-swin with --from-swin"),
        (["run", "x.pth", "--to-swin", "0"], "wanted a run"),
        (["absent.pth", "x.pth", "--from-swin"], "does not end in .safetensors"),
    ],
)
def test_wrong_use_is_explained(
    given: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", *given]) == 2
    assert says in capsys.readouterr().err
