"""Trees on aerial photographs, learnt from one photograph and scored on others: what raises the average precision.

    make samples
    python benchmarks/trees.py                                # every setting
    python benchmarks/trees.py --settings full colours        # these alone
    python benchmarks/trees.py --settings nuclei              # nuclei of cells instead

A small SwinV2-MoE (the size of detect_demo) with the head CentreBoxes learns from random crops of one photograph for a
number of processor seconds. Scored are tiles of the photograph that was learnt from, of another one of the same place,
and of two other places. Every setting has the same time, on one thread; the learning rate falls over it. One line of
JSON each goes to benchmarks/results/trees.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from timing import machine
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.annotated_split import AnnotatedSplit, ObjectScenes, Reading
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.colors import RandomColors
from synchromesh.data.images import Preprocess
from synchromesh.data.instances import Instances
from synchromesh.data.moves import Fit, RandomMoves
from synchromesh.data.scene import Scene
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.boxes import ObjectScores
from synchromesh.data.voc import VocFolder
from synchromesh.errors import InputError
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.objects import ObjectModel, Objects
from synchromesh.moe.record import aux_loss
from synchromesh.recipes.demo import experts
from synchromesh.recipes.detect_demo import SWIN

RESULTS = Path(__file__).parent / "results" / "trees.jsonl"
MEAN, STD = 0.5, 0.25
LEAST_SCORED = 0.01
SEEN_AGAIN = 12  # tiles of the training photograph that are scored


@dataclass(frozen=True)
class Setting:
    """How a model learns to find trees.

    Attributes:
        factor: pixels of the model's image for one of the photograph.
        side: of a crop, in pixels of the model's image.
        batch: crops of a step.
        fixed: as many different crops as this, always the same; None for new ones each time.
        jitter: least and most of a random factor of size.
        colours: other contrast and brightness in training.
        scenes: seconds on composed scenes of digits before, as a share of the time on trees.
        rate: highest learning rate.
    """

    factor: float = 1.0
    side: int = 192
    batch: int = 4
    fixed: int | None = None
    jitter: tuple[float, float] = (1.0, 1.0)
    colours: bool = False
    scenes: float = 0.0
    rate: float = 2e-3


COLOURS = {"jitter": (0.75, 1.3), "colours": True}
SETTINGS = {
    "prototype": Setting(factor=0.5, side=96, batch=16, fixed=160),
    "full": Setting(),
    "colours": Setting(**COLOURS),
    "start": Setting(**COLOURS, scenes=0.5),
    "half": Setting(factor=0.5, side=96, batch=16, **COLOURS),
    "nuclei": Setting(factor=2.0, **COLOURS),
}


@dataclass(frozen=True)
class Args:
    """Which settings to measure.

    Attributes:
        samples: the folder that `make samples` has filled.
        settings: by name.
        seconds: of the processor, for each.
        seed: of weights and crops.
        out: file that lines are added to.
    """

    samples: Path = Path("samples")
    settings: tuple[str, ...] = ("prototype", "full", "colours", "start", "half")
    seconds: float = 90.0
    seed: int = 0
    out: Path = field(default=RESULTS)


def sources(args: Args, name: str) -> dict[str, Any]:
    """Return annotated pictures by what they are for."""
    if name == "nuclei":
        folder = args.samples / "nuclei"
        return {split: CocoJson(folder / f"{split}.json", folder / "images").load() for split in ("train", "test")}
    return {split: VocFolder(args.samples / "trees", split).load() for split in ("train", "test", "osbs", "soap")}


def split_of(annotated: Any, setting: Setting, channels: int) -> AnnotatedSplit:
    """Return pictures as samples of about the setting's size; those of one source have about the same size."""
    height, width = annotated.pictures[0].height, annotated.pictures[0].width
    shorter = min(height, width)
    fits = setting.side / max(height, width)  # RandomMoves scales a picture to just fit, times this:
    moves = RandomMoves(
        sizes=((setting.side, setting.side),),
        scale=tuple(setting.factor * each / fits for each in setting.jitter),
        least_visible=0.25,
    )
    colours = RandomColors((0.7, 1.3), brightness=0.1, invert=0.0, permute=0.0) if setting.colours else None
    fit = Fit(shorter=round(shorter * setting.factor))
    return AnnotatedSplit(annotated, ObjectScenes(), Reading(channels, fit, moves, colours))


@dataclass(frozen=True)
class Crops:
    """Batches of random crops, more of pictures with more objects.

    Attributes:
        split: that they are cut from.
        setting: says how many.
        seed: of what is drawn.
    """

    split: AnnotatedSplit
    setting: Setting
    seed: int

    def batches(self) -> Iterator[list[Scene]]:
        step = 0
        while True:
            yield [self._crop(step * self.setting.batch + place) for place in range(self.setting.batch)]
            step += 1

    def _crop(self, number: int) -> Scene:
        number = number if self.setting.fixed is None else number % self.setting.fixed
        rng = seeds.numpy_generator(self.seed, seeds.SPLIT, number)
        objects = np.array([1 + len(one.objects) for one in self.split.annotated.pictures])
        index = int(rng.choice(len(objects), p=objects / objects.sum()))
        return self.split.read(index, lambda: rng)


def digits(setting: Setting, seed: int) -> Iterator[list[Scene]]:
    """Yield batches of composed scenes, grey in all channels."""
    train, _ = ComposedScenes().load(Preprocess(image_size=96))
    number = 0
    while True:
        scenes = []
        for _ in range(16):
            rng = seeds.numpy_generator(seed, seeds.SPLIT, number)
            scenes.append(train.read(number % len(train), lambda rng=rng: rng))
            number += 1
        yield [dataclasses.replace(one, image=one.image.expand(3, -1, -1)) for one in scenes]


def padded(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Return normalised images of one size, and the size of each without its padding."""
    sizes = torch.tensor([one.image.shape[1:] for one in scenes])
    images = torch.zeros(len(scenes), scenes[0].image.shape[0], *sizes.amax(0).tolist())
    for image, one in zip(images, scenes, strict=True):
        image[:, : one.image.shape[1], : one.image.shape[2]] = (one.image.float() / 255 - MEAN) / STD
    return images, sizes


def objects_of(scenes: Sequence[Scene]) -> Objects:
    truths = [one.truth or Instances.none() for one in scenes]
    image = torch.repeat_interleave(torch.tensor([len(one) for one in truths]))
    return Objects(image, torch.cat([one.boxes for one in truths]), torch.cat([one.labels for one in truths]))


def learn(
    model: ObjectModel, head: CentreBoxes, batches: Iterator[list[Scene]], seconds: float, rate: float
) -> dict[str, Any]:
    """Train for some seconds of the processor and tell how it went; the rate rises for a 20th of it, then falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.05)
    model.train()
    start, wall, steps, seen, losses = time.process_time(), time.monotonic(), 0, 0, []
    while (share := (time.process_time() - start) / seconds) < 1:
        scenes = next(batches)
        images, sizes = padded(scenes)
        truth = objects_of(scenes)
        sums, weights = model(images, sizes, truth), head.weights()
        assert isinstance(sums, dict)
        task = sum(weights[name] * total for name, total in sums.items()) / max(1, len(truth))
        optimizer.zero_grad()
        (task + aux_loss(model)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(20 * share + 0.02, 0.5 + 0.5 * math.cos(math.pi * share))
        optimizer.step()
        steps, seen = steps + 1, seen + len(truth)
        losses.append(float(task.detach()))
    return {
        "steps": steps,
        "objects": seen,
        "loss": float(np.mean(losses[-20:])),
        "cpu_seconds": round(time.process_time() - start, 1),
        "seconds": round(time.monotonic() - wall, 1),
    }


@torch.no_grad()
def score(model: ObjectModel, split: AnnotatedSplit, places: Sequence[int]) -> dict[str, float]:
    """Return the average precision of whole tiles, in pixels of the photograph."""
    model.eval()
    scores = ObjectScores(split.annotated.classes)
    for place in places:
        scene = split.read(place)
        assert scene.picture is not None
        (found,) = model(*padded([scene]), least=LEAST_SCORED)
        own = Instances(found.boxes, found.labels, found.scores).scaled(1 / scene.scale[0], 1 / scene.scale[1])
        scores.add(scene.picture.objects, own, height=scene.picture.height, width=scene.picture.width, number=place)
    twelve = scores.numbers([scores.state()]).boxes.twelve
    return {name: round(twelve[name] or 0.0, 3) for name in ("AP", "AP50", "AR100")}


def built(head: CentreBoxes, setting: Setting, channels: int, classes: int, seed: int) -> ObjectModel:
    torch.manual_seed(seed)
    config = dataclasses.replace(SWIN, experts=experts()).sized(image_size=setting.side, channels=channels)
    return head.build(config.build(), classes)


def measured(name: str, args: Args) -> dict[str, Any]:
    setting, head = SETTINGS[name], CentreBoxes(most=300)
    found, channels = sources(args, name), 1 if name == "nuclei" else 3
    splits = {split: split_of(annotated, setting, channels) for split, annotated in found.items()}
    record = {"setting": name, "seed": args.seed, **dataclasses.asdict(setting)}
    model = built(head, setting, channels, 1, args.seed)
    if setting.scenes:
        before = built(head, setting, channels, 10, args.seed)
        record["before"] = learn(before, head, digits(setting, args.seed), setting.scenes * args.seconds, setting.rate)
        known = {key: value for key, value in before.state_dict().items() if not key.startswith("head.heat")}
        model.load_state_dict(known, strict=False)
    crops = Crops(splits["train"], setting, args.seed)
    record |= learn(model, head, crops.batches(), args.seconds, setting.rate)
    for split, own in splits.items():
        again = list(range(0, len(own), max(1, len(own) // SEEN_AGAIN)))
        record[split] = score(model, own, again if split == "train" else range(len(own)))
    return {**record, "load": [round(one, 1) for one in os.getloadavg()], **machine()}


def main() -> int:
    args = tyro.cli(Args, description=__doc__)
    unknown = [name for name in args.settings if name not in SETTINGS]
    if unknown:
        print(f"error: got the settings {unknown}, wanted some of {', '.join(SETTINGS)}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    try:
        for name in args.settings:
            record = measured(name, args)
            print(json.dumps(record), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    except InputError as error:
        print(f"error: {error}; has `make samples` been run?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
