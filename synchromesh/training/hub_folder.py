"""A trained model in the hub's format: model.safetensors, config.json, and a model card; nothing in it is pickled.

config.json        task, backbone and facts, as a checkpoint's state.json has them, and `library_name`
model.safetensors  parameters and buffers by the names of the state dict, experts whole
README.md          the model card
recipe.json        the configuration of the run, where there is one: what `eval` scores on by default
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from synchromesh.errors import InputError, parsed_json
from synchromesh.models.features import BackboneConfig
from synchromesh.training.affordable import check_affordable, check_facts
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import sync_file, write_atomically, write_json
from synchromesh.training.run_folder import RECIPE, Trained, build_model, read_config
from synchromesh.training.task import Task

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FILES = (WEIGHTS, CONFIG, CARD, RECIPE)
LIBRARY = "synchromesh"
MOST_CONFIG = 1 << 26  # bytes of config.json: 21,841 names of classes are under one million


@dataclass(frozen=True)
class Published:
    """What a folder holds.

    Attributes:
        trained: the model.
        settings: of its backbone.
        recipe: of the run; None for a model without one.
    """

    trained: Trained
    settings: BackboneConfig
    recipe: TrainConfig | None


def write_hub_folder(folder: Path, model: Published, card: str) -> list[Path]:
    """Write a model into a folder that is empty or not there; return the files.

    Raises:
        InputError: there is something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: remove it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained.model.state_dict().items()}
    weights = folder / WEIGHTS
    aside = weights.with_name(f"{WEIGHTS}.part")
    save_file(tensors, aside, metadata={"format": "pt"})
    sync_file(aside)
    aside.rename(weights)
    write_json(folder / CONFIG, _config(model.trained, model.settings))
    write_atomically(folder / CARD, card)
    if model.recipe is not None:
        write_json(folder / RECIPE, encode(without_folders(model.recipe)))
    return [path for name in FILES if (path := folder / name).exists()]


def read_hub_folder(folder: Path, catalog: Catalog) -> Published:
    """Return the model in a folder. Nothing in it is run.

    The model is built only if the file has weights for all of it, so that no settings ask for more memory than they.

    Raises:
        InputError: a file is missing, damaged, or of another library; or its settings and weights do not fit together.
    """
    config = _read_config(folder / CONFIG)
    try:
        task = catalog.decode(Task, config["task"])
        settings = catalog.decode(BackboneConfig, config["model"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG} was written by another version or program: {error}") from error
    facts = check_facts(config["facts"])
    shapes = stored(folder / WEIGHTS)
    empty = check_affordable(lambda: task.build(settings, facts), shapes)
    _check_same(shapes, {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}, folder)
    model = build_model(task, settings, facts)
    model.load_state_dict(_load(folder / WEIGHTS))
    recipe = read_config(folder, catalog) if (folder / RECIPE).exists() else None
    return Published(Trained(model.eval(), task, facts, folder), settings, recipe)


def without_folders(value: Any) -> Any:
    """Return settings with only the name of each path in them: where files lie is nobody else's business."""
    if isinstance(value, Path):
        return Path(value.name)
    if isinstance(value, tuple):
        return tuple(map(without_folders, value))
    if isinstance(value, Mapping):
        return {name: without_folders(one) for name, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.init}
        changed = {name: without_folders(one) for name, one in own.items()}
        return dataclasses.replace(value, **changed) if changed != own else value
    return value


def stored(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a safetensors file. Raises InputError where it is none."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from error


def _config(trained: Trained, settings: BackboneConfig) -> dict[str, Any]:
    return {
        "library_name": LIBRARY,
        "library_version": version("synchromesh"),
        "architectures": [type(trained.model).__name__],
        "task": encode(without_folders(trained.task)),
        "model": encode(settings),
        "facts": dict(trained.facts),
    }


def _read_config(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_CONFIG:
            raise InputError(f"{file} has {file.stat().st_size:,} bytes, wanted at most {MOST_CONFIG:,}")
        found = parsed_json(file.read_bytes(), file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict) or found.get("library_name") != LIBRARY:
        raise InputError(f"{file} is not of a model of this library: wanted library_name {LIBRARY!r} in it")
    missing = [name for name in ("task", "model", "facts") if name not in found]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}")
    return found


def _check_same(given: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    said = [f"{name} is missing" for name in wanted if name not in given]
    said += [f"the model has no {name}" for name in given if name not in wanted]
    said += [f"{name} has shape {given[name]}, wanted {wanted[name]}" for name in wanted
             if name in given and given[name] != wanted[name]]  # fmt: skip
    if said:
        more = f" and {len(said) - 3} more" if len(said) > 3 else ""
        raise InputError(f"the weights in {folder} do not fit its {CONFIG}: {'; '.join(said[:3])}{more}")


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from error
