"""RoIAlign and non-maximum suppression on a CPU, ours in plain torch against torchvision's compiled operators.

    python -m venv beside
    beside/bin/pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
    beside/bin/pip install jaxtyping tyro rich safetensors numpy
    PYTHONPATH=. beside/bin/python benchmarks/roi_nms.py

torchvision is no part of what this package needs or installs: hence an environment of its own. Both get the same inputs
in one run, on one thread: maps of 256 channels of a picture of 800 x 1,216 pixels and boxes around objects, as a head
of boxes and one of masks asks for them; proposals of five levels, and boxes of 80 classes. Results are compared first,
and gradients, in float64; where they differ no time is printed. Times are of float32, in interleaved rounds, medians.
A ratio above 1 is in our favour: torchvision's seconds over ours.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import machine, timed
from torch import Tensor

from synchromesh.models.boxes import nms
from synchromesh.models.heads.cascade.roi_align import roi_align

RESULTS = Path(__file__).parent / "results" / "roi_nms.jsonl"
HEIGHT, WIDTH, CHANNELS = 800, 1216, 256
SAMPLES = 2  # points of a bin along each side
CLOSE = 1e-10  # relative distance of results in float64; in float32 places on a map of 300 cells are rounded to 1e-5


@dataclass(frozen=True)
class Align:
    """One RoIAlign: so many boxes as squares of a side, on the map of a stride."""

    boxes: int
    side: int
    stride: int


@dataclass(frozen=True)
class Suppress:
    """One suppression of boxes in groups (levels, or classes) above an overlap."""

    boxes: int
    groups: int
    overlap: float


ALIGNS = (Align(128, 7, 4), Align(512, 7, 4), Align(512, 7, 8), Align(1000, 7, 8), Align(128, 14, 4), Align(128, 14, 8))
SUPPRESSIONS = (
    Suppress(1000, 5, 0.7), Suppress(4000, 5, 0.7), Suppress(8000, 5, 0.7),
    Suppress(1000, 80, 0.5), Suppress(4000, 80, 0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        seconds: of each figure, at least.
        tiny: few boxes and channels, for a look whether all runs.
        out: file to append to.
    """

    seconds: float = 3.0
    tiny: bool = False
    out: Path = RESULTS


def boxes_of(count: int, generator: torch.Generator) -> Tensor:
    """Return boxes as a detector has them: three of four near one of 60 objects, the others anywhere."""
    objects = torch.rand(60, 4, generator=generator) * torch.tensor([WIDTH, HEIGHT, 300.0, 300.0])
    which = torch.randint(60, (count,), generator=generator)
    x, y, width, height = (objects[which] * (1 + 0.1 * torch.randn(count, 4, generator=generator))).T
    anywhere = torch.rand(count, generator=generator) < 0.25
    x = torch.where(anywhere, torch.rand(count, generator=generator) * WIDTH, x)
    y = torch.where(anywhere, torch.rand(count, generator=generator) * HEIGHT, y)
    width, height = width.abs() + 8, height.abs() + 8
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


def align_runs(
    case: Align, channels: int, theirs: Callable[..., Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Return what runs each, by pass; backward gives the gradient of the maps."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, channels, HEIGHT // case.stride, WIDTH // case.stride, generator=generator).to(dtype)
    boxes, image = boxes_of(case.boxes, generator).to(dtype), torch.zeros(case.boxes, dtype=torch.int64)
    rows = torch.cat([image[:, None].to(dtype), boxes], dim=1)
    weights = torch.randn(case.boxes, channels, case.side, case.side, generator=generator).to(dtype)

    def ours_of(x: Tensor) -> Tensor:
        return roi_align(x, boxes, image, stride=case.stride, side=case.side, samples=SAMPLES)

    def theirs_of(x: Tensor) -> Tensor:
        return theirs(x, rows, case.side, spatial_scale=1 / case.stride, sampling_ratio=SAMPLES, aligned=True)

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        x = maps.clone().requires_grad_()
        run(x).backward(weights)
        assert x.grad is not None
        return x.grad

    runs = {"theirs": theirs_of, "ours": ours_of}
    return {
        "forward": {name: lambda run=run: run(maps) for name, run in runs.items()},
        "forward and backward": {name: lambda run=run: gradient(run) for name, run in runs.items()},
    }


def suppress_runs(case: Suppress, theirs: Callable[..., Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Return what runs each."""
    generator = torch.Generator().manual_seed(0)
    boxes = boxes_of(case.boxes, generator)
    scores = torch.randperm(case.boxes, generator=generator).float() / case.boxes  # no two alike
    groups = torch.randint(case.groups, (case.boxes,), generator=generator)
    return {
        "theirs": lambda: theirs(boxes, scores, groups, case.overlap),
        "ours": lambda: nms(boxes, scores, groups, most=case.overlap),
    }


def compared(runs: dict[str, Callable[[], Tensor]], what: str) -> float:
    """Return the relative distance of both results. Exits where they differ."""
    theirs, ours = runs["theirs"](), runs["ours"]()
    same = theirs.shape == ours.shape
    apart = float((theirs - ours).double().norm() / theirs.double().norm().clamp(min=1e-30)) if same else float("inf")
    if not apart <= (CLOSE if theirs.is_floating_point() else 0.0):
        sys.exit(f"{what}: results differ, shapes {tuple(theirs.shape)} and {tuple(ours.shape)}, relative {apart:.2g}")
    return apart


Runs = dict[str, Callable[[], Tensor]]


def cases_of(args: Args, ops: Any) -> Iterator[tuple[dict[str, Any], Runs, Runs]]:
    """Return what is measured one by one: its settings, what is timed, and what is compared before."""
    channels = 8 if args.tiny else CHANNELS
    for case in [Align(20, 7, 8)] if args.tiny else ALIGNS:
        exact = align_runs(case, channels, ops.roi_align, torch.float64)
        for kind, runs in align_runs(case, channels, ops.roi_align).items():
            about = {"operator": "RoIAlign", "pass": kind, "boxes": case.boxes, "side": case.side}
            yield {**about, "stride": case.stride, "channels": channels}, runs, exact[kind]
    for case in [Suppress(60, 5, 0.7)] if args.tiny else SUPPRESSIONS:
        about = {"operator": "NMS", "pass": "forward", "boxes": case.boxes, "groups": case.groups}
        runs = suppress_runs(case, ops.batched_nms)
        yield {**about, "overlap": case.overlap}, runs, runs


def measured(args: Args, versions: dict[str, object], ops: Any) -> Iterator[dict[str, Any]]:
    """Return a record of each figure, one by one."""
    for about, runs, exact in cases_of(args, ops):
        apart = compared(exact, str(about))
        seconds = timed(runs, seconds=0.0 if args.tiny else args.seconds, least=1 if args.tiny else 5)
        figures = {"seconds": seconds, "over_torchvision": seconds["theirs"] / seconds["ours"], "apart": apart}
        yield {**versions, **about, **figures, "load": [round(one, 2) for one in os.getloadavg()]}


def show(records: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table("operator", "boxes", "what", "pass", "torchvision, ms", "ours, ms", "ratio", "load")
    for one in records:
        align = one["operator"] == "RoIAlign"
        what = f"side {one['side']}, stride {one['stride']}" if align else f"{one['groups']} groups, {one['overlap']}"
        theirs, ours = (f"{1e3 * one['seconds'][name]:.1f}" for name in ("theirs", "ours"))
        load = f"{one['load'][0]:.1f}"
        ratio = f"{one['over_torchvision']:.2f}"
        table.add_row(str(one["operator"]), f"{one['boxes']:,}", what, str(one["pass"]), theirs, ours, ratio, load)
    Console(width=120).print(table)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        sys.exit(f"torchvision cannot be imported ({error}): make an environment of its own, see --help")
    torch.set_num_threads(1)
    versions = {**machine(), "torchvision": torchvision.__version__}
    records = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for record in measured(args, versions, torchvision.ops):
        records.append(record)
        with args.out.open("a") as file:  # at once: a run that is stopped has told something
            file.write(json.dumps(record) + "\n")
    show(records)


if __name__ == "__main__":
    main()
