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

from synchromesh.models.focalnet import (
    focalnet_base,
    focalnet_huge,
    focalnet_large,
    focalnet_small,
    focalnet_tiny,
    focalnet_xlarge,
)
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.pvt import pvt_v1, pvt_v2, pvt_v2_b0
from synchromesh.models.spectrum import spectrum_tiny
from synchromesh.models.swin_v2 import swin_v2_base, swin_v2_large, swin_v2_small, swin_v2_tiny
from synchromesh.models.swin_v2_moe import (
    config_b,
    config_s,
    swin_v2_demo,
    swin_v2_moe_b,
    swin_v2_moe_demo,
    swin_v2_moe_s,
)
from synchromesh.models.vit import vit_base, vit_large, vit_small, vit_tiny


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
VIT = Family(
    "ViT",
    "arXiv 2010.11929, 2012.12877",
    "none shipped; convert those of transformers' ViT",
    "MIT; others' weights: theirs",
)
FOCALNET = Family(
    "FocalNet",
    "arXiv 2203.11926",
    "none shipped; convert those of transformers' FocalNet",
    "MIT; Microsoft's weights: MIT",
)
PVTS = Family(
    "PVT",
    "arXiv 2102.12122, 2106.13797",
    "none shipped; convert those of transformers' Pvt and PvtV2",
    "MIT; others' weights: theirs",
)
SPECTRUM = Family(
    "SpectrumNet",
    "after arXiv 2309.06721 and 2608.18662; sizes ours",
    "none shipped; the papers' are not public",
    "MIT",
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
        **_of(
            VIT,
            vit_tiny_p16_224=called(vit_tiny),
            vit_small_p16_224=called(vit_small),
            vit_base_p16_224=called(vit_base),
            vit_large_p16_224=called(vit_large),
        ),
        **_of(
            FOCALNET,
            focalnet_tiny_srf=called(focalnet_tiny),
            focalnet_tiny_lrf=called(focalnet_tiny, levels=3),
            focalnet_small_srf=called(focalnet_small),
            focalnet_small_lrf=called(focalnet_small, levels=3),
            focalnet_base_srf=called(focalnet_base),
            focalnet_base_lrf=called(focalnet_base, levels=3),
            focalnet_large_fl3=called(focalnet_large),
            focalnet_large_fl4=called(focalnet_large, levels=4),
            focalnet_xlarge_fl3=called(focalnet_xlarge),
            focalnet_xlarge_fl4=called(focalnet_xlarge, levels=4),
            focalnet_huge_fl3=called(focalnet_huge),
            focalnet_huge_fl4=called(focalnet_huge, levels=4),
        ),
        **_of(
            PVTS,
            pvt_tiny=called(pvt_v1),
            pvt_small=called(pvt_v1, depths=(3, 4, 6, 3)),
            pvt_medium=called(pvt_v1, depths=(3, 4, 18, 3)),
            pvt_large=called(pvt_v1, depths=(3, 8, 27, 3)),
            pvt_v2_b0=called(pvt_v2_b0),
            pvt_v2_b1=called(pvt_v2, depths=(2, 2, 2, 2)),
            pvt_v2_b2=called(pvt_v2),
            pvt_v2_b2_linear=called(pvt_v2, linear=True),
            pvt_v2_b3=called(pvt_v2, depths=(3, 4, 18, 3)),
            pvt_v2_b4=called(pvt_v2, depths=(3, 8, 27, 3)),
            pvt_v2_b5=called(pvt_v2, depths=(3, 6, 40, 3), mlp_ratios=(4.0, 4.0, 4.0, 4.0)),
        ),
        **_of(SPECTRUM, spectrum_tiny=called(spectrum_tiny)),
        **_of(DEMOS, swinv2_demo=called(swin_v2_demo), swinv2_moe_demo=called(swin_v2_moe_demo)),
    }
)
"""By name; `swinv2_moe_b_e32` is what `plan --model swinv2_moe_b` plans."""
