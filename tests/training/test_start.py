import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.training.config import Freeze, TrainConfig
from synchromesh.training.run_folder import build_model
from synchromesh.training.start import freeze, load_weights


def model_for(tiny: TrainConfig, classes: int, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(tiny.task, tiny.model, {"classes": list(range(classes))})


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_another_number_of_classes_leaves_only_the_head_fresh(tiny: TrainConfig, tmp_path: Path, suffix: str) -> None:
    trained, fresh = model_for(tiny, 8), model_for(tiny, 3, seed=1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"model": trained.state_dict()}, path)
    else:
        save_file(trained.state_dict(), path)
    loaded = load_weights(fresh, path, CATALOG)
    assert loaded.fresh == ("head.weight", "head.bias")
    assert loaded.unused == ()
    assert loaded.taken == len(trained.state_dict()) - 2
    wanted = trained.state_dict()
    assert all(torch.equal(v, wanted[k]) for k, v in fresh.state_dict().items() if k not in loaded.fresh)


def test_another_window_takes_every_weight(tiny: TrainConfig, tmp_path: Path) -> None:
    save_file(model_for(tiny, 8).state_dict(), tmp_path / "w.safetensors")
    wider = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, window_size=2))
    assert load_weights(model_for(wider, 8), tmp_path / "w.safetensors", CATALOG).fresh == ()


def test_a_backbone_of_which_a_part_is_missing_is_refused_by_the_names_of_what_is_missing(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    state = model_for(tiny, 8).state_dict()
    lost = "backbone.stages.0.blocks.0.ffn.up.weight"
    save_file({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=rf"lacks 1 of the backbone's \d+ tensors: {lost} \(32, 8\); .*--start\.partial"
    ):
        load_weights(model_for(tiny, 8), tmp_path / "w.safetensors", CATALOG)
    loaded = load_weights(model_for(tiny, 8), tmp_path / "w.safetensors", CATALOG, partial=True)
    assert loaded.fresh == (lost,)


def test_a_backbone_of_another_shape_is_refused_with_both_shapes(tiny: TrainConfig, tmp_path: Path) -> None:
    experts = dataclasses.replace(tiny.model.experts, num_experts=2)
    fewer = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, experts=experts))
    save_file(model_for(fewer, 8).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"lacks \d+ of the backbone's .*router.* in another shape"):
        load_weights(model_for(tiny, 8), tmp_path / "w.safetensors", CATALOG)


def weights_without(tiny: TrainConfig, folder: Path, *lost: str) -> Path:
    state = model_for(tiny, 8).state_dict()
    path = folder / "some.safetensors"
    save_file({name: t for name, t in state.items() if not any(part in name for part in lost)}, path)
    return path


def test_a_part_is_not_enough_where_most_of_the_backbone_would_stay_random(tiny: TrainConfig, tmp_path: Path) -> None:
    path = weights_without(tiny, tmp_path, "stages.1", "stages.0.blocks.0.attention", "ffn")
    with pytest.raises(InputError, match=r"there are \d+\.\d% of the backbone's [\d,]+ numbers, wanted 50% at least"):
        load_weights(model_for(tiny, 8), path, CATALOG, partial=True)


@pytest.mark.parametrize(("frozen", "count"), [(Freeze.BACKBONE, 2), (Freeze.MOE, 1)])
def test_what_is_frozen_must_all_be_there(tiny: TrainConfig, tmp_path: Path, frozen: Freeze, count: int) -> None:
    path = weights_without(tiny, tmp_path, "router.weight", "backbone.norm.bias")
    assert load_weights(model_for(tiny, 8), path, CATALOG, partial=True).taken > 10
    with pytest.raises(InputError, match=f"; {count} of them would stay random and frozen: give them, or freeze less"):
        load_weights(model_for(tiny, 8), path, CATALOG, partial=True, frozen=frozen)


def test_the_weights_of_a_backbone_alone_are_taken(tiny: TrainConfig, tmp_path: Path) -> None:
    trained = model_for(tiny, 8)
    save_file(trained.get_submodule("backbone").state_dict(), tmp_path / "w.safetensors")
    fresh = model_for(tiny, 8, seed=1)
    assert load_weights(fresh, tmp_path / "w.safetensors", CATALOG).fresh == ("head.weight", "head.bias")
    assert torch.equal(fresh.get_parameter("backbone.norm.weight"), trained.get_parameter("backbone.norm.weight"))


def test_a_file_that_would_run_code_is_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickled.pt")
    with pytest.raises(InputError, match=r"pickled\.pt is damaged, or holds other objects"):
        load_weights(model_for(tiny, 8), tmp_path / "pickled.pt", CATALOG)


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt"])
def test_a_broken_file_is_named(tiny: TrainConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(InputError, match=name):
        load_weights(model_for(tiny, 8), tmp_path / name, CATALOG)


def test_weights_of_another_model_are_refused(tiny: TrainConfig, tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"no tensor of .*other\.safetensors fits the model"):
        load_weights(model_for(tiny, 8), tmp_path / "other.safetensors", CATALOG)


@pytest.mark.parametrize("name", ["missing.safetensors", "folder"])
def test_a_missing_file_or_a_folder_of_something_else_is_named(tiny: TrainConfig, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=name):
        load_weights(model_for(tiny, 8), tmp_path / name, CATALOG)


@pytest.mark.parametrize("name", ["digits", "digits.pt"])
def test_the_missing_run_of_a_recipe_is_named_with_the_command_that_makes_it(
    tiny: TrainConfig, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=f"the weights {path} do not exist") as refused:
        load_weights(model_for(tiny, 8), path, CATALOG)
    command = f": make it first, by `synchromesh train digits --run {path}`"
    assert str(refused.value).endswith(command) is (name == "digits")


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
