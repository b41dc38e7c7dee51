"""The memory of one training step of Cascade Mask R-CNN on a CPU, beside the formula of docs/models.md.

    python benchmarks/cascade_memory.py             # SwinV2-T, one picture of 800 x 1,333, about a minute
    python benchmarks/cascade_memory.py --tiny      # a look whether it runs, in seconds

One forward and backward in float32 in a process of its own, on as many objects as a stage may have positives, so that
every stage sees all regions that it may. Peaks are those of the resident memory above what it was before the step, with
weights, picture and a first small step done. The process returns freed memory at once (MALLOC_MMAP_THRESHOLD_): the
peak is of what is in use, and not of holes in a heap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from synchromesh.models.heads.cascade.box_stage import BoxStages
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeDetector, CascadeMaskRCNN
from synchromesh.models.heads.cascade.memory import NUMBER, kept_bytes, working_bytes
from synchromesh.models.heads.objects import Objects
from synchromesh.models.swin_v2 import SwinV2Config

RESULTS = Path(__file__).parent / "results" / "cascade_memory.jsonl"
CLASSES = 80
TINY = CascadeMaskRCNN(width=64, boxes=BoxStages(sampled=128, hidden=64))
WARM = 64  # side of the picture of the first step


@dataclass(frozen=True)
class Args:
    """What to measure. height, width: of the picture. embed, depths: of the SwinV2. tiny: a small picture and model."""

    height: int = 800
    width: int = 1333
    embed: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    threads: int = 1
    tiny: bool = False
    out: Path = RESULTS
    job: bool = False  # set by this program for the process that it starts


def head_of(args: Args) -> CascadeMaskRCNN:
    return TINY if args.tiny else CascadeMaskRCNN()


def config_of(args: Args) -> SwinV2Config:
    return SwinV2Config(
        image_size=(args.height, args.width),
        embed_dim=args.embed,
        depths=args.depths,
        num_heads=tuple(args.embed // 32 << stage for stage in range(4)),
        window_size=8,
        drop_path=0.0,
    )


def backbone_bytes(config: SwinV2Config) -> int:
    """Return what a true SwinV2 keeps of one picture: 19 D + h N numbers of each position and block (docs/models.md).

    Of the 19 D the 7 of attention are of positions filled up to whole windows. Patches, merges and the normalised map
    are taken as 2 D for each position of a stage.
    """
    height, width = config.image_size if isinstance(config.image_size, tuple) else (config.image_size,) * 2
    numbers = config.in_channels * height * width
    for stage, depth in enumerate(config.depths):
        (rows, columns), side, channels = config.map_size(stage), config.window(stage), config.width(stage)
        filled = (rows + -rows % side) * (columns + -columns % side)
        attention = filled * (7 * channels + config.num_heads[stage] * side**2)
        numbers += depth * (12 * rows * columns * channels + attention) + 2 * rows * columns * channels
    return NUMBER * numbers


def objects_of(args: Args) -> Objects:
    """Return as many objects as a stage may have positives, of 20 to 60 pixels where there is room."""
    own = head_of(args).boxes
    count = int(own.sampled * own.positive_share)
    most = torch.tensor([args.width, args.height]) / 4
    size = (20 + 40 * torch.rand(count, 2)).minimum(most)
    corner = torch.rand(count, 2) * (torch.tensor([args.width, args.height]) - size)
    boxes = torch.cat([corner, corner + size], dim=1)
    masks = torch.zeros(count, args.height, args.width, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return Objects(torch.zeros(count, dtype=torch.int64), boxes, torch.randint(0, CLASSES, (count,)), masks)


def resident(name: str) -> int:
    """Return a line of this process's status, in bytes: VmRSS is what it has now, VmHWM the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def step(model: CascadeDetector, images: torch.Tensor, truth: Objects, seen: dict[str, float]) -> None:
    start = perf_counter()
    sums = model(images, torch.tensor([images.shape[2:]]), truth)
    seen |= {"forward": resident("VmRSS"), "forward_seconds": perf_counter() - start}
    weights, counts = model.settings.weights(), model.settings.counts(len(truth), 1)
    torch.stack([weights[name] * total / counts[name] for name, total in sums.items()]).sum().backward()
    seen |= {"backward": resident("VmRSS"), "seconds": perf_counter() - start}


def measure(args: Args) -> dict[str, float]:
    """Take the step; return what was resident when, less what was before it."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = head_of(args).build(config_of(args).build(), CLASSES)
    images, truth = torch.randn(1, 3, args.height, args.width), objects_of(args)
    small = Objects(truth.image[:1], torch.tensor([[4.0, 4, 40, 40]]), truth.labels[:1], truth.masks[:1, :WARM, :WARM])  # pyright: ignore[reportOptionalSubscript]
    step(model, images[:, :, :WARM, :WARM], small, {})
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before, seen = resident("VmRSS"), {}
    step(model, images, truth, seen)
    found = {name: seen[name] - before for name in ("forward", "backward")}
    return {
        **found,
        "peak": resident("VmHWM") - before,
        **{name: seen[name] for name in ("forward_seconds", "seconds")},
    }


def formula(args: Args) -> Mapping[str, int]:
    config, head = config_of(args), head_of(args)
    with torch.device("meta"):
        model = head.build(config.build(), CLASSES)
    about = {"strides": model.strides, "num_classes": CLASSES, "height": args.height, "width": args.width}
    return {
        "weights": NUMBER * sum(parameter.numel() for parameter in model.parameters()),
        "backbone": backbone_bytes(config),
        **kept_bytes(head, widths=model.backbone.widths, **about),  # pyright: ignore[reportArgumentType]
        "working": working_bytes(head, **about),
    }


def show(record: Mapping[str, Any]) -> None:
    table = Table("MiB", "formula", "measured", title="One step, one picture")
    said, seen = record["formula"], record["measured"]
    kept = sum(said.values()) - said["weights"] - said["working"]
    for name, wanted, got in (
        *((name, said[name], None) for name in said),
        ("kept by forward", kept, seen["forward"]),
        ("peak beside weights", kept + said["working"], seen["peak"]),
        ("gradients after backward", said["weights"], seen["backward"]),
    ):
        table.add_row(name, f"{wanted / 2**20:,.0f}", "" if got is None else f"{got / 2**20:,.0f}")
    Console(width=100).print(table, f"measured peak over formula: {record['peak_over_formula']:.3f}")


def main(args: Args) -> None:
    if args.tiny:
        args = replace(args, height=128, width=160, embed=32, depths=(1, 1, 1, 1))
    if args.job:
        print(json.dumps(measure(args)))
        return
    from layer import machine  # here: it brings others' layers, which the measured process need not load

    given = [f"--height={args.height}", f"--width={args.width}", f"--embed={args.embed}", f"--threads={args.threads}"]
    done = subprocess.run(
        [sys.executable, __file__, "--job", *given, "--depths", *map(str, args.depths), *["--tiny"] * args.tiny],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    measured, said = json.loads(done.stdout), formula(args)
    settings = {name: value for name, value in asdict(args).items() if name not in ("out", "job", "tiny", "threads")}
    about = {**machine(), "threads": args.threads}
    over = measured["peak"] / (sum(said.values()) - said["weights"])
    record = {**about, **settings, "formula": dict(said), "measured": measured, "peak_over_formula": round(over, 4)}
    show(record)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
