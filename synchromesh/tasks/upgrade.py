"""What version 0.1 wrote into run folders, when classification was all there was, in today's words."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Fields = dict[str, Any]
_PRODUCTS: Mapping[str, str | None] = MappingProxyType(
    {"themselves": None, "float8": "Float8Products", "mxfloat8": "MXFloat8Products"}
)
_SAME_OF_SWIN = (
    *("embed_dim", "depths", "num_heads", "patch_size", "window_size", "mlp_ratio", "drop_path", "dropout"),
    *("init_std", "branch_norm_init"),
)


def upgrade_recipe(found: Fields) -> Fields:
    """Return a recipe.json of today; one of today is left as it is."""
    if "task" in found or "data" not in found:
        return found
    now = dict(found)
    data, augment, smoothing = now.pop("data"), now.pop("augment"), now.pop("label_smoothing")
    now["task"] = _classification(data, augment, smoothing)
    now["model"] = _model(found["model"], data["preprocess"])
    now["twin"] = None if found["twin"] is None else _model(found["twin"], data["preprocess"])
    now["parallelism"] = {**now.pop("sharing"), "kind": "Parallelism"}
    return now


def upgrade_state(found: Fields) -> Fields:
    """Return a checkpoint's state.json of today; one of today is left as it is."""
    if "task" in found or "classes" not in found:
        return found
    now = dict(found)
    preprocess = now.pop("preprocess")
    now["task"] = _classification({"kind": "Data", "preprocess": preprocess})
    now["model"], now["facts"] = _model(found["model"], preprocess), {"classes": now.pop("classes")}
    now["train_samples"] = now.pop("train_images")
    standing = dict(found["standing"])
    standing["samples"], standing["bad"] = standing.pop("trained_images"), standing.pop("bad_images")
    now["standing"] = {**standing, "best": standing["best"] if standing["best"] >= 0 else None}
    window = found["window"]
    sums = dict(window["sums"])
    right, sums["samples"] = sums.pop("right"), sums.pop("images")
    terms, watched = {"cross_entropy": sums["task_loss"]}, {"accuracy": [right, sums["samples"]]}
    now["window"] = {**window, "sums": sums, "terms": terms, "watched": watched}
    return now


def _classification(data: Fields, augment: Fields | None = None, smoothing: float | None = None) -> Fields:
    known = {"augment": augment, "label_smoothing": smoothing}
    return {"kind": "Classification", "data": data, **{name: v for name, v in known.items() if v is not None}}


def _model(found: Fields, preprocess: Fields) -> Fields:
    swin = found["swin"]
    return {
        "kind": "SwinV2Config",
        "image_size": preprocess["image_size"],
        "in_channels": preprocess["channels"],
        **{name: swin[name] for name in _SAME_OF_SWIN},
        "checkpointed": swin["recompute"],
        "style": "swin_moe" if swin["released_style"] else "swin_v2",
        "experts": _experts(found["experts"]) if "experts" in found else None,
    }


def _experts(found: Fields) -> Fields:
    if found["cosine"]:
        router = {"kind": "CosineGate", "noise": found["noise"], "tile": found["tile"]}
    else:
        own = {"noise": found["noise"], "bias_rate": found["bias_rate"], "tile": found["tile"]}
        router = {"kind": "LinearGate", **own}
    order = {"kind": "BatchPrioritized" if found["prioritized"] else "TokenOrder"}
    factor, products = found["capacity_factor"], _PRODUCTS[found["products"]]
    fixed = {"kind": "FixedCapacity", "factor": factor, "priority": order}
    return {
        "kind": "ExpertsConfig",
        "num_experts": found["count"],
        "k": found["k"],
        "blocks": found["blocks"],
        "router": router,
        "capacity": fixed if factor else {"kind": "Dropless"},
        "losses": [] if found["loss"] is None else [{"kind": "OverRanks", "loss": found["loss"]}],
        "dropout": found["dropout"],
        "down_bias": found["down_bias"],
        "products": None if products is None else {"kind": products},
    }
