"""What a pretext is worth downstream: pre-trained without labels, tuned with few, against scratch, over several seeds.

    python benchmarks/transfer.py                                  # 10 labels a class, SimMIM and scratch, 5 seeds
    python benchmarks/transfer.py --arms scratch simmim pixpro cotap scratch_vit mixed_ae croco
    python benchmarks/transfer.py --tasks detect segment --arms scratch simmim cotap
    python benchmarks/transfer.py --seeds                          # only the table of what is there

Three tasks: digits by 10 labels a class ("classify"; accuracy on the 1,000 of MNIST that nothing learnt from), and
boxes ("detect": AP) and pixels ("segment": mIoU) of digits in 64 composed scenes, scored on 200. Pretexts learn from
photographs, or for digits from the 4,000 of MNIST without labels (`--pictures digits`: SimMIM then draws black, the
median of what is hidden, and learns nothing). MixedAE and CroCo want a ViT, which is compared with a ViT from scratch,
by digits alone. Every arm is tuned by the same settings.

A line of JSON for every run as soon as it is there; what is there already is not done again, and a run that was cut
goes on where it was saved. One seed draws the weights, the pretext's crops, and the few labels.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from timing import machine

from synchromesh.commands.context import Context
from synchromesh.commands.train import train
from synchromesh.data.images import Preprocess
from synchromesh.data.sources import MnistDigits
from synchromesh.models.features import BackboneConfig
from synchromesh.models.swin_v2_moe import DEMO
from synchromesh.models.twin import Momentum
from synchromesh.recipes.catalog import CATALOG
from synchromesh.recipes.croco_demo import VIT, vit_experts
from synchromesh.recipes.demo import PREPROCESS as DIGITS_SIZE
from synchromesh.recipes.demo import demo, experts
from synchromesh.recipes.detect_demo import PREPROCESS as SCENES_SIZE
from synchromesh.recipes.detect_demo import detect_demo
from synchromesh.recipes.segment_demo import segment_demo
from synchromesh.tasks.classification import Classification
from synchromesh.tasks.croco import CroCo
from synchromesh.tasks.dense_twins import ViewTwins
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.mixed_ae import MixedAE
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.tasks.simmim import SimMIM
from synchromesh.training.config import Keep, Start, TrainConfig
from synchromesh.training.task import Task

Record = dict[str, Any]
Arm = Literal["scratch", "simmim", "pixpro", "cotap", "scratch_vit", "mixed_ae", "croco"]
Downstream = Literal["classify", "detect", "segment"]
Model = Literal["moe", "dense"]
Pictures = Literal["digits", "photographs"]

OF_VIT = ("scratch_vit", "mixed_ae", "croco")
SCORES = {"classify": "test_accuracy", "detect": "test_AP", "segment": "test_mIoU"}


@dataclass(frozen=True)
class Place:
    """Where a backbone works: the size of its pictures, and how much is learnt from them.

    Attributes:
        size: of a picture, and how it is normalised: by the pretext as when it is tuned.
        window: of SwinV2's attention.
        cell: that SimMIM hides.
        crops: of an epoch of a pretext.
        pre_epochs: of a pretext.
        fine_epochs: of tuning.
    """

    size: Preprocess
    window: int
    cell: int
    crops: int
    pre_epochs: int
    fine_epochs: int


DIGITS = Place(DIGITS_SIZE, window=8, cell=8, crops=2048, pre_epochs=12, fine_epochs=50)
SCENES = Place(SCENES_SIZE, window=6, cell=16, crops=512, pre_epochs=6, fine_epochs=96)


@dataclass(frozen=True)
class Args:
    """What to train.

    Attributes:
        arms: pretexts, and what they are compared with.
        seeds: of each.
        tasks: downstream.
        models: with experts, and the dense twin.
        pictures: that pretexts learn from where digits are told apart.
        labels: digits of each class to tune with.
        scenes: to tune with.
        pre_epochs: of pretexts; 0 for 12, or 6 for scenes.
        fine_epochs: of tuning; 0 for 50, or 96 of scenes.
        simmim_lr: of SimMIM at its highest; the recipe's is too high for so few photographs (seed 100 told).
        threads: of the processor.
        tiny: few of everything, for tests.
        work: folder of the runs that are not done with.
        out: lines of JSON.
    """

    arms: tuple[Arm, ...] = ("scratch", "simmim")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tasks: tuple[Downstream, ...] = ("classify",)
    models: tuple[Model, ...] = ("moe", "dense")
    pictures: Pictures = "photographs"
    labels: int = 10
    scenes: int = 64
    pre_epochs: int = 0
    fine_epochs: int = 0
    simmim_lr: float = 2e-3
    threads: int = 1
    tiny: bool = False
    work: Path = Path("runs/transfer")
    out: Path = Path(__file__).parent / "results" / "transfer.jsonl"

    def place(self, task: Downstream) -> Place:
        """Return where a task's backbones work, as much as is asked for."""
        place = DIGITS if task == "classify" else SCENES
        if self.tiny:
            place = dataclasses.replace(place, crops=32, pre_epochs=1, fine_epochs=1)
        return dataclasses.replace(
            place,
            pre_epochs=self.pre_epochs or place.pre_epochs,
            fine_epochs=self.fine_epochs or place.fine_epochs,
        )


@dataclass(frozen=True)
class Row:
    """One run to be scored."""

    task: Downstream
    arm: Arm
    model: Model
    seed: int

    @property
    def learnt(self) -> bool:
        """Whether a pretext comes first."""
        return not self.arm.startswith("scratch")

    def settings(self, args: Args) -> Record:
        """Return what tells its line from those of other runs."""
        place = args.place(self.task)
        few = args.labels if self.task == "classify" else args.scenes
        said = {"task": self.task, "arm": self.arm, "model": self.model, "seed": self.seed, "labelled": few}
        said |= {"fine_epochs": place.fine_epochs}
        if self.learnt:
            said |= {"pictures": self.pictures(args), "crops": place.crops, "pre_epochs": place.pre_epochs}
        return said

    def pretext_run(self, args: Args) -> Path:
        """Return the folder of its pretext, which tasks of one place share."""
        place = args.place(self.task)
        learnt = f"{place.size.image_size}-{self.pictures(args)}-{place.crops}-{place.pre_epochs}"
        return args.work / "pretexts" / f"{self.arm}-{self.model}-{self.seed}-{learnt}"

    def pictures(self, args: Args) -> Pictures:
        """Return what its pretext learns from."""
        return args.pictures if self.task == "classify" else "photographs"


# models


def backbone(row: Row, place: Place) -> BackboneConfig:
    """Return the backbone, for pictures of any size."""
    if row.arm in OF_VIT:
        vit = dataclasses.replace(VIT, patch_size=4)
        return vit if row.model == "dense" else dataclasses.replace(vit, experts=vit_experts())
    swin = dataclasses.replace(DEMO, window_size=place.window)
    return swin if row.model == "dense" else dataclasses.replace(swin, experts=experts())


# pretexts


def digits_folder(folder: Path, *, most: int) -> Path:
    """Write the digits of MNIST to learn from as files without their classes, once; return the folder."""
    done = folder / f"digits-{most}"
    if not done.is_dir():
        images = MnistDigits().load(Preprocess(image_size=28, channels=1)).train
        unfinished = folder / f"digits-{most}-unfinished"
        unfinished.mkdir(parents=True, exist_ok=True)
        for number in range(min(most, len(images))):
            Image.fromarray(images.read(number)[0].numpy()).save(unfinished / f"{number:05}.png")
        unfinished.rename(done)
    return done


def of_digits(task: Task, folder: Path) -> Task:
    """Return a pretext on digits: crops show most of one, and none is mirrored."""
    found = task.reading(folder)
    if isinstance(found, CroCo):
        assert found.data.also is None
        crops = {"scale": (0.7, 0.9), "shift": 0.15}
        sources = {name: getattr(found.data, name) for name in ("learnt", "scored", "wrong")}
        sources = {name: dataclasses.replace(own, **crops) for name, own in sources.items()}
        return dataclasses.replace(found, data=dataclasses.replace(found.data, **sources))
    assert isinstance(found, SimMIM | ViewTwins | MixedAE)
    cut = {"area": (0.4, 1.0)} if isinstance(found, ViewTwins) else {"scale": (0.8, 1.0)}
    return dataclasses.replace(found, data=dataclasses.replace(found.data, flip=0.0, **cut))


def pretext(row: Row, args: Args) -> TrainConfig:
    """Return the run without labels: that of the recipe, on grey pictures of the size that the task has."""
    place, config = args.place(row.task), CATALOG.recipes[f"{row.arm}_demo"]()
    task = config.task
    assert isinstance(task, SimMIM | ViewTwins | MixedAE | CroCo)
    count = place.crops // task.group if isinstance(task, MixedAE) else place.crops
    data = dataclasses.replace(task.data, preprocess=place.size, train=count, test=8 if args.tiny else 64)
    own: Record = {"data": data}
    if isinstance(task, SimMIM):
        own["cell"] = place.cell
    elif isinstance(task, ViewTwins):
        steps = place.pre_epochs * -(-count // config.batch_size)
        own["siamese"] = dataclasses.replace(task.siamese, momentum=Momentum(0.97, 1.0, steps))
    else:
        own["patch"] = 4
    task = dataclasses.replace(task, **own)
    if row.pictures(args) == "digits":
        task = of_digits(task, digits_folder(args.work, most=40 if args.tiny else 4000))
    optim = dataclasses.replace(config.optim, warmup_epochs=min(config.optim.warmup_epochs, place.pre_epochs / 4))
    if isinstance(task, SimMIM):
        optim = dataclasses.replace(optim, lr=args.simmim_lr)
    config = dataclasses.replace(config, task=task, model=backbone(row, place), twin=None, optim=optim)
    return alone(config, row.seed, place.pre_epochs)


# tuning


def tuning(row: Row, args: Args, weights: Path | None) -> TrainConfig:
    """Return the run with few labels."""
    place = args.place(row.task)
    if row.task == "classify":
        config, shots = demo(), 1 if args.tiny else args.labels
        assert isinstance(config.task, Classification)
        task = dataclasses.replace(config.task, data=dataclasses.replace(config.task.data, shots=shots))
        config = dataclasses.replace(config, task=task, batch_size=50)
    else:
        config = detect_demo() if row.task == "detect" else segment_demo()
        task = config.task
        assert isinstance(task, Detection | Segmentation)
        scenes, scored = (8, 4) if args.tiny else (args.scenes, 200)
        source = dataclasses.replace(task.data.source, train=scenes, test=scored, fixed=row.seed)
        task = dataclasses.replace(task, data=dataclasses.replace(task.data, source=source))
        config = dataclasses.replace(config, task=task)
    optim = dataclasses.replace(config.optim, warmup_epochs=place.fine_epochs / 10)
    start = Start(weights=weights)
    config = dataclasses.replace(config, model=backbone(row, place), twin=None, optim=optim, start=start)
    return alone(config, row.seed, place.fine_epochs)


def alone(config: TrainConfig, seed: int, epochs: int) -> TrainConfig:
    """Return a run that is scored at its end only."""
    keep = Keep(evaluate_epochs=epochs, best=False)
    loading = dataclasses.replace(config.loading, workers=1)
    return dataclasses.replace(config, seed=seed, epochs=epochs, keep=keep, loading=loading)


def trained(config: TrainConfig, run: Path) -> Record:
    """Train, or go on with what was cut; return the summary."""
    said = Console(file=io.StringIO())
    context = Context(said, said, lambda: CATALOG)
    if code := train(config, run, resume=(run / "recipe.json").is_file(), context=context):
        raise SystemExit(code)
    return json.loads((run / "summary.json").read_text())


# lines


def records_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def same(record: Record, settings: Record) -> bool:
    return all(record.get(name) == value for name, value in settings.items())


def measured(row: Row, args: Args) -> Record:
    """Train a row's runs; return its line."""
    name = "-".join(map(str, row.settings(args).values()))
    about: Record = {}
    weights = row.pretext_run(args) if row.learnt else None
    if weights is not None:
        config = pretext(row, args)
        found, first = trained(config, weights), config.task.numbers[0].name
        about = {first: found[f"test_{first}"], "pretext_seconds": found["train_seconds"]}
    found = trained(tuning(row, args, weights), args.work / name)
    shutil.rmtree(args.work / name)
    about |= {"score": found[SCORES[row.task]], "seconds": found["train_seconds"], "parameters": found["parameters"]}
    return {**row.settings(args), **about, **machine()}


def rows(args: Args) -> Iterator[Row]:
    """Yield what is asked for, seed by seed; scenes are for SwinV2 alone."""
    for seed in args.seeds:
        for task in args.tasks:
            for arm in args.arms:
                for model in args.models:
                    if task == "classify" or arm not in OF_VIT:
                        yield Row(task, arm, model, seed)


# table


def spread(values: Sequence[float]) -> str:
    """Return 'mean ± standard error'.

    >>> spread([0.5, 0.7])
    '0.600 ± 0.100'
    """
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


def groups(records: Sequence[Record]) -> Mapping[tuple[Any, ...], dict[int, float]]:
    """Return the newest score of each seed, by all that tells rows apart."""
    names = ("task", "model", "arm", "pictures", "labelled", "crops", "pre_epochs", "fine_epochs")
    found: dict[tuple[Any, ...], dict[int, float]] = {}
    for one in records:
        found.setdefault(tuple(one.get(name) for name in names), {})[one["seed"]] = one["score"]
    return found


def table(records: Sequence[Record]) -> Table:
    """Return mean and standard error of each row, and of its differences from scratch, seed by seed."""
    shown = Table("task", "model", "arm", "learnt from", "labelled", "epochs", "score", "minus scratch", "seeds")
    found = groups(records)
    for key, scores in sorted(found.items(), key=lambda item: tuple(map(str, item[0]))):
        task, model, arm, pictures, labelled, crops, before, epochs = key
        base = "scratch_vit" if arm in OF_VIT else "scratch"
        scratch = found.get((task, model, base, None, labelled, None, None, epochs), {})
        both = [score - scratch[seed] for seed, score in scores.items() if seed in scratch]
        gain = spread(both) if both and arm != base else ""
        learnt = f"{before} x {crops} {pictures}" if pictures else ""
        cells = (learnt, str(labelled), str(epochs), spread(list(scores.values())), gain, str(len(scores)))
        shown.add_row(task, model, arm, *cells)
    return shown


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    for row in rows(args):
        if any(same(record, row.settings(args)) for record in records_of(args.out)):
            continue
        record = measured(row, args)
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"seed {row.seed}, {row.task}, {row.arm}, {row.model}: {record['score']:.3f}", flush=True)
    for row in rows(args):  # until now another task might have started from them
        shutil.rmtree(row.pretext_run(args), ignore_errors=True)
    Console(width=140).print(table(records_of(args.out)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
