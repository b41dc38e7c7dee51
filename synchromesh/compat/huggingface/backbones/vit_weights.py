"""The tensors of a transformers ViT under our names, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from synchromesh.compat.rename import rename

_RENAMED = (  # transformers, ours; ^ is the beginning of a key
    ("^vit.layernorm.", "^backbone.norm."),
    ("^layernorm.", "^norm."),
    ("^vit.", "^backbone."),
    ("^classifier.", "^head."),
    ("^decoder.0.", "^decoder."),
    ("embeddings.cls_token", "embed.class_token"),
    ("embeddings.mask_token", "embed.mask_token"),
    ("embeddings.position_embeddings", "embed.positions"),
    ("embeddings.patch_embeddings.projection.", "embed.proj."),
    ("layers.", "blocks."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.o_proj.", ".attention.proj."),
    (".mlp.fc1.", ".ffn.up."),
    (".mlp.fc2.", ".ffn.down."),
)
_JOINED = ("q_proj", "k_proj", "v_proj")
_VECTORS = ("class_token", "mask_token")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers ViT to ours; join weights and biases of query, key and value.

    The model may stand alone, or with a classifier or SimMIM's decoder; the pooler of one that stands alone is left
    out. The map is linear, so it maps gradients as well as weights.
    """
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, found, name = key.rpartition(".attention.")
        part, _, kind = name.partition(".")
        if key.removeprefix("vit.").startswith("pooler."):
            continue
        if found and part in _JOINED:
            if part == "q_proj":
                joined = torch.cat([state[f"{stem}.attention.{each}.{kind}"] for each in _JOINED])
                ours[rename(stem + ".", _RENAMED) + f"attention.qkv.{kind}"] = joined
            continue
        name = rename(key, _RENAMED)
        shaped = tensor.view(-1) if name.endswith(_VECTORS) else tensor
        ours[name] = shaped[0] if name.endswith("embed.positions") else shaped
    return ours


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_transformers`.

    Raises:
        ValueError: a tensor that a transformers ViT has no place for: experts.
    """
    back = tuple((ours, theirs) for theirs, ours in _RENAMED)
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, _, name = key.rpartition(".attention.qkv.")
        if ".experts." in key or ".router." in key:
            raise ValueError(f"transformers' ViT has no place for {key}: only a dense ViT maps to it")
        if stem:
            inner = rename(stem + ".", back) + "attention."
            theirs |= {f"{inner}{part}.{name}": piece for part, piece in zip(_JOINED, tensor.chunk(3), strict=True)}
            continue
        shaped = tensor.view(1, 1, -1) if key.endswith(_VECTORS) else tensor
        theirs[rename(key, back)] = shaped[None] if key.endswith("embed.positions") else shaped
    return theirs
