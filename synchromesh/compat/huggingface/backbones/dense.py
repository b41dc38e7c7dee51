"""Dense models of transformers as ours: the fields of their configurations under our names, and copies as experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from synchromesh.compat.huggingface.backbones import focalnet_weights, pvt_weights, vit_weights
from synchromesh.compat.huggingface.swin import weights as swin_weights


def dense_fields(dense: PreTrainedConfig, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of our configuration that a dense model's one describes.

    Args:
        dense: of transformers' ViT, FocalNet, Pvt or PvtV2.
        kinds: the `model_type`s that are wanted.

    Raises:
        ValueError: it is of another kind, or has a setting that ours have not.
    """
    if dense.model_type not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise ValueError(
            f"got a dense {dense.model_type!r}, "
            + (f"wanted {wanted}" if kinds else "and transformers has no dense model of this kind")
        )
    fixed, fields = _FIELDS[dense.model_type](dense)
    for name, wanted in {"hidden_act": "gelu", **fixed}.items():
        got = getattr(dense, name)
        if (list(got) if isinstance(got, tuple) else got) != wanted:
            raise ValueError(f"the dense {dense.model_type} has {name}={got!r}, wanted {wanted!r}")
    chosen = getattr(dense, "out_features", None)
    return {
        "in_channels": dense.num_channels,
        "dropout": float(dense.hidden_dropout_prob),
        "init_std": dense.initializer_range,
        **fields,
        **_labels(dense),
        **({} if chosen is None else {"out_features": list(chosen)}),
    }


def dense_state(dense: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a dense model under our names; of one that stands alone, those of a backbone."""
    state = _WEIGHTS[dense.config.model_type](dense.state_dict())
    whole = any(name.startswith("backbone.") for name in state)
    return {name if whole else f"backbone.{name}": tensor for name, tensor in state.items()}


def copies_of(own: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a dense model has for our tensors, in their shapes; each expert is a copy of its feed-forward.

    Routers, a head and the last norm may be missing.

    Raises:
        ValueError: the dense model lacks another tensor, has one of another shape, or computes more in the place of
            experts than they do.
    """
    found = {name: tensor for name in own if (tensor := _copied(name, dense)) is not None}
    left = [name for name in own if name not in found and ".router." not in name]
    left = [name for name in left if not name.startswith(("head.", "backbone.norm."))]
    if left:
        raise ValueError(f"the dense model has nothing for {left[:3]}")
    _check_replaced(own, dense)
    for name, tensor in found.items():
        wanted = own[name].shape[1:] if ".experts." in name else own[name].shape
        if tensor.shape != wanted:
            raise ValueError(f"{name} of the dense model has shape {tuple(tensor.shape)}, wanted {tuple(wanted)}")
    return {name: tensor.expand(own[name].shape) for name, tensor in found.items()}


def _copied(name: str, dense: Mapping[str, Tensor]) -> Tensor | None:
    """Return what a dense model has for one of our tensors; experts are seen as copies of its feed-forward."""
    block, _, part = name.partition(".experts.")
    if not part:
        return dense.get(name)
    stem, bias, _ = part.partition("_bias")
    tensor = dense.get(f"{block}.{stem}.{'bias' if bias else 'weight'}")
    if tensor is None:
        return None
    return tensor.t() if part == "down" else tensor


def _check_replaced(own: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a feed-forward that becomes experts has more in it than two linear layers."""
    blocks = {name.partition(".experts.")[0] for name in own if ".experts." in name}
    for name in dense:
        block, _, part = name.partition(".ffn.")
        if part and f"{block}.ffn" in blocks and part.partition(".")[0] not in ("up", "down"):
            raise ValueError(
                f"{name} stands between the layers of a feed-forward, and experts have no such: the first output would "
                "not be that of the dense model; choose other blocks by moe_blocks, or none, [[], ...]"
            )


def _labels(dense: Any) -> dict[str, Any]:
    """Return the classes by name; their number alone where that is another one, as Pvt's configuration allows."""
    named = len(dense.id2label or ()) == dense.num_labels
    own = {"id2label": dense.id2label, "label2id": dense.label2id} if named else {"num_labels": dense.num_labels}
    return {"problem_type": dense.problem_type, **own}


def _ratio(hidden: int, width: int) -> float:
    """Return what gives back the hidden width when it is multiplied by the width and rounded down."""
    return hidden / width if int(hidden / width * width) == hidden else (hidden + 0.5) / width


def _vit(dense: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {
        "image_size": dense.image_size,
        "patch_size": _side(dense),
        "width": dense.hidden_size,
        "depth": dense.num_hidden_layers,
        "num_heads": dense.num_attention_heads,
        "mlp_ratio": _ratio(dense.intermediate_size, dense.hidden_size),
        "qkv_bias": dense.qkv_bias,
        "attention_dropout": float(dense.attention_probs_dropout_prob),
        "norm_eps": dense.layer_norm_eps,
    }


def _focalnet(dense: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"layer_norm_eps": 1e-5}, {
        "image_size": dense.image_size,
        "patch_size": _side(dense),
        "embed_dim": dense.embed_dim,
        "depths": dense.depths,
        "focal_levels": dense.focal_levels,
        "focal_windows": dense.focal_windows,
        "mlp_ratio": float(dense.mlp_ratio),
        "conv_embed": dense.use_conv_embed,
        "post_norm": dense.use_post_layernorm,
        "modulator_norm": dense.use_post_layernorm_in_modulation,
        "mean_modulator": dense.normalize_modulator,
        "layer_scale": dense.layerscale_value if dense.use_layerscale else None,
        "drop_path": float(dense.drop_path_rate),
    }


def _pvt(dense: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what both versions have; patches of the later stages halve the map."""
    stages, sides = len(dense.depths), list(dense.strides)
    second = dense.model_type == "pvt_v2"
    fixed = {
        "num_encoder_blocks": stages,
        "strides": [sides[0], *[2] * (stages - 1)],
        "patch_sizes": [2 * side - 1 for side in sides] if second else sides,
    }
    version = "v1" if not second else "v2_linear" if dense.linear_attention else "v2"
    return fixed, {
        "version": version,
        "image_size": dense.image_size,
        "patch_size": sides[0],
        "widths": dense.hidden_sizes,
        "depths": dense.depths,
        "num_heads": dense.num_attention_heads,
        "reductions": dense.sr_ratios if second else dense.sequence_reduction_ratios,
        "mlp_ratios": [float(ratio) for ratio in dense.mlp_ratios],
        "qkv_bias": dense.qkv_bias,
        "attention_dropout": float(dense.attention_probs_dropout_prob),
        "drop_path": float(dense.drop_path_rate),
        "norm_eps": dense.layer_norm_eps,
    }


def _side(dense: Any) -> int:
    """Return the side of a patch. Raises ValueError where patches are no squares."""
    side = dense.patch_size if isinstance(dense.patch_size, int) else set(dense.patch_size)
    if isinstance(side, set) and len(side) != 1:
        raise ValueError(f"the dense {dense.model_type} has patch_size={dense.patch_size!r}, wanted squares")
    return side.pop() if isinstance(side, set) else side


_FIELDS: Mapping[str, Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]] = MappingProxyType(
    {"vit": _vit, "focalnet": _focalnet, "pvt": _pvt, "pvt_v2": _pvt}
)
_WEIGHTS: Mapping[str, Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = MappingProxyType(
    {
        "swinv2": swin_weights.from_transformers,
        "vit": vit_weights.from_transformers,
        "focalnet": focalnet_weights.from_transformers,
        "pvt": pvt_weights.from_pvt,
        "pvt_v2": pvt_weights.from_pvt_v2,
    }
)
