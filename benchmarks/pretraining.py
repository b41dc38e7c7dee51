"""A step of SimMIM on this library's SwinV2 beside transformers' Swinv2ForMaskedImageModeling, in one run.

    python benchmarks/pretraining.py               # SwinV2-T and -B at 192 pixels, the mixture's step beside them
    python benchmarks/pretraining.py --tiny        # a look whether it runs, in seconds

Both have the same weights. A step is forward, loss, backward and AdamW. Losses are compared first; where they differ no
time is printed. Rounds are interleaved, times are medians; *theirs / ours* above 1 says that ours is faster. Nothing
else should run meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import machine, timed
from torch import Tensor, nn
from transformers import Swinv2Config, Swinv2ForMaskedImageModeling

from synchromesh.compat.huggingface.swin.weights import from_transformers
from synchromesh.data.hiding import random_cells
from synchromesh.models.heads.pixels import PixelDecoder, masked_l1
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.record import aux_loss

SIZES = {"tiny": (96, (2, 2, 6, 2), 3), "base": (128, (2, 2, 18, 2), 4)}
CELL, RATIO, LEAST_EQUAL = 32, 0.6, 1e-4


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        sizes: of the backbone.
        batch: pictures of a step.
        seconds: of timing for each contestant.
        threads: 0 for torch's own choice.
        tiny: a small backbone and two rounds.
        out: lines of JSON.
    """

    sizes: tuple[str, ...] = tuple(SIZES)
    batch: int = 8
    seconds: float = 20.0
    threads: int = 0
    tiny: bool = False
    out: Path = Path(__file__).parent / "results" / "pretraining.jsonl"


@dataclass(frozen=True)
class Problem:
    """Normalised pictures, and what of them is hidden."""

    images: Tensor
    hidden: Tensor


def problem_of(batch: int, side: int, cell: int) -> Problem:
    rng = np.random.default_rng(0)
    cells = [random_cells(side, side, cell=cell, ratio=RATIO, rng=rng) for _ in range(batch)]
    return Problem(torch.randn(batch, 3, side, side), torch.from_numpy(np.stack(cells)))


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def measured(name: str, args: Args) -> dict[str, object]:
    """Compare and time one size; a line of results."""
    width, depths, heads = (16, (1, 1, 1, 1), 1) if args.tiny else SIZES[name]
    side, window, cell = (64, 4, 16) if args.tiny else (192, 12, CELL)
    config = SwinV2Config(
        image_size=side, embed_dim=width, depths=depths, num_heads=tuple(heads * 2**i for i in range(4)),
        window_size=window, drop_path=0.0,
    )  # fmt: skip
    p = problem_of(args.batch, side, max(cell, 32))
    torch.manual_seed(0)
    theirs = Swinv2ForMaskedImageModeling(
        Swinv2Config(
            image_size=side, embed_dim=width, depths=list(depths), num_heads=[heads * 2**i for i in range(4)],
            window_size=window, drop_path_rate=0.0, encoder_stride=32,
        )
    )  # fmt: skip
    ours = PixelDecoder(config.hiding().build(), 3)
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    experts = ExpertsConfig(num_experts=8, blocks=((), (), (depths[2] - 1,), (depths[3] - 1,)))
    mixed = PixelDecoder(dataclasses.replace(config, experts=experts).hiding().build(), 3)
    patches, count = p.hidden[:, ::4, ::4].flatten(1), float(p.hidden.sum()) * 3

    def drawn(model: nn.Module) -> Tensor:
        return masked_l1(model(p.images, p.hidden), p.images, p.hidden) / count + aux_loss(model)

    with torch.no_grad():
        losses = float(drawn(ours)), float(theirs(p.images, bool_masked_pos=patches).loss)
    if abs(losses[0] / losses[1] - 1) > LEAST_EQUAL:
        raise SystemExit(f"losses are {losses}, wanted the same model")
    runs = {
        "ours": step_of(ours, lambda: drawn(ours)),
        "theirs": step_of(theirs, lambda: theirs(p.images, bool_masked_pos=patches).loss),
        "mixture": step_of(mixed, lambda: drawn(mixed)),
    }
    times = timed(runs, seconds=0.0 if args.tiny else args.seconds, least=2 if args.tiny else 5)
    return {"size": name, "side": side, "batch": args.batch, "seconds": times, **machine()}


def main(args: Args) -> None:
    """Measure all sizes, write a line of JSON for each, print the table."""
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table("SwinV2", "ours, ms", "transformers, ms", "theirs / ours", "8 experts in 2 blocks / dense")
    for name in args.sizes:
        record = measured(name, args)
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        seconds = record["seconds"]
        assert isinstance(seconds, dict)
        own, other, mixture = (seconds[key] for key in ("ours", "theirs", "mixture"))
        table.add_row(name, f"{1e3 * own:.0f}", f"{1e3 * other:.0f}", f"{other / own:.2f}", f"{mixture / own:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
