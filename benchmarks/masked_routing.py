"""What masked tokens do to routers: where hidden and visible tokens go, layer by layer, while SimMIM learns.

    python benchmarks/masked_routing.py            # experts early, late, everywhere; routers with places and without
    python benchmarks/masked_routing.py --seeds    # only the table and the picture of what is there
    python benchmarks/masked_routing.py --tiny     # a look whether it runs, in seconds

The recipe `simmim_demo`, with experts in the first stage, in the second (as the recipe has them), or in every block,
and with routers that see a token alone, or also where it lies in its map (`--model.experts.router.places`). At step 0,
and every some steps, the model looks at fixed crops of photographs that it does not learn from; a line of JSON says,
for each layer, the share of hidden and of visible tokens that each expert got, and the gap between them: half the sum
of the differences, 0 where both go to the same experts, 1 where they share none. Beside it stands the gap of tokens
that are told apart by the mask of another crop: what chance does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import machine
from torch import Tensor, nn

from synchromesh import seeds as streams
from synchromesh.models.mixtures import LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.recipes.simmim_demo import simmim_demo
from synchromesh.tasks.simmim import Hidden, SimMIM, loads_apart
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.folds import splits_of
from synchromesh.training.interrupt import StopWish
from synchromesh.training.job import Event, Job
from synchromesh.training.loop import fit
from synchromesh.training.metrics import short_name
from synchromesh.training.page.axes import Axis
from synchromesh.training.page.charts import HEIGHT, WIDTH, Curve, line_chart
from synchromesh.training.page.elements import tag
from synchromesh.training.page.style import STYLE
from synchromesh.training.run_folder import build_model

Record = dict[str, Any]
Where = Literal["early", "late", "every"]
BLOCKS: Mapping[Where, tuple[tuple[int, ...], ...]] = {
    "early": ((0, 1), ()),
    "late": ((), (1, 3)),
    "every": ((0, 1), (0, 1, 2, 3)),
}
TINY = {"embed_dim": 16, "num_heads": (1, 2)}
TITLE = 40  # pixels above a chart


@dataclass(frozen=True)
class Args:
    """What to train.

    Attributes:
        seeds: of each model.
        where: the blocks that have experts.
        places: frequencies of the place that a router sees; 0 for one that does not.
        epochs: of 2,048 crops.
        every: steps between two lines.
        watched: crops that are looked at.
        threads: of the processor.
        tiny: a small model and few crops.
        out: lines of JSON.
        picture: file of it.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    where: tuple[Where, ...] = tuple(BLOCKS)
    places: tuple[int, ...] = (0, 4)
    epochs: int = 6
    every: int = 16
    watched: int = 128
    threads: int = 1
    tiny: bool = False
    out: Path = Path(__file__).parent / "results" / "masked_routing.jsonl"
    picture: Path = Path(__file__).parents[1] / "docs" / "images" / "masked-routing.svg"


def recipe(where: Where, places: int, seed: int, args: Args) -> TrainConfig:
    """Return the run of one model."""
    config = simmim_demo()
    task, swin = config.task, config.model
    assert isinstance(task, SimMIM)
    assert isinstance(swin, SwinV2Config)
    experts = swin.experts
    assert experts is not None
    assert isinstance(experts.router, LinearGate)
    experts = dataclasses.replace(
        experts, blocks=BLOCKS[where], router=dataclasses.replace(experts.router, places=places)
    )
    swin = dataclasses.replace(swin, experts=experts, **(TINY if args.tiny else {}))
    crops = 64 if args.tiny else task.data.train
    task = dataclasses.replace(task, data=dataclasses.replace(task.data, train=crops, test=args.watched))
    optim = dataclasses.replace(config.optim, warmup_epochs=min(config.optim.warmup_epochs, args.epochs / 3))
    config = dataclasses.replace(config, task=task, model=swin, twin=None, optim=optim, epochs=args.epochs, seed=seed)
    return dataclasses.replace(config, keep=Keep(evaluate_epochs=args.epochs, best=False))


# loads


def gap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return half the sum of the differences of two lists of shares.

    >>> gap([0.5, 0.5, 0.0], [0.0, 0.5, 0.5])
    0.5
    """
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / 2


def shares(counts: Tensor) -> list[list[float]]:
    found = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    return [[round(value, 5) for value in own] for own in found.tolist()]


@torch.no_grad()
def looked_at(model: nn.Module, batch: Hidden) -> Record:
    """Return what a line says of each layer."""
    training, own, others = model.training, {}, {}
    model.eval()
    # Tokens told apart by the mask of another picture: kinds that the model cannot know.
    with loads_apart(model, batch.hidden, own), loads_apart(model, batch.hidden.roll(1, 0), others):
        model(batch.images, batch.hidden)
    model.train(training)
    said = {}
    for name, counts in own.items():
        hidden, visible = shares(counts)
        by_chance = round(gap(*shares(others[name])), 5)
        about = {"gap": round(gap(hidden, visible), 5), "by_chance": by_chance, "hidden": hidden, "visible": visible}
        said[short_name(name)] = about
    return said


def measured(where: Where, places: int, seed: int, args: Args) -> Iterator[Record]:
    """Train a model; yield its lines."""
    config = recipe(where, places, seed, args)
    task, splits = config.task, splits_of(config)
    with streams.torch_seeded(torch.device("cpu"), seed, streams.INIT):
        model = build_model(task, config.model, splits.facts)
    crops = [splits.test.read(number) for number in range(args.watched)]
    batch = task.prepare(crops, splits.facts, torch.device("cpu"), None)
    assert isinstance(batch, Hidden)
    about = {"where": where, "places": places, "seed": seed, "epochs": args.epochs}
    lines = [{**about, "step": 0, "layers": looked_at(model, batch)}]

    def tell(event: Event) -> None:
        step = event.step + 1  # that is told before it is counted
        if event.kind == "step" and (step % args.every == 0 or step == event.total):
            lines.append({**about, "step": step, "layers": looked_at(model, batch)})

    with tempfile.TemporaryDirectory() as folder:
        found = fit(Job(config, model, splits, Path(folder), {}, StopWish(), tell)).evaluation.scores.numbers
    lines[-1] |= {"last": True, **found, **machine()}
    yield from lines


# what there is


def curves(records: Sequence[Record], where: Where, places: int) -> list[Curve]:
    """Return the gap of each layer over the steps, mean over seeds, and that of chance, mean over layers."""
    own = [one for one in records if (one["where"], one["places"]) == (where, places)]
    steps = sorted({one["step"] for one in own})
    named = sorted({name for one in own for name in one["layers"]})
    drawn = []
    for color, name in enumerate(named):
        points = [(step, mean_of(own, step, lambda one, name=name: one["layers"][name]["gap"])) for step in steps]
        drawn.append(Curve(name, tuple(points), color))
    chance = [(step, mean_of(own, step, chance_of)) for step in steps]
    return [*drawn, Curve("by chance", tuple(chance), 7, "dashed")]


def chance_of(line: Record) -> float:
    return statistics.fmean(layer["by_chance"] for layer in line["layers"].values())


def mean_of(records: Sequence[Record], step: int, number: Callable[[Record], float]) -> float:
    return statistics.fmean(number(one) for one in records if one["step"] == step)


def drawing(records: Sequence[Record]) -> Element:
    """Return the picture: a chart for each place of the experts, below each other, and each router, side by side."""
    rows = [where for where in BLOCKS if any(one["where"] == where for one in records)]
    columns = sorted({one["places"] for one in records})
    inside: list[Element] = [tag("style", STYLE), tag("rect", width="100%", height="100%", style="fill: var(--card)")]
    for row, where in enumerate(rows):
        for column, places in enumerate(columns):
            made = curves(records, where, places)
            chart = line_chart("gap", Axis("step"), Axis("gap", low=0.0, high=1.0), made)
            if len(made) == 1 or chart is None:
                continue
            sees = "a token and its place" if places else "a token alone"
            x, y = column * (WIDTH + 20) + 10, row * (HEIGHT + TITLE + 14) + 8
            title = tag("text", f"experts {where}, routers see {sees}", class_="ink", x=x + 4, y=y + 14)
            inside += [title, *names_of(made, x, y + 30)]
            inside.append(tag("svg", *chart.find("svg"), x=x, y=y + TITLE, width=WIDTH, height=HEIGHT))
    width, height = len(columns) * (WIDTH + 20) + 10, len(rows) * (HEIGHT + TITLE + 14) + 12
    about = "Gap between the loads of hidden and of visible tokens, by layer, over the steps of SimMIM"
    box = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return tag("svg", *inside, xmlns="http://www.w3.org/2000/svg", role="img", aria_label=about, **box)


def names_of(made: Sequence[Curve], x: float, y: float) -> Iterator[Element]:
    """Yield the legend of a chart, in one line."""
    for curve in made:
        yield tag("rect", class_=f"fill k{curve.color}", x=x + 4, y=y - 8, width=8, height=8)
        short = curve.name.replace("stage ", "").replace(", block ", ".")
        yield tag("text", short, x=x + 15, y=y)
        x += 24 + 6.2 * len(short)


def table(records: Sequence[Record]) -> Table:
    """Return the gap of each layer at the last step and its largest one, mean and standard error over seeds."""
    shown = Table("experts", "places", "layer", "gap, first step", "largest", "last", "by chance", "L1 hidden", "seeds")
    done = [one for one in records if one.get("last")]
    for where, places in dict.fromkeys((one["where"], one["places"]) for one in done):
        last = [one for one in done if (one["where"], one["places"]) == (where, places)]
        for name in last[0]["layers"]:
            own = [one for one in records if (one["where"], one["places"]) == (where, places)]
            of_seed = [[one["layers"][name]["gap"] for one in own if one["seed"] == run["seed"]] for run in last]
            first, largest = [gaps[0] for gaps in of_seed], [max(gaps) for gaps in of_seed]
            ends = [run["layers"][name]["gap"] for run in last]
            chance, error = ([get(run) for run in last] for get in (chance_of, lambda run: run["masked_l1"]))
            cells = (spread(values) for values in (first, largest, ends, chance, error))
            shown.add_row(where, str(places), name, *cells, str(len(last)))
    return shown


def spread(values: Sequence[float]) -> str:
    """Return 'mean ± standard error'."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    if args.tiny:
        args = dataclasses.replace(args, epochs=1, every=1, watched=8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    done = {(one["where"], one["places"], one["seed"], one["epochs"]) for one in records if one.get("last")}
    for seed in args.seeds:
        for where in args.where:
            for places in args.places:
                if (where, places, seed, args.epochs) in done:
                    continue
                found = list(measured(where, places, seed, args))
                with args.out.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in found)
                records += found
                print(f"seed {seed}, experts {where}, places {places}: done", flush=True)
    if records:
        Console(width=140).print(table(records))
        args.picture.write_text(ElementTree.tostring(drawing(records), encoding="unicode") + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
