"""synchromesh: Mixture-of-Experts layers for PyTorch that run at the speed of the hardware."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name is defined: imported when it is asked for, so that nobody waits for what they do not use.
# `__init__.pyi` says the same to type checkers.
_HOMES = {
    "adapt.adaptation": (
        "Adaptation",
        "Adapted",
    ),
    "adapt.grouping": (
        "BalancedKMeans",
        "RandomGroups",
    ),
    "adapt.low_rank": ("LowRank",),
    "adapt.mtlora": ("MTLoRA",),
    "adapt.polyhistor": (
        "Polyhistor",
        "PolyhistorLite",
    ),
    "adapt.quantize": ("quantize_experts",),
    "adapt.replace": ("replace_ffn",),
    "adapt.sparse": (
        "StaticSparsity",
        "count_entries",
        "densify",
    ),
    "adapt.split": ("SplitFFN",),
    "adapt.upcycle": ("Upcycle",),
    "kernels": (
        "Float8Products",
        "MXFloat8Products",
    ),
    "moe.capacity": (
        "Capacity",
        "Dropless",
        "FixedCapacity",
        "NeededCapacity",
        "batch_prioritized",
        "token_order",
    ),
    "moe.carry": ("InBackward",),
    "moe.experts": (
        "Experts",
        "GatedMLPExperts",
        "MLPExperts",
        "ModuleExperts",
        "set_products",
    ),
    "moe.layer": (
        "MoE",
        "routing_options",
    ),
    "moe.losses": (
        "ImportanceLoad",
        "LoadBalance",
        "Loss",
        "OverRanks",
        "ZLoss",
    ),
    "moe.places": ("PlacedRouter",),
    "moe.quantized": ("QuantizedExperts",),
    "moe.record": (
        "aux_loss",
        "load_stats",
        "record_load",
    ),
    "moe.rounding": ("TokenRounding",),
    "moe.routing": (
        "BiasBalance",
        "CosineRouter",
        "ExpertChoiceRouter",
        "NodeLimit",
        "Ones",
        "Router",
        "Sigmoid",
        "Softmax",
        "TopKRouter",
        "update_balance",
    ),
    "moe.strategy": (
        "Local",
        "Strategy",
    ),
    "parallel.adaptive": (
        "Adaptive",
        "Council",
        "Tuned",
    ),
    "parallel.chooser": ("Chooser",),
    "parallel.comm.grid": ("Grid",),
    "parallel.comm.job": ("joined",),
    "parallel.gradients": (
        "accumulating",
        "clip_grad_norm",
        "split_by_kind",
        "token_mean_loss",
    ),
    "parallel.parallelize": (
        "adaptive_layers",
        "distribute",
        "expert_parameters",
        "parallelize",
    ),
    "parallel.sharded": ("Sharded",),
    "parallel.shared": (
        "FullySharded",
        "Replicated",
    ),
    "parallel.state": ("whole_state",),
    "parallel.wire": (
        "AsIs",
        "Float8",
        "Wire",
    ),
    "types": (
        "LoadStats",
        "Plan",
        "Routing",
        "RowMap",
        "Workload",
    ),
}
# Old names, which warn: not in `__all__`, nor in the stub.
_OLD = {"DDP": "parallel.shared", "FSDP2": "parallel.shared"}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _OLD:
        return getattr(importlib.import_module(f"synchromesh.{_OLD[name]}"), name)
    if name not in _MODULES:
        raise AttributeError(f"module 'synchromesh' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"synchromesh.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
