import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from synchromesh.errors import InputError
from synchromesh.training.architecture import build_classifier
from synchromesh.training.config import Freeze, TrainConfig
from synchromesh.training.start import freeze, load_weights


def model_for(tiny: TrainConfig, classes: int, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_classifier(tiny.model, tiny.data.preprocess, classes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_number_of_classes_leaves_only_the_head_fresh(tiny: TrainConfig, tmp_path: Path, suffix: str) -> None:
    trained, fresh = model_for(tiny, 8), model_for(tiny, 3, seed=1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"model": trained.state_dict()}, path)
    else:
        save_file(trained.state_dict(), path)
    loaded = load_weights(fresh, path)
    assert loaded.fresh == ("head.weight", "head.bias")
    assert loaded.unused == ()
    assert loaded.taken == len(trained.state_dict()) - 2
    wanted = trained.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in fresh.state_dict().items() if k not in loaded.fresh)


def test_another_window_takes_every_weight(tiny: TrainConfig, tmp_path: Path) -> None:
    save_file(model_for(tiny, 8).state_dict(), tmp_path / "w.safetensors")
    wider = dataclasses.replace(tiny.model, swin=dataclasses.replace(tiny.model.swin, window_size=2))
    assert load_weights(build_classifier(wider, tiny.data.preprocess, 8), tmp_path / "w.safetensors").fresh == ()


def test_a_file_that_would_run_code_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(InputError, match=r"pickled\.pt is damaged, or holds other objects"):
        load_weights(model_for(tiny, 8), tmp_path / "pickled.pt")


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_a_broken_file_is_named(tiny: TrainConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(InputError, match=name):
        load_weights(model_for(tiny, 8), tmp_path / name)


def test_weights_of_another_model_are_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"no tensor of .*other\.safetensors fits the model"):
        load_weights(model_for(tiny, 8), tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["missing.safetensors", "folder"])
def test_a_missing_file_or_a_folder_of_something_else_is_named(tiny: TrainConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=name):
        load_weights(model_for(tiny, 8), tmp_path / name)


def test_freezing_leaves_the_right_parameters_trainable(tiny: TrainConfig) -> None:
    model = model_for(tiny, 8)
    freeze(model, Freeze.MOE)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".ffn.router." in name or ".ffn.experts." in name for name in frozen)
    freeze(model, Freeze.BACKBONE)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_freezing_what_is_not_there_is_said() -> None:
    with pytest.raises(InputError, match="freezing 'moe' finds nothing"):
        freeze(nn.Sequential(nn.Linear(2, 2)), Freeze.MOE)
