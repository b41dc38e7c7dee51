"""keep_once: parameters that a transformers model holds under several names, in its state under the first one alone.

Files of tensors refuse what shares memory, and an optimizer knows each parameter by one name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def keep_once(module: nn.Module) -> None:
    """Let the state of a module have each parameter under its first name, and load from such a state."""
    module.register_state_dict_post_hook(_drop)
    module.register_load_state_dict_pre_hook(_fill)


def other_names(module: nn.Module) -> Mapping[str, str]:
    """Return the first name of each parameter by its other names."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    pairs = {name: first.setdefault(id(parameter), name) for name, parameter in named}
    return {name: own for name, own in pairs.items() if name != own}


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in other_names(module):
        state.pop(prefix + name, None)


def _fill(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in other_names(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
