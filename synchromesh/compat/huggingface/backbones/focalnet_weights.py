"""The tensors of a transformers FocalNet under our names, and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from synchromesh.compat.rename import rename

_RENAMED = (  # transformers, ours; ^ is the beginning of a key
    ("^focalnet.layernorm.", "^backbone.norm."),
    ("^layernorm.", "^norm."),
    ("^focalnet.", "^backbone."),
    ("^classifier.", "^head."),
    ("^decoder.0.", "^decoder."),
    ("embeddings.patch_embeddings.projection.", "embed.proj."),
    ("embeddings.norm.", "embed.norm."),
    ("embeddings.mask_token", "embed.mask_token"),
    ("encoder.stages.", "stages."),
    (".layers.", ".blocks."),
    (".downsample.projection.", ".merge.proj."),
    (".downsample.norm.", ".merge.norm."),
    (".modulation.projection_in.", ".mixer.enter."),
    (".modulation.projection_context.", ".mixer.context."),
    (".modulation.projection_out.", ".mixer.proj."),
    (".modulation.layernorm.", ".mixer.norm."),
    (".modulation.focal_layers.", ".mixer.focal."),
    (".gamma_1", ".scale1.weight"),
    (".gamma_2", ".scale2.weight"),
    (".mlp.fc1.", ".ffn.up."),
    (".mlp.fc2.", ".ffn.down."),
)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers FocalNet to ours.

    The model may stand alone, or with a classifier or SimMIM's decoder. The map is linear, so it maps gradients as well
    as weights.
    """
    ours: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = rename(key, _RENAMED)
        stem, found, rest = name.rpartition(".mixer.focal.")
        name = f"{stem}{found}{rest.replace('.0.', '.')}" if found else name  # a convolution and its activation there
        shaped = tensor.flatten(1) if name.endswith(".mixer.context.weight") else tensor  # a convolution of 1 x 1 there
        ours[name] = shaped.view(-1) if name.endswith("mask_token") else shaped
    return ours


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_transformers`.

    Raises:
        ValueError: a tensor that a transformers FocalNet has no place for: experts.
    """
    back = tuple((ours, theirs) for theirs, ours in _RENAMED)
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".experts." in key or ".router." in key:
            raise ValueError(f"transformers' FocalNet has no place for {key}: only a dense FocalNet maps to it")
        stem, found, rest = key.rpartition(".mixer.focal.")
        name = rename(f"{stem}{found}{rest.replace('.weight', '.0.weight')}" if found else key, back)
        shaped = tensor[:, :, None, None] if key.endswith(".mixer.context.weight") else tensor
        theirs[name] = shaped.view(1, 1, -1) if key.endswith("mask_token") else shaped
    return theirs
