"""Transformers' MoE models on this library: an experts backend, and expert parallelism by any plan.

Names are imported when they are asked for: `heads` and `swin` beside them may be used without.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synchromesh.compat.huggingface.backend import register as register
    from synchromesh.compat.huggingface.parallel import full_state_dict as full_state_dict
    from synchromesh.compat.huggingface.parallel import parallelize_experts as parallelize_experts

_HOMES = {"register": "backend", "full_state_dict": "parallel", "parallelize_experts": "parallel"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
