"""Cells found again on real pairs whose truth is known: what learning from two views is worth, and which twin is best.

    python benchmarks/matching.py                        # pixpro, contrast, cotap, three rules for the twin's gates
    python benchmarks/matching.py --samples samples      # with Aloe and graf, of samples.py samples --opencv
    python benchmarks/matching.py --tiny                 # a look whether it runs, in seconds

Each model learns from crops of photographs of which none is of a scored pair. Scored are the backbone's last maps: the
share of cells of the first picture whose most similar cell of the second lies within 0.7 diagonals of the true place,
beside raw pixels, chance, and the same backbone untrained. One line of results a model and seed.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import machine
from torch import nn

from synchromesh import cli
from synchromesh.data.scores.cells import found_again, raw_cells
from synchromesh.data.true_pairs import opencv_pairs, packaged_pairs, squares_of
from synchromesh.data.view_pairs import ViewPair
from synchromesh.recipes.catalog import CATALOG
from synchromesh.tasks.dense_twins import TwoViews, ViewTwins
from synchromesh.training.run_folder import load_trained, read_config

Record = dict[str, Any]
Model = Literal[
    "pixpro, gates averaged",
    "pixpro, gates copied",
    "pixpro, gates followed",
    "pixpro, dense",
    "pixel contrast",
    "cotap",
]
ROWS: Mapping[Model, list[str]] = {
    "pixpro, gates averaged": ["pixpro_demo"],
    "pixpro, gates copied": ["pixpro_demo", "--siamese.gates=copied"],
    "pixpro, gates followed": ["pixpro_demo", "--siamese.gates=followed"],
    "pixpro, dense": ["pixpro_demo", "--model.experts=none"],
    "pixel contrast": ["pixpro_demo", "--agreement", "pixel-contrast"],
    "cotap": ["cotap_demo"],
}
TINY = ["--epochs=1", "--data.train=16", "--data.test=4", "--batch-size=8", "--siamese.momentum.steps=2"]
SIDES = {"motorcycle": 120, "aloe": 240, "graf": 160}  # of squares, in pixels of the photographs


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        epochs: of each model.
        seeds: of each model.
        models: which of them.
        samples: folder with opencv-doc's pictures in `opencv`; without it the motorcycle alone.
        tiny: a small model and few crops, for one epoch.
        out: lines of JSON.
    """

    epochs: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)
    models: tuple[Model, ...] = tuple(ROWS)
    samples: Path | None = None
    tiny: bool = False
    out: Path = Path(__file__).parent / "results" / "matching.jsonl"


def pairs_of(args: Args) -> Mapping[str, list[ViewPair]]:
    """Return the squares of each pair."""
    every = packaged_pairs() + ([] if args.samples is None else opencv_pairs(args.samples / "opencv"))
    return {pair.name: list(squares_of(pair, side=SIDES[pair.name], size=64)) for pair in every}


@torch.no_grad()
def scored(model: nn.Module, batch: TwoViews, radius: float) -> dict[str, float]:
    """Return the shares over all cells of a pair."""
    backbone = model.eval().get_submodule("backbone")
    one, other = (backbone(images).last.float() for images in (batch.first, batch.second))
    own = found_again(one, other, batch.places, radius=radius)
    pixels, others = (raw_cells(images, one.shape[1]) for images in (batch.first, batch.second))
    raw = found_again(pixels, others, batch.places, radius=radius)
    weights = own.cells / own.cells.sum()
    shares = {"found_again": own.share, "by_raw_pixels": raw.share, "by_chance": own.chance}
    return {name: float((share * weights).sum()) for name, share in shares.items()}


def measured(name: str, options: list[str], seed: int, args: Args) -> Iterator[Record]:
    """Train a model; yield its scores on each pair, and those of the same one untrained."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        size = [*TINY] if args.tiny else [f"--epochs={args.epochs}"]
        words = ["train", *options, "--nproc=1", "--twin=none", f"--seed={seed}", f"--run={run}", *size]
        with contextlib.redirect_stdout(io.StringIO()):
            if code := cli.main(words):
                raise RuntimeError(f"synchromesh {' '.join(words)} ended with {code}")
        trained = load_trained(run, CATALOG)
        summary = json.loads((run / "summary.json").read_text())
        config = read_config(run, CATALOG)
    task = config.task
    assert isinstance(task, ViewTwins)
    torch.manual_seed(seed)
    fresh = task.build(task.sized(config.model), {})
    about = {"model": name, "seed": seed, "epochs": config.epochs, "seconds": summary["train_seconds"]}
    for pair, own in pairs_of(args).items():
        batch = task.prepare(own, {}, torch.device("cpu"), None)
        before = scored(fresh, batch, task.radius)["found_again"]
        yield {"pair": pair, **about, **scored(trained.model, batch, task.radius), "untrained": before}


def main(args: Args) -> None:
    for seed in args.seeds:
        for name in track(args.models, f"seed {seed}"):
            for record in measured(name, ROWS[name], seed, args):
                with args.out.open("a") as file:
                    file.write(json.dumps({**record, **machine()}) + "\n")
    show(args.out)


def show(path: Path) -> None:
    """Print mean and spread over seeds."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    table = Table("model", "pair", "found again", "untrained", "raw pixels", "chance", "seeds")
    for model, pair in dict.fromkeys((one["model"], one["pair"]) for one in records):
        own = [one for one in records if (one["model"], one["pair"]) == (model, pair)]
        cells = []
        for key in ("found_again", "untrained", "by_raw_pixels", "by_chance"):
            values = torch.tensor([one[key] for one in own])
            spread = f" ± {100 * values.std():.1f}" if len(own) > 1 and key in ("found_again", "untrained") else ""
            cells.append(f"{100 * values.mean():.1f}{spread} %")
        table.add_row(model, pair, *cells, str(len(own)))
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
