"""What training starts from: weights of another run, of this task or another, and what of them stays frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from synchromesh.adapt.adaptation import merge_all
from synchromesh.compat.unpickle import BROKEN, load_plain
from synchromesh.errors import InputError
from synchromesh.moe.layer import MoE
from synchromesh.training.catalog import Catalog
from synchromesh.training.checkpoint import STATE
from synchromesh.training.config import Freeze
from synchromesh.training.run_folder import load_trained

BACKBONE = "backbone."

LEAST_TAKEN = 0.5  # of the backbone's numbers, from weights of which only a part fits
NAMED = 3  # tensors, in an error about many


@dataclass(frozen=True)
class Loaded:
    """How much of a model came from a file; names of parameters and buffers.

    Attributes:
        taken: how many were taken.
        fresh: those that keep their random start, for want of one of the same shape.
        unused: those of the file that the model has not.
    """

    taken: int
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def load_weights(
    model: nn.Module, path: Path, catalog: Catalog, *, partial: bool = False, frozen: Freeze = Freeze.NOTHING
) -> Loaded:
    """Copy every tensor of the same name and shape into the model; others, such as a new head, stay random.

    Args:
        model: with its backbone in `backbone`.
        path: as for `Start`; names may lack their "backbone.".
        catalog: for reading the folder of a run.
        partial: accept a backbone of which only a part is there, half of its numbers at least.
        frozen: what will not be trained, and so must all be there.

    Raises:
        InputError: the file cannot be read, nothing in it fits, or a part of the backbone is missing.
    """
    fits, loaded = _fitting(model, path, catalog, partial, frozen)
    model.load_state_dict(fits, strict=False)
    return loaded


def check_weights(
    model: nn.Module, path: Path, catalog: Catalog, *, partial: bool = False, frozen: Freeze = Freeze.NOTHING
) -> None:
    """Raise InputError where `load_weights` would; the model may be on the meta device."""
    _fitting(model, path, catalog, partial, frozen)


def _fitting(
    model: nn.Module, path: Path, catalog: Catalog, partial: bool, frozen: Freeze
) -> tuple[dict[str, Tensor], Loaded]:
    """Return the tensors of a file that fit a model, in its shapes, and how much of it they are."""
    given, own = _read(path, catalog), model.state_dict()
    if not any(name.startswith(BACKBONE) for name in given):
        given = {f"{BACKBONE}{name}" if f"{BACKBONE}{name}" in own else name: t for name, t in given.items()}
    fits = {name: t.view(own[name].shape) for name, t in given.items() if name in own and _fits(t, own[name])}
    if not fits:
        raise InputError(f"no tensor of {path} fits the model: it names {_some(given)}, wanted such as {_some(own)}")
    fresh = tuple(name for name in own if name not in fits)
    optional = getattr(model.get_submodule("backbone"), "optional", frozenset()) if hasattr(model, "backbone") else ()
    missing = [n for n in fresh if n.startswith(BACKBONE) and n.removeprefix(BACKBONE) not in optional]
    if missing:
        wrong = {name: given[name] for name in missing if name in given}
        why = f" ({_some(wrong)} are there in another shape)" if wrong else ""
        lacks = (
            f"{path} lacks {len(missing)} of the backbone's {sum(n.startswith(BACKBONE) for n in own)} tensors: "
            f"{_some({name: own[name] for name in missing})}{why}"
        )
        _check_enough(lacks, own, missing, _names_of(model, frozen), partial)
    return fits, Loaded(len(fits), fresh, tuple(n for n in given if n not in own))


def _check_enough(
    lacks: str, own: dict[str, Tensor], missing: list[str], frozen: frozenset[str], partial: bool
) -> None:
    """Raise InputError where more is missing than training can make good."""
    if not partial:
        raise InputError(
            f"{lacks}; give weights of the same backbone, or keep the random start of these with --start.partial"
        )
    still = frozen.intersection(missing)
    if still:
        raise InputError(f"{lacks}; {len(still)} of them would stay random and frozen: give them, or freeze less")
    whole = sum(tensor.numel() for name, tensor in own.items() if name.startswith(BACKBONE))
    taken = 1 - sum(own[name].numel() for name in missing) / max(1, whole)
    if taken < LEAST_TAKEN:
        raise InputError(
            f"{lacks}; there are {taken:.1%} of the backbone's {whole:,} numbers, wanted {LEAST_TAKEN:.0%} at least: "
            "give weights of the same backbone, or start without any"
        )


def _names_of(model: nn.Module, frozen: Freeze) -> frozenset[str]:
    """Return the names of the tensors that are not trained."""
    still = set(frozen_modules(model, frozen))
    inside = [f"{name}." for name, module in model.named_modules() if module in still]
    return frozenset(name for name in model.state_dict() if name.startswith(tuple(inside)))


def _fits(given: Tensor, own: Tensor) -> bool:
    """Tell whether shapes agree; a checkpoint keeps experts as [E * F, ...]."""
    return given.shape == own.shape or (own.ndim > 1 and given.shape == own.flatten(0, 1).shape)


def freeze(model: nn.Module, what: Freeze) -> None:
    """Switch off the gradients of what is not trained. `still` keeps it in evaluation mode."""
    for module in frozen_modules(model, what):
        module.requires_grad_(False)


def still(model: nn.Module, what: Freeze) -> None:
    """Put what is frozen into evaluation mode: no dropout, noise or losses. Call it after `model.train()`."""
    for module in frozen_modules(model, what):
        module.eval()


def frozen_modules(model: nn.Module, what: Freeze) -> list[nn.Module]:
    """Return the modules that stay as they are.

    Raises:
        InputError: the model has none such.
    """
    if what is Freeze.NOTHING:
        return []
    if what is Freeze.MOE:
        found: list[nn.Module] = [m for m in model.modules() if isinstance(m, MoE)]
    else:
        found = [child for name, child in model.named_children() if name == "backbone"]
    if not found or (what is Freeze.BACKBONE and len(list(model.children())) == 1):
        raise InputError(f"freezing {what.value!r} finds nothing to freeze, or no head to train, in this model")
    return found


def _read(path: Path, catalog: Catalog) -> dict[str, Tensor]:
    if path.is_dir():
        if (path / STATE).is_file() or (path / "checkpoints").is_dir():
            model = load_trained(path, catalog).model
            merge_all(model)  # of an adapted run, the plain model
            return model.state_dict()
        raise InputError(f"{path} is neither the folder of a run nor a checkpoint")
    if not path.is_file():
        made = f": make it first, by `synchromesh train {path.name} --run {path}`"
        raise InputError(f"the weights {path} do not exist{made if path.name in catalog.recipes else ''}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a whole safetensors file: {error}") from error
    return _read_torch(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = load_plain(path)
    except (*BROKEN, ImportError) as error:
        raise InputError(
            f"{path} is damaged, or holds other objects than tensors and containers: convert it where you trust it, "
            "or, if the released Swin-MoE wrote it, with `synchromesh convert --from-swin`"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise InputError(f"{path} does not hold a dictionary of tensors")
    return loaded


def _some(state: dict[str, Tensor]) -> str:
    """Name the first tensors, and how many more there are."""
    named = [f"{name} {tuple(tensor.shape)}" for name, tensor in list(state.items())[:NAMED]]
    more = [f"and {len(state) - NAMED} more"] if len(state) > NAMED else []
    return ", ".join(named + more)
