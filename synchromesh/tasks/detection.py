"""Detection: which objects are in a picture, and the box around each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from synchromesh.data.augment import normalize
from synchromesh.data.images import Preprocess, read_picture
from synchromesh.data.instances import Instances
from synchromesh.data.photographs import PhotographFolder
from synchromesh.data.pictures import COLORS, TRUTH, Box, enlarged, factor_of, png, with_boxes
from synchromesh.data.scenes import ComposedScenes, Scene
from synchromesh.data.scores.boxes import ObjectScores, Seen, annotations_of
from synchromesh.models.boxes import iou
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.objects import ObjectHead, Objects
from synchromesh.tasks.object_panels import object_details, object_panels
from synchromesh.training.task import (
    Answer,
    Ask,
    Batch,
    Facts,
    Number,
    Panel,
    Run,
    Scorer,
    Scores,
    Split,
    Splits,
    Task,
    Term,
)

LEAST_SCORED = 0.01  # lowest probability of a box that is scored
LEAST_TOLD = 0.3  # lowest probability of a box in a prediction, where nobody asks for another


@dataclass(frozen=True)
class SceneData:
    """Which scenes, and how they become the model's input.

    Attributes:
        source: of the scenes.
        preprocess: longest side, channels, normalisation.
    """

    source: ComposedScenes = field(default_factory=ComposedScenes)
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(image_size=96))


@dataclass(frozen=True)
class Scenes(Batch):
    """Pictures of one size, smaller ones padded at the right and at the bottom, and their objects.

    Attributes:
        images: normalised.
        boxes: of the objects of each picture, in pixels.
        labels: of these objects.
        sizes: height and width of each picture without its padding.
        scales: of each picture, as in `Scene`.
    """

    images: Float[Tensor, "B C H W"]
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    scales: tuple[tuple[float, float], ...]

    def image_sizes(self) -> Int[Tensor, "B 2"]:
        """Return the sizes as a tensor beside the images."""
        return torch.tensor(self.sizes, dtype=torch.int64, device=self.images.device).reshape(-1, 2)

    def objects(self) -> Objects:
        """Return the objects of all pictures."""
        device = self.images.device
        counts = torch.tensor([len(own) for own in self.labels], device=device, dtype=torch.int64)
        image = torch.arange(len(self), device=device).repeat_interleave(counts)
        boxes = torch.cat(self.boxes) if self.boxes else torch.zeros(0, 4, device=device)
        labels = torch.cat(self.labels) if self.labels else torch.zeros(0, dtype=torch.int64, device=device)
        return Objects(image, boxes, labels)


@final
@dataclass(frozen=True)
class Detection(Task):
    """Find objects and their boxes. A sample is a `Scene`.

    Attributes:
        data: which scenes.
        head: finds boxes in the maps of the backbone.
    """

    data: SceneData = field(default_factory=SceneData)
    head: ObjectHead = field(default_factory=CentreBoxes)

    unit = "scenes"
    numbers = (
        Number("AP", "AP", "{:.3f}"),
        Number("AP50", "AP50", "{:.3f}"),
        Number("AP75", "AP75", "{:.3f}"),
    )

    def splits(self, *, seed: int) -> Splits:
        train, test = self.data.source.load(self.data.preprocess)
        return Splits(train, test, {"classes": list(self.data.source.classes)})

    def reading(self, folder: Path) -> Detection:
        """Return this task with backgrounds cut from the photographs of a folder."""
        source = dataclasses.replace(self.data.source, photographs=PhotographFolder(folder))
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=source))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        return self.reading(folder).splits(seed=0).test

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return self.head.build(backbone.build(), len(facts["classes"]))

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> Scenes:
        size = self.data.preprocess
        height = max((scene.image.shape[1] for scene in samples), default=size.image_size)
        width = max((scene.image.shape[2] for scene in samples), default=size.image_size)
        images = torch.zeros(len(samples), size.channels, height, width, device=device)
        for image, scene in zip(images, samples, strict=True):
            own = normalize(scene.image[None].to(device), size)[0]
            image[:, : own.shape[1], : own.shape[2]] = own
        truths = [scene.truth or Instances.none() for scene in samples]
        return Scenes(
            images,
            tuple(truth.boxes.to(device) for truth in truths),
            tuple(truth.labels.to(device) for truth in truths),
            tuple((scene.image.shape[1], scene.image.shape[2]) for scene in samples),
            tuple(scene.scale for scene in samples),
        )

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, Scenes)
        return self.head.counts(sum(len(own) for own in batch.labels), len(batch))

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the losses of the head, each a sum over what `counts` says."""
        assert isinstance(batch, Scenes)
        sums, weights = run(batch.images, batch.image_sizes(), batch.objects()), self.head.weights()
        return {name: Term(total, weights[name]) for name, total in sums.items()}

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self, tuple(facts["classes"]))

    def found(self, run: Run, batch: Batch, *, least: float) -> list[Instances]:
        """Run the model and return the objects of each picture."""
        assert isinstance(batch, Scenes)
        # Without a picture it runs too: other ranks wait for its part in their exchanges.
        seen = run(batch.images, batch.image_sizes(), least=least)
        return [Instances(one.boxes.cpu(), one.labels.cpu(), one.scores.cpu()) for one in seen]

    def open(self, path: Path) -> Scene:
        """Read a picture of any size, shrunk or enlarged so that its longer side is as in training."""
        picture = read_picture(path, self.data.preprocess.channels)
        factor = self.data.preprocess.image_size / max(picture.size)
        width, height = (max(1, round(side * factor)) for side in picture.size)
        pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)
        image = torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).contiguous()
        return Scene(image, scale=(width / picture.width, height / picture.height))

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        assert isinstance(batch, Scenes)
        found = self.found(run, batch, least=LEAST_TOLD if ask.least is None else ask.least)
        as_given = [one.scaled(1 / x, 1 / y) for one, (x, y) in zip(found, batch.scales, strict=True)]
        return [Answer(_said(one, facts["classes"], ask.top)) for one in as_given]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        names = [f"{one['class']} {one['probability']:.0%}" for one in answer.said["objects"]]
        return {"objects": str(len(names)), "what": ", ".join(names) or "-"}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw what was found in colour, and the truth, where it is known, in white."""
        image, known = sample.image.numpy(), sample.truth
        times = factor_of(image.shape[1], image.shape[2])
        boxes = [] if known is None else [Box(_times(box, times), color=TRUTH) for box in known.boxes.tolist()]
        names = sorted({one["class"] for one in answer.said["objects"]})
        x, y = sample.scale
        for one in answer.said["objects"]:
            color = COLORS[names.index(one["class"]) % len(COLORS)]
            left, top, right, bottom = one["box"]
            corners = _times((left * x, top * y, right * x, bottom * y), times)
            boxes.append(Box(corners, f"{one['class']} {one['probability']:.0%}", color))
        return png(with_boxes(enlarged(image), boxes))

    def pictures_by_default(self) -> bool:
        return True

    def about(self, facts: Facts) -> str:
        return f"{len(facts['classes']):,} classes"

    def panels(self, scores: Scores) -> Sequence[Panel]:
        return object_panels(scores.details)


class _Scorer(Scorer):
    """Collects what was found and what is true of every scene, in the pixels it had before it was shrunk."""

    def __init__(self, task: Detection, classes: tuple[str, ...]) -> None:
        self._task, self._scores = task, ObjectScores(classes)

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, Scenes)
        found = self._task.found(run, batch, least=LEAST_SCORED)
        truths = [Instances(b.cpu(), n.cpu()) for b, n in zip(batch.boxes, batch.labels, strict=True)]
        for one, truth, (height, width), (x, y) in zip(found, truths, batch.sizes, batch.scales, strict=True):
            objects, seen = annotations_of(truth.scaled(1 / x, 1 / y)), one.scaled(1 / x, 1 / y)
            self._scores.add(objects, seen, height=round(height / y), width=round(width / x))
        return [_quality(one, truth) for one, truth in zip(found, truths, strict=True)]

    def state(self) -> list[Seen]:
        return self._scores.state()

    def scores(self, states: Sequence[list[Seen]]) -> Scores:
        scored = self._scores.numbers(states)
        numbers = {number.name: scored.boxes.twelve[number.name] or 0.0 for number in self._task.numbers}
        return Scores(numbers, object_details(scored))


def _quality(found: Instances, truth: Instances) -> float:
    """Return the panoptic quality of boxes (arXiv 1801.00868), sum of IoU / (TP + FP / 2 + FN / 2); 1 for no objects.

    Of the boxes with probability LEAST_TOLD or more, each takes the object of its class that it overlaps most, if by an
    IoU above 0.5.
    """
    assert found.scores is not None
    sure = found.scores >= LEAST_TOLD
    boxes, labels = found.boxes[sure], found.labels[sure]
    overlap = iou(boxes, truth.boxes) * (labels[:, None] == truth.labels[None])
    total, taken = 0.0, set()
    for row in overlap:
        best = int(row.argmax()) if len(row) else -1
        if best >= 0 and best not in taken and row[best] > 0.5:
            taken.add(best)
            total += float(row[best])
    wrong = len(boxes) - len(taken) + len(truth) - len(taken)
    return total / (len(taken) + wrong / 2) if len(taken) + wrong else 1.0


def _said(found: Instances, classes: Sequence[str], top: int | None) -> dict[str, Any]:
    assert found.scores is not None
    each = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    objects = [
        {"class": classes[label], "probability": round(score, 4), "box": [round(side, 2) for side in box]}
        for box, label, score in each
    ]
    return {"objects": objects[:top]}


def _times(box: Sequence[float], factor: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = (side * factor for side in box)
    return left, top, right, bottom
