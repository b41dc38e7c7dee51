"""The tensors of transformers' Pvt and PvtV2 under our names, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from synchromesh.compat.rename import rename

_BLOCK = (  # of both versions: transformers, ours; ^ is the beginning of a key
    ("^classifier.", "^head."),
    (".layer_norm_1.", ".norm1."),
    (".layer_norm_2.", ".norm2."),
    (".mlp.dense1.", ".ffn.up."),
    (".mlp.dense2.", ".ffn.down."),
)
_V1 = (
    *_BLOCK,
    ("^pvt.", "^backbone."),
    ("encoder.block.", "stages."),
    (".attention.self.query.", ".mixer.q."),
    (".attention.self.key.", ".mixer.k."),
    (".attention.self.value.", ".mixer.v."),
    (".attention.self.sequence_reduction.", ".mixer.reduce."),
    (".attention.self.layer_norm.", ".mixer.norm."),
    (".attention.output.dense.", ".mixer.proj."),
    ("encoder.layer_norm.", "norm."),
)
_V2 = (
    *_BLOCK,
    ("^pvt_v2.", "^backbone."),
    (".attention.query.", ".mixer.q."),
    (".attention.key.", ".mixer.k."),
    (".attention.value.", ".mixer.v."),
    (".attention.spatial_reduction.", ".mixer.reduce."),
    (".attention.layer_norm.", ".mixer.norm."),
    (".attention.proj.", ".mixer.proj."),
    (".mlp.dwconv.dwconv.", ".ffn.convolution."),
    ("encoder.layers.", "stages."),
)


def from_pvt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers Pvt (version 1) to ours; join those of key and value.

    The model may stand alone, or with a classifier. The map is linear, so it maps gradients as well as weights.
    """
    renamed: dict[str, Tensor] = {}
    last = _last(state, r"patch_embeddings\.(\d+)\.")
    for key, tensor in state.items():
        name = rename(key, _V1)
        found = re.fullmatch(r"(.*?)encoder\.patch_embeddings\.(\d+)\.(.*)", name)
        if found is None:
            renamed[_in_blocks(name)] = tensor
            continue
        stem, stage, part = found[1], int(found[2]), found[3]
        place = f"{stem}embed." if stage == 0 else f"{stem}stages.{stage - 1}.merge."
        if part == "cls_token":
            renamed[f"{stem}stages.{stage}.class_token"] = tensor.view(-1)
        elif part == "position_embeddings":
            if stage == last:
                renamed[f"{stem}stages.{stage}.class_position"] = tensor[0, 0]
            patches = tensor[0, int(stage == last) :]
            renamed[f"{place}place.positions"] = patches.unflatten(0, (math.isqrt(len(patches)), -1))
        else:
            renamed[place + part.replace("projection.", "proj.").replace("layer_norm.", "norm.")] = tensor
    return _joined(renamed)


def to_pvt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_pvt`. Raises ValueError for a tensor that a transformers Pvt has no place for: experts."""
    theirs: dict[str, Tensor] = {}
    for key, tensor in _apart(state).items():
        found = re.fullmatch(r"(.*?)(?:embed|stages\.(\d+)\.merge)\.(place\.positions|proj\..*|norm\..*)", key)
        own = re.fullmatch(r"(.*?)stages\.(\d+)\.(class_token|class_position)", key)
        if own is not None:
            stem, stage, part = rename(own[1], _back(_V1)), own[2], own[3]
            if part == "class_token":
                theirs[f"{stem}encoder.patch_embeddings.{stage}.cls_token"] = tensor.view(1, 1, -1)
            continue
        if found is None:
            name = re.sub(r"^(backbone\.)?norm\.", r"\1encoder.layer_norm.", key)
            name = re.sub(r"stages\.(\d+)\.blocks\.", r"encoder.block.\1.", name)
            theirs[rename(name, _back(_V1[:-1]))] = tensor
            continue
        stem, stage, part = rename(found[1], _back(_V1)), int(found[2] or -1) + 1, found[3]
        place = f"{stem}encoder.patch_embeddings.{stage}."
        if part == "place.positions":
            first = state.get(f"{found[1]}stages.{stage}.class_position")
            patches = tensor.flatten(0, 1)
            whole = patches if first is None else torch.cat((first[None], patches))
            theirs[f"{place}position_embeddings"] = whole[None]
        else:
            theirs[place + part.replace("proj.", "projection.").replace("norm.", "layer_norm.")] = tensor
    return theirs


def from_pvt_v2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers PvtV2 to ours; join those of key and value. Otherwise as `from_pvt`."""
    renamed: dict[str, Tensor] = {}
    last = _last(state, r"encoder\.layers\.(\d+)\.")
    for key, tensor in state.items():
        name = rename(key, _V2)
        found = re.fullmatch(
            r"(.*?)stages\.(\d+)\.(patch_embedding\.proj|patch_embedding\.layer_norm|layer_norm)\.(.*)", name
        )
        if found is None:
            renamed[name] = tensor
            continue
        stem, stage, part, kind = found[1], int(found[2]), found[3], found[4]
        if part == "layer_norm":
            renamed[f"{stem}norm.{kind}" if stage == last else f"{stem}stages.{stage}.merge.before.{kind}"] = tensor
            continue
        place = f"{stem}embed." if stage == 0 else f"{stem}stages.{stage - 1}.merge."
        renamed[f"{place}{'proj' if part.endswith('proj') else 'norm'}.{kind}"] = tensor
    return _joined(renamed)


def to_pvt_v2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_pvt_v2`. Raises ValueError for a tensor that a transformers PvtV2 has no place for: experts."""
    theirs: dict[str, Tensor] = {}
    last = _last(state, r"stages\.(\d+)\.")
    for key, tensor in _apart(state).items():
        found = re.fullmatch(r"(.*?)(?:embed|stages\.(\d+)\.merge)\.(before|proj|norm)\.(.*)", key)
        final = re.fullmatch(r"(backbone\.)?norm\.(.*)", key)
        if final is not None:
            theirs[f"{rename(final[1] or '', _back(_V2))}encoder.layers.{last}.layer_norm.{final[2]}"] = tensor
        elif found is None:
            theirs[rename(key, _back(_V2))] = tensor
        else:
            stem, stage, part, kind = rename(found[1], _back(_V2)), int(found[2] or -1), found[3], found[4]
            own = {"before": "layer_norm", "proj": "patch_embedding.proj", "norm": "patch_embedding.layer_norm"}[part]
            theirs[f"{stem}encoder.layers.{stage + (part != 'before')}.{own}.{kind}"] = tensor
    return theirs


def _back(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((ours, theirs) for theirs, ours in pairs)


def _last(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return the largest number that a pattern finds in the names."""
    return max((int(found[1]) for key in state if (found := re.search(pattern, key))), default=-1)


def _in_blocks(name: str) -> str:
    """Put the word between the number of a stage and that of a block of it."""
    return re.sub(r"stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", name)


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the rows of keys before those of values, in one tensor."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".mixer.k." in name:
            ours[name.replace(".k.", ".kv.")] = torch.cat((tensor, state[name.replace(".mixer.k.", ".mixer.v.")]))
        elif ".mixer.v." not in name:
            ours[name] = tensor
    return ours


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_joined`."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".experts." in name or ".router." in name:
            raise ValueError(f"transformers' Pvt has no place for {name}: only a dense PVT maps to it")
        if ".mixer.kv." in name:
            keys, values = tensor.chunk(2)
            found |= {name.replace(".kv.", ".k."): keys, name.replace(".kv.", ".v."): values}
        else:
            found[name] = tensor
    return found
