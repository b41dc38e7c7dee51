"""Names of the tensors of Microsoft's Swin-MoE and true SwinV2 (compat/swin.py lists them), theirs and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from synchromesh.compat.rename import rename

RENAMED = (  # theirs, ours, the longer names first; ^ is the beginning of a key
    ("^patch_embed.", "^backbone.embed."),
    ("^layers.", "^backbone.stages."),
    ("^norm.", "^backbone.norm."),
    (".downsample.", ".merge."),
    (".attn.cpb_mlp.", ".attention.position_bias.mlp."),
    (".attn.logit_scale", ".attention.kernel.log_scale"),
    (".attn.", ".attention."),
    (".mlp.fc1.", ".ffn.up."),
    (".mlp.fc2.", ".ffn.down."),
    (".mlp._moe_layer.gates.0.cosine_projector.", ".ffn.router.projector."),
    (".mlp._moe_layer.gates.0.sim_matrix", ".ffn.router.directions"),
    (".mlp._moe_layer.gates.0.temperature", ".ffn.router.log_scale"),
    (".mlp._moe_layer.gates.0.wg.", ".ffn.router."),
    (".mlp._moe_layer.experts.batched_fc1_bias", ".ffn.experts.up_bias"),
    (".mlp._moe_layer.experts.batched_fc1_w", ".ffn.experts.up"),
    (".mlp._moe_layer.experts.batched_fc2_bias", ".ffn.experts.down_bias"),
    (".mlp._moe_layer.experts.batched_fc2_w", ".ffn.experts.down"),
)
BACK = tuple((ours, theirs) for theirs, ours in RENAMED)
_KNOWN = re.compile(
    r"backbone|embed|stages|blocks|merge|reduction|norm[12]?|attention|qkv|proj|[qv]_bias|kernel|position_bias|mlp|ffn"
    r"|router|projector|directions|log_scale|experts|(up|down)(_bias)?|head|weight|bias|\d+"
)
DERIVED = ("relative_position_index", "relative_coords_table", "attn_mask")
COUNT = ".mlp._moe_layer._num_global_experts"


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a whole released model to those of a `Classifier`; what follows from the sizes is left out.

    Raises:
        ValueError: a tensor that these models do not have.
    """
    found = {}
    for key, tensor in state.items():
        if not key.endswith((*DERIVED, COUNT)):
            name = rename(key, RENAMED)
            check_known(key, name, Path("the state"))
            found[name] = turned(name, tensor)
    return found


def check_known(key: str, name: str, path: Path) -> None:
    """Raise ValueError, with the file, for a tensor that no model here has; `name` is ours for their `key`."""
    if not all(_KNOWN.fullmatch(part) for part in name.split(".")):
        why = ": tables of positions are the first Swin's" if "_bias_table" in key or "_pos_embed" in key else ""
        raise ValueError(f"{path}: Swin-MoE has no tensor {key!r}{why}")


def turned(name: str, tensor: Tensor) -> Tensor:
    """Bring a cosine router's tensors into our shapes, or back."""
    if name.endswith(".router.directions") and tensor.dim() == 2:
        return tensor.t()
    scale = name.endswith(".router.log_scale") and tensor.numel() == 1
    return tensor.view(() if tensor.dim() else (1,)) if scale else tensor
