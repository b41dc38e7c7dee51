"""Names of tensors: other people's turned into ours, and back."""

from __future__ import annotations

from collections.abc import Iterable


def rename(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace parts of a tensor's name, one pair (old, new) after the other; ^ in a pair is the beginning of the name.

    >>> rename("layers.0.attn.qkv", (("^layers.", "stages."), (".attn.", ".attention.")))
    'stages.0.attention.qkv'
    """
    key = "^" + key
    for old, new in pairs:
        key = key.replace(old, new)
    return key.removeprefix("^")
