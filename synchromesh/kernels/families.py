"""Which implementation of each kernel family runs a layer on an architecture, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from synchromesh.kernels.grouped_mm.choice import Choices, Kind, Way
from synchromesh.kernels.grouped_mm.favoured import OnlyWay, ProductShape, Reason, asked_rows, favoured
from synchromesh.kernels.weighed import Weighed, weighed

FIRST_GPU = 80  # sm_80: older ones run the reference


@dataclass(frozen=True)
class LayerShape:
    """A layer of experts, as far as kernels see it.

    Attributes:
        tokens: T, of a rank.
        width: D.
        hidden: F.
        experts: E, of a rank.
        choices: K, of a token.
        gated: whether experts have a gate.
        dtype: of tokens and matrices.
    """

    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int
    gated: bool = True
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.width, self.hidden, self.experts, self.choices)
        if min(sizes) < 1:
            raise ValueError(f"got {self}, wanted numbers from 1")

    @property
    def rows_per_expert(self) -> int:
        """Of even loads, as the table is asked."""
        return asked_rows(self.tokens * self.choices, self.experts)


@dataclass(frozen=True)
class Running:
    """What runs one step of a family.

    Attributes:
        family: a folder of `synchromesh/kernels`.
        step: of it; empty where it is one.
        implementation: "reference", "cpu", "triton", "torch" or "gluon".
        reason: why this one.
    """

    family: str
    step: str
    implementation: str
    reason: Reason | Weighed


def running(layer: LayerShape, architecture: str, *, choices: Choices | None = None) -> tuple[Running, ...]:
    """Return what runs each step of a layer, one rank alone, loads even.

    Args:
        layer: its shape.
        architecture: "cpu", which is this machine's, or that of a GPU, such as "sm_90" or "gfx942".
        choices: measured products; None takes the package's own.

    Raises:
        ValueError: an architecture of no such form, or sizes below 1.
    """
    general, why = _general(architecture, layer.dtype)
    others = ("select", "positions", "permute", "scaled_mm", "quantized_mlp", "direct_mlp")
    plain = [Running(family, "", general, OnlyWay(why)) for family in others]
    products = list(_products(layer))
    if general == "cpu":
        return (*plain, *(Running(family, step, general, _weighed(shape)) for family, step, shape, _ in products))
    if general != "triton":
        return (*plain, *(Running(family, step, general, OnlyWay(why)) for family, step, *_ in products))
    found = []
    for family, step, shape, able in products:
        one = favoured(shape, architecture, choices=choices, able=able)
        found.append(Running(family, step, one.way.value, one.reason))
    return (*plain, *found)


def _general(architecture: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return the implementation of families that have one for an architecture, and why it is that one."""
    if architecture == "cpu":
        return "cpu", "a CPU has kernels of its own"
    if architecture.startswith("gfx") and architecture[3:].isalnum():
        known = True
    elif architecture.startswith("sm_") and architecture[3:].isdecimal():
        known = int(architecture[3:]) >= FIRST_GPU
    else:
        raise ValueError(f"got the architecture {architecture!r}, wanted cpu, or one such as sm_90 or gfx942")
    if dtype == torch.float64:
        return "reference", "float64 is for exactness, not for speed"
    return ("triton", "no other has it on a GPU") if known else ("reference", "Triton begins at sm_80")


def _weighed(shape: ProductShape) -> Weighed:
    numbers = shape.depth * shape.width
    return weighed(experts=shape.experts, rows=shape.rows_per_expert, numbers=numbers, dtype=shape.dtype)


def _products(layer: LayerShape) -> Iterator[tuple[str, str, ProductShape, tuple[Way, ...]]]:
    """Return family, step, shape and the ways that a family can choose from, of each product."""

    def shape(kind: Kind, depth: int, width: int) -> ProductShape:
        return ProductShape(kind, layer.experts, layer.rows_per_expert, depth, width, layer.dtype)

    width, hidden, every, ours = layer.width, layer.hidden, tuple(Way), (Way.TRITON, Way.GLUON)
    opening = "opening, two products" if layer.gated else "opening"
    yield "fused_mlp", opening, shape(Kind.OPENING, width, hidden), ours
    yield "fused_mlp", "closing", shape(Kind.PRODUCT, hidden, width), every
    yield "fused_mlp", "gradient of rows", shape(Kind.PRODUCT, hidden, width), ours if layer.gated else every
    yield "fused_mlp", "gradient of matrices", shape(Kind.WEIGHTS, hidden, width), ours
    yield "grouped_mm", "product", shape(Kind.PRODUCT, width, hidden), every
    yield "grouped_mm", "gradient of rows", shape(Kind.PRODUCT, hidden, width), every
    yield "grouped_mm", "gradient of matrices", shape(Kind.WEIGHTS, width, hidden), every
