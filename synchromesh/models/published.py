"""Architectures that papers published and the demos use, by name: how each is built, and where weights come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import swin_v2_base, swin_v2_large, swin_v2_small, swin_v2_tiny
from synchromesh.models.swin_v2_moe import (
    config_b,
    config_s,
    swin_v2_demo,
    swin_v2_moe_b,
    swin_v2_moe_demo,
    swin_v2_moe_s,
)


@dataclass(frozen=True)
class Family:
    """What the architectures of one source have in common.

    Attributes:
        title: for people.
        source: where they were published.
        weights: whether there are any, and what brings them here.
        licence: of the code, and of weights that others released.
    """

    title: str
    source: str
    weights: str
    licence: str


@dataclass(frozen=True)
class Architecture:
    """A model by name.

    Attributes:
        family: where it is from.
        build: makes it, with random weights, on torch's default device.
        python: the lines that do the same.
    """

    family: Family
    build: Callable[[], nn.Module]
    python: str


SWIN = Family(
    "SwinV2",
    "arXiv 2111.09883",
    "none shipped; convert those of transformers' Swinv2, or of Microsoft's Swin Transformer with --from-swin",
    "MIT; Microsoft's weights: MIT",
)
SWIN_MOE_FAMILY = Family(
    "SwinV2-MoE",
    "arXiv 2206.03382, section 5.3",
    "none shipped; convert those of Microsoft's Swin-MoE with --from-swin",
    "MIT; Microsoft's weights: MIT",
)
DEMOS = Family("demonstration sizes", "this library", "none shipped; `synchromesh train demo` makes them", "MIT")

WINDOWS_OF_192 = (12, 12, 12, 6)
"""Sides of windows of a pre-training with 192 x 192 pixels, of the models that were tuned for larger images."""


def called(function: Callable[..., nn.Module], *arguments: Any, **named: Any) -> Callable[[Family], Architecture]:
    """Return what makes an architecture of a call, written in Python too."""
    code = f"from {function.__module__} import {function.__name__}"
    kinds = {type(value) for value in named.values() if dataclasses.is_dataclass(value)}
    imports = [code, *(f"from {kind.__module__} import {kind.__name__}" for kind in kinds)]
    said = [*map(_said, arguments), *(f"{name}={_said(value)}" for name, value in named.items())]
    python = "\n".join([*imports, f"model = {function.__name__}({', '.join(said)})"])
    return lambda family: Architecture(family, partial(function, *arguments, **named), python)


def dense_moe(size: str, num_classes: int = 21841) -> nn.Module:
    """Build the dense twin of SwinV2-MoE, of size "s" or "b". Raises ValueError for another."""
    sizes = {"s": config_s, "b": config_b}
    if size not in sizes:
        raise ValueError(f"there is no size {size!r}, wanted one of {', '.join(sizes)}")
    return Classifier(sizes[size]().build(), num_classes)


def _said(value: Any) -> str:
    """Write a value in Python: of a dataclass what differs from its defaults."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value.value if isinstance(value, Enum) else value)
    changed = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    default = type(value)()
    said = [f"{name}={_said(one)}" for name, one in changed.items() if one != getattr(default, name)]
    return f"{type(value).__name__}({', '.join(said)})"


def _of(family: Family, **made: Callable[[Family], Architecture]) -> dict[str, Architecture]:
    return {name: make(family) for name, make in made.items()}


def _moe(size: str, build: Callable[..., nn.Module], numbers: tuple[int, ...]) -> dict[str, Architecture]:
    each = {f"swinv2_moe_{size}_e{n}": called(build, experts=ExpertsConfig(num_experts=n)) for n in numbers}
    dense = {f"swinv2_moe_{size}_dense": called(dense_moe, size)}
    return _of(SWIN_MOE_FAMILY, **dense, **each)


PUBLISHED: Mapping[str, Architecture] = MappingProxyType(
    {
        **_of(
            SWIN,
            swinv2_tiny_w8_256=called(swin_v2_tiny),
            swinv2_tiny_w16_256=called(swin_v2_tiny, window_size=16),
            swinv2_small_w8_256=called(swin_v2_small),
            swinv2_small_w16_256=called(swin_v2_small, window_size=16),
            swinv2_base_w8_256=called(swin_v2_base),
            swinv2_base_w16_256=called(swin_v2_base, window_size=16),
            swinv2_base_w12_192_22k=called(swin_v2_base, 21841, image_size=192, window_size=12),
            swinv2_base_w24_384=called(swin_v2_base, image_size=384, window_size=24, pretrained=WINDOWS_OF_192),
            swinv2_large_w12_192_22k=called(swin_v2_large),
            swinv2_large_w16_256=called(swin_v2_large, 1000, image_size=256, window_size=16, pretrained=WINDOWS_OF_192),
            swinv2_large_w24_384=called(swin_v2_large, 1000, image_size=384, window_size=24, pretrained=WINDOWS_OF_192),
        ),
        **_moe("s", swin_v2_moe_s, (8, 16, 32, 64, 128)),
        **_moe("b", swin_v2_moe_b, (8, 16, 32)),
        **_of(DEMOS, swinv2_demo=called(swin_v2_demo), swinv2_moe_demo=called(swin_v2_moe_demo)),
    }
)
"""By name; `swinv2_moe_b_e32` is what `plan --model swinv2_moe_b` plans."""
