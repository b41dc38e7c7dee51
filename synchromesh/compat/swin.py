"""Swin-MoE checkpoints as Microsoft's training script writes them, to and from a `Classifier` on a `SwinV2`.

Files, for a run on W ranks that is named NAME.pth:

    NAME.pth.rank0 ... NAME.pth.rank{W-1}    the experts of each rank; or everything, while training
    NAME.pth.master                          what ranks share, beside files of experts only
    NAME.pth.global                          everything, of a model without experts or a run of one rank

Each is torch.save of {"model": state, ...}. Names in the state, i a stage and j a block:

    patch_embed.{proj,norm}.*   layers.{i}.downsample.{norm,reduction}.*   norm.*   head.*
    layers.{i}.blocks.{j}.{norm1,norm2}.*   .attn.{qkv,proj}.*   .attn.cpb_mlp.{0,2}.*   .mlp.{fc1,fc2}.*
    .attn.{logit_scale,q_bias,v_bias}       of the true SwinV2 only
    .mlp._moe_layer.gates.0.wg.weight       or of a cosine router .temperature .sim_matrix [dim E] .cosine_projector.*
    .mlp._moe_layer.experts.batched_{fc1_w,fc2_w,fc1_bias,fc2_bias}  [L F/S D], [L F/S D], [L F/S], [L ceil(D/S)]
    .mlp._moe_layer._num_global_experts     absent in files of old Tutel, whose biases are [L 1 F/S], [L 1 ceil(D/S)]

L experts on a rank, S ranks that share one. A frozen output bias counts as shared, so that only rank 0's is stored.
Ranks hold experts in the order of ours, hence a rank's part is ours. `relative_position_index`, `relative_coords_table`
and `attn_mask` follow from the sizes and are neither read nor written: another window needs nothing but
`SwinV2Config(window_size=..., pretrained_window_sizes=...)`.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from synchromesh.compat.rename import rename
from synchromesh.compat.swin_classes import read_classes as read_classes
from synchromesh.compat.swin_names import BACK, COUNT, DERIVED, RENAMED, check_known, turned
from synchromesh.compat.unpickle import STORAGES, load_inert
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.swin_v2 import SwinV2
from synchromesh.moe.experts import Experts
from synchromesh.moe.places import PlacedRouter


@dataclass(frozen=True)
class _Stored:
    """A checkpoint under our names.

    Attributes:
        pieces: of each tensor of experts, those of the ranks, each seen as rows of E * F (or of E * D numbers).
        experts: of each such tensor, E.
    """

    shared: dict[str, Tensor]
    pieces: dict[str, list[Tensor]]
    experts: dict[str, int]

    def part(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Return one of `count` equal cuts through all rows of a tensor of experts, and read no others."""
        size = sum(len(piece) for piece in self.pieces[name]) // count
        found, at = [], index * size
        for piece in self.pieces[name]:
            found.append(piece[max(0, at) : max(0, at + size)])
            at -= len(piece)
        return torch.cat(found)


def read_swin(path: Path) -> dict[str, Tensor]:
    """Return a whole checkpoint under the names and shapes of our state dict; any number of ranks may have written it.

    The experts' output bias is left out where it is zero and no feed-forward has one.

    Args:
        path: NAME.pth, of files that lie beside it; or one file that holds everything. No code in them is run.

    Raises:
        ValueError: a file is missing or damaged, or holds a tensor that these models do not have.
    """
    stored = _read(path)
    whole = {name: stored.part(name).unflatten(0, (stored.experts[name], -1)) for name in stored.pieces}
    if not any(name.endswith(".ffn.down.bias") for name in stored.shared):
        whole = {name: t for name, t in whole.items() if not name.endswith(".down_bias") or t.any()}
    return stored.shared | whole


def load_swin(model: Classifier, path: Path, *, classes: Sequence[int] | None = None) -> None:
    """Load a checkpoint of any number of ranks into a model on any other number.

    Args:
        model: whole, or with its experts spread over ranks; then this rank reads of them what it holds.
        path: as for `read_swin`.
        classes: of each class of the model, its row in the stored head (`read_classes`). Without them, a head for
            another number of classes starts at zero, with a warning.

    Raises:
        ValueError: as `read_swin`; or file and model differ in their tensors. The model is unchanged then.
    """
    stored, whole = _read(path), model.state_dict()
    own = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in whole.items()}
    given = dict(stored.shared)
    _fit_head(given, own, classes, path)
    experts = dict(_experts(model))
    for name in stored.pieces:
        if name in experts:
            cut = experts[name].cut
            part = stored.part(name, cut.index, cut.count)
            given[name] = part.view(own[name].shape) if part.numel() == own[name].numel() else part
        elif not name.endswith(".down_bias") or stored.part(name).any():
            given[name] = stored.part(name)  # what the model has no place for is refused
    _check_fit(given, own, path)
    model.load_state_dict({name: _as_part_of(whole[name], tensor) for name, tensor in given.items()})


def save_swin(model: nn.Module, path: Path, *, ranks: int | None = None, everything: bool = False) -> list[Path]:
    """Write a checkpoint as the release does, for its own loader on `ranks` ranks; return the files written.

    Args:
        model: a `Classifier` on a `SwinV2`: whole, and all files are written; or with its experts spread over ranks,
            and each writes its own.
        path: NAME.pth.
        ranks: 1 of a whole model if not given; else the ranks that it is spread over.
        everything: whether files of ranks hold what is shared too, instead of NAME.pth.master.

    Raises:
        ValueError: a file is there already, experts cannot be cut so, or the release has no place for a tensor, for
            such a router, or for such a model.
    """
    if not isinstance(model, Classifier) or not isinstance(model.backbone, SwinV2):
        inside = type(getattr(model, "backbone", model)).__name__
        raise ValueError(
            f"got a {type(model).__name__} on {inside}, wanted a Classifier on SwinV2, which the release has"
        )
    for name, module in model.named_modules():
        if isinstance(module, PlacedRouter):
            raise ValueError(
                f"{name} sees the places of tokens, which routers of the release do not, wanted places=0: keep this "
                "model as safetensors"
            )
    files = {Path(f"{path}.{end}"): state for end, state in _files(model, ranks, everything=everything)}
    there = [file for file in files if file.exists()]
    if there:
        raise ValueError(f"{there[0]} exists: remove it, or name another file")
    for file, state in files.items():
        aside = file.with_name(file.name + ".part")
        torch.save({"model": state}, aside)
        aside.rename(file)
    return list(files)


# reading


def _read(path: Path) -> _Stored:
    states, common = _states(path)
    keys = {key: None for state in (*states, common) for key in state}  # in the order of the files
    shared: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {}
    whole = ChainMap(common, *states)
    counts = {key.removesuffix(COUNT): _count(key, whole[key], path) for key in keys if key.endswith(COUNT)}
    for key in keys:
        name = rename(key, RENAMED)
        if key.endswith((*DERIVED, COUNT)):
            continue
        check_known(key, name, path)
        if ".ffn.experts." in name:
            found[name] = [state[key] for state in states if key in state] or [common[key]]
        else:
            shared[name] = turned(name, whole[key])
    experts = {name: _num_experts(name, shared, counts, path) for name in found}
    pieces = {name: _rows(name, found, experts[name], len(states), path) for name in found}
    return _Stored(shared, pieces, experts)


def _states(path: Path) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return what each rank wrote, and what is common to them."""
    path = path.with_suffix("") if re.fullmatch(r"\.(rank\d+|master)", path.suffix) else path
    if path.is_file():
        return [_state(path)], {}
    numbers = {int(file.suffix[5:]) for file in path.parent.glob(f"{path.name}.rank*") if file.suffix[5:].isdecimal()}
    shared, everything = Path(f"{path}.master"), Path(f"{path}.global")
    if not numbers and everything.is_file():
        return [_state(everything)], {}
    missing = set(range(max(numbers, default=0) + 1)) - numbers
    if missing:
        raise ValueError(f"{path}.rank{min(missing)} is missing: wanted the files of all ranks, {path} or {everything}")
    return [_state(Path(f"{path}.rank{rank}")) for rank in sorted(numbers)], _state(shared) if shared.is_file() else {}


def _state(file: Path) -> dict[str, Tensor]:
    found = load_inert(file)
    state = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file} holds no state dict, alone or under the key 'model'")
    for key, value in state.items():
        if not isinstance(key, str):
            raise ValueError(f"{file} has the key {reprlib.repr(key)} in its state dict, wanted names of tensors")
        if not _is_plain(value):
            origin = getattr(value, "origin", type(value).__name__)
            got = f"{value.layout} tensor of {value.dtype}" if isinstance(value, Tensor) else origin
            raise ValueError(
                f"{file} holds no state dict of plain tensors: got {got} for {key!r}, wanted a dense tensor of "
                "real numbers; save it as one where the file is trusted"
            )
    return dict(state)


def _is_plain(value: object) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and isinstance(value, Tensor)
        and (value.layout, value.device.type, value.is_nested) == (torch.strided, "cpu", False)
        and value.dtype in STORAGES.values()
    )


def _count(key: str, tensor: Tensor, path: Path) -> int:
    try:
        return int(tensor)
    except (RuntimeError, ValueError, OverflowError) as error:  # several numbers, or none; NaN; infinity
        shape = tuple(tensor.shape)
        raise ValueError(f"{path}: {key!r} is no number of experts: shape {shape}, wanted one whole number") from error


def _num_experts(name: str, shared: Mapping[str, Tensor], counts: Mapping[str, int], path: Path) -> int:
    block = name.partition(".ffn.")[0]
    gate = next(
        (shared[key] for end in ("weight", "directions") if (key := f"{block}.ffn.router.{end}") in shared), None
    )
    if gate is None:
        raise ValueError(f"{path} holds experts of {block} and no router: wanted {path.name}.master beside the ranks'")
    if gate.dim() != 2 or not len(gate):
        raise ValueError(f"{path}: the router of {block} has shape {tuple(gate.shape)}, wanted a row for each expert")
    said = counts.get(rename(block + ".", BACK)[:-1], len(gate))
    if said != len(gate):
        raise ValueError(f"{path} says that {block} has {said} experts, its router has {len(gate)}")
    return len(gate)


def _rows(name: str, found: Mapping[str, list[Tensor]], experts: int, ranks: int, path: Path) -> list[Tensor]:
    """See the pieces of all ranks as rows; old Tutel's biases have a dim more."""
    bias = name.endswith("_bias")
    pieces = [piece.squeeze(1) if bias and piece.dim() == 3 else piece for piece in found[name]]
    output = name.endswith(".down_bias")
    matrix = found.get(name.removesuffix("_bias"), [])
    if not matrix or matrix[0].dim() != 3:
        got = f"of shape {tuple(matrix[0].shape)}" if matrix else "missing"
        raise ValueError(f"{path}: {name.removesuffix('_bias')} is {got}, wanted [experts, hidden, width]")
    if pieces[0].dim() != 3 - bias or len({piece.shape[1:] for piece in pieces}) > 1:
        got = sorted({tuple(piece.shape) for piece in pieces})
        raise ValueError(f"{path}: {name} has parts of shapes {got}, wanted {3 - bias} dims, equal beyond the first")
    width = matrix[0].shape[2]
    if output and len(pieces) < ranks and not pieces[0].any():  # frozen, and so one rank's part of it is stored
        return [pieces[0].new_zeros(experts * width)]
    held, wanted = sum(len(piece) for piece in pieces), max(experts, ranks)  # a rank holds at least a part of one
    if held != wanted or wanted % experts:
        raise ValueError(f"{path} holds {held} parts of {name} on {ranks} ranks, wanted {wanted} of {experts} experts")
    if output:  # its parts are padded to equal length
        return [torch.cat(pieces).view(experts, -1)[:, :width].flatten()]
    return [piece.flatten(0, 1) for piece in pieces]


# loading


def _experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Name each tensor of experts."""
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            for name in module.parts():
                yield f"{prefix}.{name}", module


def _fit_head(given: dict[str, Tensor], own: Mapping[str, Tensor], classes: Sequence[int] | None, path: Path) -> None:
    heads = [name for name in ("head.weight", "head.bias") if name in own and name in given and given[name].dim()]
    for name in heads:
        if classes is not None:
            if len(classes) != len(own[name]) or not all(0 <= row < len(given[name]) for row in classes):
                raise ValueError(
                    f"got {len(classes)} classes, up to {max(classes, default=-1)}; wanted one for each of the model's "
                    f"{len(own[name])}, below the {len(given[name])} of {path}"
                )
            given[name] = given[name][torch.tensor(classes)]
        elif len(given[name]) != len(own[name]):
            if name == heads[0]:
                warnings.warn(
                    f"{path} holds a head of {len(given[name])} classes, this model has {len(own[name])}: its head "
                    "starts at zero; give `classes` to take rows of the old one",
                    stacklevel=3,
                )
            given[name] = torch.zeros_like(own[name])


def _as_part_of(whole: Tensor, part: Tensor) -> Tensor:
    if not isinstance(whole, DTensor):
        return part
    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(part, whole.device_mesh, whole.placements, shape=shape, stride=stride)


def _check_fit(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    said = [f"{name} is missing" for name in own if name not in given]
    said += [f"the model has no {name}" for name in given if name not in own]
    for name in own:
        if name in given and given[name].shape != own[name].shape:
            said.append(f"{name} has shape {tuple(given[name].shape)}, wanted {tuple(own[name].shape)}")
    if said:
        more = f" and {len(said) - 3} more" if len(said) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(said[:3])}{more}")


# writing


def _files(model: Classifier, ranks: int | None, *, everything: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the ends of file names, and what goes into them."""
    experts = dict(_experts(model))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    parts = {name: state[name] for name in experts}
    state |= {name: part.to_local() if isinstance(part, DTensor) else part for name, part in parts.items()}
    cut = next((module.cut for module in experts.values()), None)
    if cut is None:
        yield "global", _theirs(state)
        return
    world = ranks or cut.count
    if cut.count not in (1, world):
        raise ValueError(f"got ranks={ranks} of a model spread over {cut.count}: leave it away, or gather the model")
    common = _theirs({name: tensor for name, tensor in state.items() if name not in experts})
    biased = any(name.endswith(".down_bias") for name in experts)
    for name, module in experts.items():
        layer = rename(name, BACK).partition("experts.")[0]
        common[f"{layer}_num_global_experts"] = torch.tensor(module.num_experts)
        if not biased and module.width is not None:
            frozen = torch.zeros(module.num_experts, module.width)
            common[f"{layer}experts.batched_fc2_bias"] = _piece(frozen, module.num_experts, 0, world)
    for rank in range(world) if cut.count == 1 else (cut.index,):
        own = {name: state[name] for name in experts}
        if cut.count == 1:
            own = {name: _piece(tensor, experts[name].num_experts, rank, world) for name, tensor in own.items()}
        yield f"rank{rank}", _theirs(own) | common if everything else _theirs(own)
    if not everything and cut.index == 0:
        yield "master", common


def _piece(whole: Tensor, experts: int, rank: int, world: int) -> Tensor:
    """Return the part of [E, F, ...] that a rank holds."""
    if experts % world and world % experts:
        raise ValueError(f"got {experts} experts to write for {world} ranks, wanted one number to divide the other")
    shards = max(1, world // experts)
    if whole.dim() == 2:  # of biases, the last part is padded
        whole = F.pad(whole, (0, -whole.shape[1] % shards))
    if whole.shape[1] % shards:
        raise ValueError(f"got hidden width {whole.shape[1]} to cut into {shards} parts of an expert")
    return whole.flatten(0, 1).chunk(world)[rank].unflatten(0, (max(1, experts // world), -1)).clone()


def _theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if isinstance(tensor, DTensor):
            raise ValueError(f"{name} is spread over ranks by FSDP: gather the model, or load it on one rank")
        check_known(name, name, Path("the model"))
    return {rename(name, BACK): turned(name, tensor).contiguous() for name, tensor in state.items()}
