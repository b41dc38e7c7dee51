"""Tutel's dictionary of experts, read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from synchromesh.compat.tutel.experts.ffn import FFNExperts
from synchromesh.compat.tutel.experts.llama_ffn import LlamaExperts
from synchromesh.compat.tutel.experts.share import Share


def build_experts(settings: Mapping[str, Any], share: Share, *, skip: bool = False) -> nn.Module:
    """Build the experts of a layer: of this file, or the user's module.

    Args:
        settings: as `moe_layer` takes them, without their number.
        skip: of ffn experts.

    Raises:
        ValueError: an unknown type, or settings that its experts do not know.
    """
    kind, rest = settings.get("type"), {name: value for name, value in settings.items() if name != "type"}
    if kind == "custom":
        return _custom(rest, share)
    kinds: dict[Any, Callable[..., nn.Module]] = {"ffn": FFNExperts, "llama_ffn": LlamaExperts}
    if kind not in kinds:
        raise ValueError(f"experts are of type {kind!r}, wanted 'ffn', 'llama_ffn', or 'custom' with a 'module'")
    known = [name for name in inspect.signature(kinds[kind]).parameters if name not in ("share", "skip")]
    unknown = sorted(set(rest) - set(known))
    if unknown or "hidden_size_per_expert" not in rest:
        raise ValueError(
            f"experts of type {kind!r} got {sorted(rest)}, wanted hidden_size_per_expert and any of {known}"
        )
    return kinds[kind](share, **rest, **({"skip": skip} if kind == "ffn" else {}))


def _custom(settings: dict[str, Any], share: Share) -> nn.Module:
    module = settings.pop("module", None)
    if not callable(module):
        raise ValueError(f"custom experts got module={module!r}, wanted a class of torch.nn.Module")
    taken = inspect.signature(module).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    number = (
        "local_experts"
        if "local_experts" in taken and "num_experts_per_device" not in taken
        else "num_experts_per_device"
    )
    if number not in taken and not anything:
        raise ValueError(
            f"{module!r} takes no num_experts_per_device, wanted model_dim, num_experts_per_device and sharded_count"
        )
    built = module(
        **settings, model_dim=share.model_dim, sharded_count=share.sharded_count, **{number: share.local_experts}
    )
    if not isinstance(built, nn.Module):
        raise ValueError(f"custom experts are a {type(built).__name__}, wanted a torch.nn.Module")
    return built
