"""The demo over several seeds: accuracy, training seconds and dead experts of the MoE and of its dense twin.

    python benchmarks/demo.py --seeds 0 1 2             train all, one line each in benchmarks/results/demo.jsonl
    python benchmarks/demo.py --seeds 0 --models moe    one of them
    python benchmarks/demo.py --products float8         with experts that multiply 8-bit numbers: the losses must agree
    python benchmarks/demo.py --seeds                   only print mean and spread of what is there

Each model is trained alone, by the recipe and the code of `synchromesh train demo`; a test holds that code.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from timing import machine

from synchromesh import Float8Products, MXFloat8Products
from synchromesh.commands.context import Context
from synchromesh.commands.train import train
from synchromesh.recipes.catalog import CATALOG
from synchromesh.recipes.demo import demo
from synchromesh.training.config import TrainConfig

RESULTS = Path(__file__).parent / "results" / "demo.jsonl"
PRODUCTS = {"none": None, "float8": Float8Products(), "mxfloat8": MXFloat8Products()}
FIGURES = ("test_accuracy", "train_seconds", "images_per_second", "dead_experts")
ABOUT = (
    "test_loss",
    "parameters",
    "active_parameters",
    "epochs",
    "test_images",
    "test_load",
    "threads",
    "torch",
    "python",
)


@dataclass(frozen=True)
class Args:
    """What to train.

    Attributes:
        seeds: one run each.
        models: which of the two.
        tile: token rounding of the MoE, 0 for none.
        products: 8-bit numbers that its experts multiply; none for rows and weights as they are.
        out: file to append to.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    models: tuple[Literal["moe", "dense"], ...] = ("moe", "dense")
    tile: int = 0
    products: Literal["none", "float8", "mxfloat8"] = "none"
    out: Path = RESULTS


def alone(model: str, seed: int, args: Args) -> TrainConfig:
    """Return the demo's recipe for one of its two models."""
    config = dataclasses.replace(demo(), seed=seed)
    if model == "dense":
        assert config.twin is not None
        config = dataclasses.replace(config, model=config.twin)
    elif config.model.experts is not None:
        router = dataclasses.replace(config.model.experts.router, tile=args.tile)
        experts = dataclasses.replace(config.model.experts, router=router, products=PRODUCTS[args.products])
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, experts=experts))
    return dataclasses.replace(config, twin=None)


def measure(model: str, seed: int, args: Args, console: Console) -> dict[str, Any]:
    """Train one model from scratch and return its line."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        context = Context(console, console, lambda: CATALOG)
        code = train(alone(model, seed, args), run, resume=False, context=context)
        if code != 0:
            raise RuntimeError(f"the run of {model}, seed {seed}, ended with exit code {code}")
        summary = json.loads((run / "summary.json").read_text())
    figures = {name: summary[name] for name in (*FIGURES, *ABOUT)}
    return {"benchmark": "demo", "model": name_of(model, args), "seed": seed, **figures, **machine()}


def name_of(model: str, args: Args) -> str:
    """Return the model's name in the results: what is not the recipe's own is in it."""
    if model == "dense":
        return model
    tile = [f"tile {args.tile}"] if args.tile else []
    products = [] if args.products == "none" else [args.products]
    return ", ".join([model, *tile, *products])


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Return mean and spread (smallest to largest) over the newest line of each seed."""
    shown = Table("model", "seeds", *(name.replace("_", " ") for name in FIGURES), title="recipe demo")
    for model in sorted({line["model"] for line in lines}, reverse=True):
        newest = {line["seed"]: line for line in lines if line["model"] == model}
        cells = (spread([line[name] for line in newest.values()], name) for name in FIGURES)
        shown.add_row(model, str(len(newest)), *cells)
    return shown


def spread(values: Sequence[float], name: str) -> str:
    """Return 'mean (smallest to largest)'."""
    form = "{:.2%}" if name == "test_accuracy" else "{:,.0f}"
    mean, low, high = (form.format(v) for v in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def main(args: Args) -> None:
    console = Console()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for model in args.models:
            line = measure(model, seed, args, console)
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    if args.out.is_file():
        console.print(table([json.loads(line) for line in args.out.read_text().splitlines()]))


if __name__ == "__main__":
    main(tyro.cli(Args))
