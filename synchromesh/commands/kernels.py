"""`synchromesh kernels`: which implementation of each kernel runs a layer, and why."""

from __future__ import annotations

import importlib.metadata
import json as to_json
from dataclasses import dataclass
from typing import Any, Literal

import torch

from synchromesh.commands.context import Context
from synchromesh.commands.tables import Column, Row, show_table
from synchromesh.errors import InputError
from synchromesh.kernels.families import LayerShape, Running, running
from synchromesh.kernels.grouped_mm.choice import architecture_of
from synchromesh.kernels.grouped_mm.favoured import Measured, OnlyWay, Predicted, Unmeasured
from synchromesh.kernels.weighed import Weighed

ABOUT = """\
Say for each kernel family which implementation runs a layer on this machine or on a named architecture, and why: as
measured (all times), as arithmetic says (fractions of the dense rate), by what products cost this CPU, because there
is no other way, or because nothing is known.

  synchromesh kernels                                     here, for the default shape
  synchromesh kernels --architecture sm_90 --tokens 32768 --experts 128 --k 8
  synchromesh kernels --architecture sm_90 --json
"""


BECAUSE = {
    Measured: "measured", Predicted: "arithmetic", OnlyWay: "only way", Unmeasured: "unmeasured", Weighed: "costs"
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Options of `kernels`.

    Attributes:
        architecture: cpu, or a GPU's such as sm_90 or gfx942; this machine's if not given.
        tokens: of a rank.
        width: of a token.
        hidden: width inside an expert.
        experts: of a rank.
        k: choices per token.
        gated: experts have a gate.
        dtype: of tokens and matrices.
        json: print one JSON object a line.
    """

    architecture: str | None = None
    tokens: int = 8192
    width: int = 2048
    hidden: int = 1408
    experts: int = 64
    k: int = 4
    gated: bool = True
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "bfloat16"
    json: bool = False


def run(request: Request, context: Context) -> int:
    """Print what runs; return 0.

    Raises:
        InputError: an architecture of no such form, or sizes that cannot be.
    """
    architecture = request.architecture or architecture_of(_device())
    sizes = {name: getattr(request, name) for name in ("tokens", "width", "hidden", "experts", "k")}
    try:
        layer = LayerShape(*sizes.values(), gated=request.gated, dtype=getattr(torch, request.dtype))
        found = running(layer, architecture)
    except ValueError as error:
        raise InputError(str(error)) from error
    if request.json:
        for one in found:
            said = {"architecture": architecture, **sizes, "gated": request.gated, "dtype": request.dtype}
            line = to_json.dumps(said | _versions() | as_json(one))
            context.console.print(line, soft_wrap=True, highlight=False, markup=False)
        return 0
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    what = " ".join(f"{name} {size}" for name, size in sizes.items())
    title = f"kernels on {architecture}, {request.dtype}, {what}{', gated' if request.gated else ''}; {versions}"
    rows = [Row((one.family, one.step, one.implementation, str(one.reason))) for one in found]
    show_table(context.console, title, [Column(name, words=True) for name in ("family", "step", "runs", "why")], rows)
    return 0


def as_json(one: Running) -> dict[str, Any]:
    """Return what runs a step as plain values; seconds and fractions by way."""
    reason, numbers = one.reason, {}
    if isinstance(reason, Measured):
        about = reason.measurement
        numbers = {
            "seconds": {way.value: taken for way, taken in reason.cell.seconds.items()},
            "measured_on": {"device": about.device, "torch": about.torch, "triton": about.triton},
        }
    if isinstance(reason, Predicted):
        numbers = {
            "fractions": {way.value: fraction for way, fraction in reason.fractions.items()},
            "held_back": [way.value for way in reason.held_back],
        }
    if isinstance(reason, Weighed):
        about = reason.machine
        measured_on = {"cpu": about.cpu, "threads": about.threads, "torch": about.torch}
        numbers = {"way": reason.taken, "seconds": dict(reason.seconds), "measured_on": measured_on}
    kind = BECAUSE[type(reason)]
    about = {"family": one.family, "step": one.step, "runs": one.implementation}
    return {**about, "because": kind, "reason": str(reason), **numbers}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _versions() -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton}
