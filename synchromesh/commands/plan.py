"""`synchromesh plan`: what a model costs on a cluster that need not be here, and how it should run there."""

from __future__ import annotations

import dataclasses
import json as to_json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from synchromesh.commands.context import Context
from synchromesh.commands.plan_page import write_page
from synchromesh.compat.hf_config import read_hf_config
from synchromesh.errors import InputError
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.shapes import SHAPES
from synchromesh.planning.cluster import ClusterProfile, load_profile
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.planner import LayerKind, ModelShape, Planned, plan_model, worlds
from synchromesh.types import Workload

MOST_RANKS = 1 << 16


ABOUT = """\
Predict a model's step on a described cluster, and choose the plan of each kind of its MoE layers.

  synchromesh plan --model swinv2_moe_b --cluster a100_hdr --world 8..2048 --batch 128
  synchromesh plan --layer 16384 2048 2048 64 2 --cluster h100_ndr --world 512
  synchromesh plan --model qwen3/config.json --length 4096 --batch 1 --world 8..65536 --fsdp
"""


@dataclass(frozen=True)
class Request:
    """Options of `plan`.

    Attributes:
        model: swinv2_moe_b, swinv2_moe_s, or the config.json of a Hugging Face MoE model.
        layer: instead of a model, one layer by its numbers T D F E K.
        cluster: a shipped profile (a100_hdr, h100_ndr, cpu_gloo), or a file of `synchromesh profile`.
        world: ranks, as 64 or 8..2048 (its doubles in between).
        batch: images or sequences of each rank.
        length: tokens of a sequence.
        experts: one table for each of these numbers of experts; the model's own if not given.
        k: choices per token, in the same way.
        capacity: factors f of FixedCapacity, in the same way; none drops nothing.
        skew: rows of the busiest expert over the mean, 1 is balanced.
        dtype: of the products; the model's own if not given.
        dense_share: share of their peak that the dense part reaches; the model's own if not given.
        inference: forward only.
        fsdp: spread the dense part over the ranks instead of copying it.
        gated: the experts of --layer have a gate.
        json: print one JSON object a line.
        html: also write a page that opens offline: plans, parts of a step, memory against the limit, numbers.
    """

    model: str = "swinv2_moe_b"
    layer: tuple[int, int, int, int, int] | None = None
    cluster: str = "a100_hdr"
    world: str = "8..2048"
    batch: int = 128
    length: int = 4096
    experts: tuple[int, ...] = ()
    k: tuple[int, ...] = ()
    capacity: tuple[float, ...] = ()
    skew: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    dense_share: float | None = None
    inference: bool = False
    fsdp: bool = False
    gated: bool = False
    json: bool = False
    html: Path | None = None


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes:
        model: with the changes.
        changed: what was changed, for people.
    """

    model: ModelShape
    changed: str


def run(request: Request, context: Context) -> int:
    """Print the plans; return 0, or 1 where no number of ranks has room for the model.

    Raises:
        InputError: no such model or cluster, or numbers that cannot be.
    """
    console = context.console
    try:
        profile = load_profile(request.cluster)
        sizes = _worlds(request.world)
        results = {case: list(_planned(case, request, profile, sizes)) for case in _cases(request)}
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    for case, planned in results.items():
        if request.json:
            for one in planned:
                console.print(to_json.dumps(as_json(case, one)), soft_wrap=True, highlight=False, markup=False)
        else:
            _show(console, case, planned, profile, request)
    if request.html is not None:
        write_page(request.html, {f"{c.model.name} {c.changed}": found for c, found in results.items()}, profile)
        console.print(str(request.html), highlight=False, soft_wrap=True)
    return 0 if any(one.refused is None for planned in results.values() for one in planned) else 1


def as_json(case: Case, one: Planned) -> dict[str, Any]:
    """Return a result as plain values; seconds and bytes."""
    layers = [
        {
            "kind": layer.kind.name,
            "count": layer.kind.count,
            "plan": dataclasses.asdict(layer.plan),
            "forward": dataclasses.asdict(layer.forward),
            "backward": dataclasses.asdict(layer.backward),
            "memory": dataclasses.asdict(layer.memory),
            "static_seconds": layer.static,
        }
        for layer in one.layers
    ]
    return {
        "model": case.model.name,
        "changed": case.changed,
        "world": one.ranks.size,
        "ranks_per_node": one.ranks.per_node,
        "batch": one.batch,
        "seconds": one.seconds,
        "dense_seconds": one.dense,
        "reduce_seconds": one.reduce,
        "static_seconds": one.static,
        "samples_per_second": one.samples_per_second,
        "efficiency": one.efficiency,
        "memory_bytes": one.memory,
        "refused": one.refused,
        "layers": layers,
        "remarks": one.remarks(),
    }


def _worlds(text: str) -> list[int]:
    first, dots, last = text.partition("..")
    if not first.isdecimal() or (dots and not last.isdecimal()):
        raise InputError(f"--world is {text!r}, wanted a number of ranks, or two as in 8..2048")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high <= MOST_RANKS:
        raise InputError(f"--world is {text!r}, wanted ranks from 1 to {MOST_RANKS:,}, the smaller number first")
    return list(worlds(low, high))


def _cases(request: Request) -> Iterator[Case]:
    if request.dense_share is not None and not 0 < request.dense_share <= 1:
        raise InputError(f"--dense-share is {request.dense_share}, wanted a share above 0, at most 1")
    if request.batch < 1 or request.length < 1 or request.skew < 1:
        raise InputError(
            f"got --batch {request.batch} --length {request.length} --skew {request.skew}, wanted at least 1"
        )
    sweeps = product(request.experts or (None,), request.k or (None,), request.capacity or (None,))
    for experts, k, capacity in sweeps:
        model = _changed(_model(request, experts), request, experts=experts, k=k, capacity=capacity)
        said = [f"E {experts}"] if experts else []
        said += [f"k {k}"] if k else []
        said += [f"capacity {capacity:g}"] if capacity is not None else []
        yield Case(model, ", ".join(said))


def _model(request: Request, experts: int | None) -> ModelShape:
    if request.layer is not None:
        tokens, width, hidden, own, k = request.layer
        dtype = getattr(torch, request.dtype or "bfloat16")
        work = Workload(0, k, width, hidden, own, dtype, True, matrices=3 if request.gated else 2)
        kind = LayerKind("layer", 1, tokens, work)
        return ModelShape("layer", "batch", (kind,), 0.0, 0.0, 0.0, (1.0, 1.0), "no dense part")
    if request.model in SHAPES:
        return SHAPES[request.model](ExpertsConfig(num_experts=experts or 32))
    path = Path(request.model)
    if not path.exists():
        known = ", ".join(SHAPES)
        raise InputError(f"there is no model {request.model!r}: wanted {known}, or the config.json of one")
    return read_hf_config(path, length=request.length)


def _changed(
    model: ModelShape, request: Request, *, experts: int | None, k: int | None, capacity: float | None
) -> ModelShape:
    kinds = []
    for kind in model.layers:
        work = kind.work
        dtype = work.dtype if request.dtype is None else getattr(torch, request.dtype)
        work = dataclasses.replace(work, experts=experts or work.experts, choices=k or work.choices, dtype=dtype)
        if work.choices > work.experts:
            raise InputError(f"k is {work.choices}, wanted at most the {work.experts} experts")
        samples = 1 if request.layer is not None else request.batch
        rows = kind.tokens * samples * work.choices / work.experts
        known = None if capacity is None else math.ceil(capacity * rows)
        work = dataclasses.replace(work, capacity=known, skew=round(math.log2(request.skew)))
        kinds.append(dataclasses.replace(kind, work=work))
    model = dataclasses.replace(model, layers=tuple(kinds))
    if request.dense_share is None:
        return model
    share = (request.dense_share, request.dense_share)
    return dataclasses.replace(model, dense_share=share, calibrated_by=f"{share[0]:g} of the peak, as given")


def _planned(case: Case, request: Request, profile: ClusterProfile, sizes: list[int]) -> Iterator[Planned]:
    batch = 1 if request.layer is not None else request.batch
    for size in sizes:
        ranks = Ranks(size, min(size, profile.per_node))
        yield plan_model(case.model, profile, ranks, batch=batch, training=not request.inference, sharded=request.fsdp)


def _show(console: Console, case: Case, planned: list[Planned], profile: ClusterProfile, request: Request) -> None:
    unit, what = case.model.unit, "inference" if request.inference else "training"
    title = f"{case.model.name} {case.changed} on {profile.name}, {what}: milliseconds of a step"
    table = Table(title=title, title_justify="left")
    for name in ("ranks", "step", "dense", "experts", "waits", "GB", f"{unit}/s", "efficient", "static"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in planned:
        passes = [seconds for layer in one.layers for seconds in (layer.forward, layer.backward)]
        waits = sum(seconds.exposed for seconds in passes) + one.reduce
        parts = [one.seconds, one.dense, one.seconds - one.dense - waits, waits]
        cells = [_short(part * 1e3) for part in parts]
        static = "no room" if one.static is None else f"{one.static / one.seconds:.2f}x"
        rates = [f"{one.memory / 1e9:.0f}", _short(one.samples_per_second), f"{one.efficiency:.0%}", static]
        table.add_row(f"{one.ranks.size:,}", *cells, *rates, style="red" if one.refused else None)
    console.print(table)
    for line in _plans(planned):
        console.print(line, highlight=False, soft_wrap=True)
    for remark, sizes in _remarks(planned).items():
        console.print(f"{remark} ({_range(sizes)} ranks)", highlight=False, soft_wrap=True)
    if case.model.dense_products:
        console.print(f"the dense part: {case.model.calibrated_by}", style="dim", highlight=False, soft_wrap=True)


def _plans(planned: list[Planned]) -> Iterator[str]:
    """Say for each kind of layer by which plan it runs, on how many ranks."""
    for number, layer in enumerate(planned[0].layers):
        runs = groupby(planned, key=lambda one, number=number: one.layers[number].plan)
        said = [f"{plan} ({_range([one.ranks.size for one in own])} ranks)" for plan, own in runs]
        yield f"{layer.kind.name} by {'; '.join(said)}"


def _remarks(planned: list[Planned]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for one in planned:
        for remark in one.remarks():
            found.setdefault(remark, []).append(one.ranks.size)
    return found


def _range(sizes: list[int]) -> str:
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
