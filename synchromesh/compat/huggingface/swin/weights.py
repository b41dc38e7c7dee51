"""The tensors of a transformers Swinv2 under our names, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from synchromesh.compat.rename import rename

_RENAMED = (  # transformers, ours; ^ is the beginning of a key
    ("^swinv2.layernorm.", "^backbone.norm."),
    ("^layernorm.", "^norm."),
    ("^swinv2.", "^backbone."),
    ("^classifier.", "^head."),
    ("^decoder.0.", "^decoder."),
    ("embeddings.patch_embeddings.projection.", "embed.proj."),
    ("embeddings.norm.", "embed.norm."),
    ("embeddings.mask_token", "embed.mask_token"),
    ("encoder.layers.", "stages."),
    (".downsample.", ".merge."),
    (".attention.self.logit_scale", ".attention.kernel.log_scale"),
    (".attention.self.continuous_position_bias_mlp.", ".attention.position_bias.mlp."),
    (".attention.output.dense.", ".attention.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".ffn.up."),
    (".output.dense.", ".ffn.down."),
)
_JOINED = ("query", "key", "value")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers Swinv2 to ours; join query, key and value weights.

    The model may stand alone, or with a classifier or SimMIM's decoder.
    The map is linear, so it maps gradients as well as weights.
    """
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, found, name = key.rpartition(".attention.self.")
        part, _, kind = name.partition(".")
        if not found or part not in _JOINED:
            ours[rename(key, _RENAMED)] = tensor.view(-1) if key.endswith("mask_token") else tensor
        elif kind == "bias":
            ours[rename(stem, _RENAMED) + f".attention.{part[0]}_bias"] = tensor
        elif part == "query":
            joined = torch.cat([state[f"{stem}.attention.self.{each}.weight"] for each in _JOINED])
            ours[rename(stem, _RENAMED) + ".attention.qkv.weight"] = joined
    return ours


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_transformers`.

    Raises:
        ValueError: a tensor that a transformers Swinv2 has no place for (experts, key bias).
    """
    back = tuple((ours, theirs) for theirs, ours in _RENAMED)
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stem, _, name = key.rpartition(".attention.")
        inner = rename(stem, back) + ".attention.self."
        if name == "qkv.weight":
            theirs |= {f"{inner}{part}.weight": piece for part, piece in zip(_JOINED, tensor.chunk(3), strict=True)}
        elif name in ("q_bias", "v_bias"):
            theirs[f"{inner}{'query' if name == 'q_bias' else 'value'}.bias"] = tensor
        elif name == "qkv.bias" or ".experts." in key:
            raise ValueError(f"transformers' Swinv2 has no place for {key}: only the true, dense SwinV2 maps to it")
        else:
            theirs[rename(key, back)] = tensor.view(1, 1, -1) if key.endswith("mask_token") else tensor
    return theirs
