"""`synchromesh plan`: what a model costs on a cluster that need not be here, and how it should run there."""

from __future__ import annotations

import dataclasses
import json as to_json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from synchromesh.commands.context import Context
from synchromesh.commands.paste import Asked, to_paste
from synchromesh.commands.plan_page import write_page
from synchromesh.commands.plan_table import show_plans
from synchromesh.compat.hf_config import read_hf_config
from synchromesh.errors import InputError
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.shapes import SHAPES
from synchromesh.planning.cluster import ClusterProfile, load_profile
from synchromesh.planning.nesting import ranks_on
from synchromesh.planning.planner import Planned, plan_model, worlds
from synchromesh.planning.remedies import with_remedies
from synchromesh.planning.shape import LayerKind, ModelShape
from synchromesh.types import Workload

MOST_RANKS = 1 << 16


ABOUT = """\
Predict a model's step on a described cluster, choose the plan of each kind of its MoE layers and say why, what would
fit where it does not, and what to paste to run it. Any number of ranks: copies of
a grid where experts do not divide it.

  synchromesh plan --model swinv2_moe_b --cluster a100_hdr --world 8..2048
  synchromesh plan --layer 16384 2048 2048 64 2 --cluster h100_ndr --world 512
  synchromesh plan --model qwen3/config.json --batch 1 --world 8..65536 --fsdp
"""


@dataclass(frozen=True)
class Request:
    """Options of `plan`.

    Attributes:
        model: swinv2_moe_b, swinv2_moe_s, or the folder or config.json of a Hugging Face MoE model.
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
        asked: what its command must repeat.
    """

    model: ModelShape
    changed: str
    asked: Asked

    @property
    def named(self) -> str:
        """The model and what was changed."""
        return f"{self.model.name} {self.changed}".strip()


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
                found = as_json(case, one) | {"command": to_paste(one, case.asked)}
                console.print(to_json.dumps(found), soft_wrap=True, highlight=False, markup=False)
        else:
            what = "inference" if request.inference else "training"
            show_plans(console, f"{case.named} on {profile.name}, {what}", case.model, planned)
            _show_command(console, case, planned)
    if request.html is not None:
        write_page(request.html, {c.named: found for c, found in results.items()}, profile)
        console.print(str(request.html), highlight=False, soft_wrap=True)
    return 0 if any(one.refused is None for planned in results.values() for one in planned) else 1


def _show_command(console: Console, case: Case, planned: Sequence[Planned]) -> None:
    """Print what to paste for the largest number of ranks that has a command."""
    for one in reversed(planned):
        command = to_paste(one, case.asked)
        if command is not None:
            console.print(f"\nto run it on {one.ranks.size:,}:", style="bold", highlight=False, soft_wrap=True)
            console.print(command, highlight=False, soft_wrap=True, markup=False)
            return


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
            "reasons": [str(reason) for reason in layer.reasons],
        }
        for layer in one.layers
    ]
    return {
        "model": case.model.name,
        "changed": case.changed,
        "world": one.ranks.size,
        "ranks_per_node": one.ranks.per_node,
        "grid": one.nesting.size,
        "copies": one.nesting.copies,
        "arrangement": dataclasses.asdict(one.arrangement),
        "batch": one.batch,
        "seconds": one.seconds,
        "dense_seconds": one.dense,
        "reduce_seconds": one.reduce,
        "average_seconds": one.average,
        "bubble_seconds": one.bubble,
        "static_seconds": one.static,
        "samples_per_second": one.samples_per_second,
        "efficiency": one.efficiency,
        "memory_bytes": one.memory,
        "network_known": one.network_known,
        "refused": one.refused,
        "would_fit": [as_json(case, other) for other in one.would_fit],
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
        asked = Asked(_named(request, model), request.cluster, experts, k, capacity, not request.inference)
        yield Case(model, ", ".join(said), asked)


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


def _named(request: Request, model: ModelShape) -> str | Path | Workload:
    if request.layer is not None:
        return model.layers[0].work
    path = Path(request.model)
    return request.model if request.model in SHAPES else path.parent if path.is_file() else path


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
    training = not request.inference
    for size in sizes:
        ranks = ranks_on(size, profile.per_node)
        found = plan_model(case.model, profile, ranks, batch=batch, training=training, sharded=request.fsdp)
        yield with_remedies(found, case.model, profile, training=training)
