"""Classification: one label for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from synchromesh.data.augment import Augment, augment_images, normalize
from synchromesh.data.images import Images, Preprocess, RandomCrop, decode_image
from synchromesh.data.mixing import mix, soft_targets
from synchromesh.data.pictures import captioned, enlarged, png
from synchromesh.data.runs import Runs
from synchromesh.data.sources import MnistDigits, Source, own_data, take_shots
from synchromesh.errors import at_least
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.classifier import Classifier
from synchromesh.tasks.label_confusion import Mistakes, class_sheet, confusion_panel
from synchromesh.tasks.viewed import seen_whole
from synchromesh.training.panels import Panel
from synchromesh.training.task import (
    Answer,
    Ask,
    Batch,
    Draw,
    Facts,
    Number,
    Run,
    Scorer,
    Scores,
    Split,
    Splits,
    Task,
    Term,
)
from synchromesh.training.views import Views

LABEL_SEEN = "accuracy"  # a term that is only watched
NAMED_CLASSES = 3  # by a prediction, where nobody asks for another number
LISTED_CLASSES = 20  # by a report, the hardest first


@dataclass(frozen=True)
class Data:
    """Which images, and how they become the model's input.

    Attributes:
        source: the digits of a package, or a folder.
        preprocess: size, channels, normalisation.
        shots: train on this many images per class only; 0 for all.
    """

    source: Source = field(default_factory=MnistDigits)
    preprocess: Preprocess = field(default_factory=Preprocess)
    shots: int = 0

    def __post_init__(self) -> None:
        at_least("data.", self, shots=0)


@dataclass(frozen=True)
class Labelled(Batch):
    """Images with their labels.

    Attributes:
        images: normalised.
        labels: int64; -1 where it is not known.
        targets: probability of each class, in training.
    """

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    targets: Float[Tensor, "B N"] | None = None


@final
@dataclass(frozen=True)
class Classification(Task):
    """Name what is in an image. A sample is a pair (image uint8 [C H W], label).

    Attributes:
        data: which images.
        augment: what is done to training images.
        label_smoothing: share of the target spread over all classes.
    """

    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    label_smoothing: float = 0.1

    pipeline = "image-classification"
    numbers = (
        Number("accuracy", "accuracy", "{:.2%}"),
        Number("loss", "loss", "{:.4f}", "nats", more_is_better=False, log=True),
    )
    extremes = ("Most confident mistakes, then the least sure of the right answers", "Surest of the right answers")

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, wanted 0 <= label_smoothing < 1")

    def splits(self, *, seed: int) -> Splits:
        found = self.data.source.load(self.data.preprocess)
        train = take_shots(found.train, self.data.shots, seed=seed) if self.data.shots else found.train
        facts = {"classes": list(train.classes)}
        return Splits(LabelledImages(train, self.augment.crop), LabelledImages(found.test), facts, found.notes)

    def reading(self, folder: Path) -> Classification:
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=own_data(folder)))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        return LabelledImages(own_data(folder).load_all(self.data.preprocess, tuple(facts["classes"])))

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return Classifier(backbone.build(), len(facts["classes"]))

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> Labelled:
        size = self.data.preprocess
        blank = torch.zeros(0, size.channels, size.image_size, size.image_size, dtype=torch.uint8)
        pixels = (torch.stack([image for image, _ in samples]) if samples else blank).to(device)
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64).to(device)
        if rng is None:
            return Labelled(normalize(pixels, size), labels)
        images = augment_images(pixels, self.augment, size, rng)
        targets = soft_targets(labels, len(facts["classes"]), self.label_smoothing)
        if self.augment.mixing is None:
            return Labelled(images, labels, targets)
        mixed = mix(images, targets, self.augment.mixing, rng)
        return Labelled(mixed.images, labels, mixed.targets)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"cross_entropy": len(batch), LABEL_SEEN: len(batch)}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the cross-entropy with the targets, in float32, and, only watched, how many images are right."""
        assert isinstance(batch, Labelled)
        assert batch.targets is not None
        logits = run(batch.images)
        # An empty batch still needs a loss with a gradient: other ranks wait for this one's backward.
        total = cross_entropy(logits.float(), batch.targets, reduction="sum") if len(batch) else logits.float().sum()
        right = (logits.argmax(1) == batch.targets.argmax(1)).sum()
        return {"cross_entropy": Term(total), LABEL_SEEN: Term(right, weight=0.0)}

    def viewed(self, run: Run, views: Views) -> Run:
        return seen_whole(run, views)

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(tuple(facts["classes"]))

    def open(self, path: Path) -> Any:
        return decode_image(path, self.data.preprocess), -1

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        assert isinstance(batch, Labelled)
        classes = facts["classes"]
        best = run(batch.images).float().softmax(1).topk(min(ask.top or NAMED_CLASSES, len(classes)))
        truths = [classes[label] if label >= 0 else None for label in batch.labels.tolist()]
        found = []
        for indices, shares, truth in zip(best.indices.tolist(), best.values.tolist(), truths, strict=True):
            top = [
                {"class": classes[i], "probability": round(p, 6)}
                for i, p in zip(indices, shares, strict=True)
                if p >= (ask.least or 0)
            ]
            found.append(Answer({"class": classes[indices[0]], "top": top}, truth))
        return found

    def cells(self, answer: Answer) -> Mapping[str, str]:
        top = answer.said["top"]
        first = f"{top[0]['probability']:.1%}" if top else "-"
        then = ", ".join(f"{each['class']} {each['probability']:.1%}" for each in top[1:])
        return {"class": answer.said["class"], "probability": first, "then": then}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        image, _ = sample
        if answer.seen is not None:  # the verdict stands below it
            return png(enlarged(image.numpy()))
        cells = self.cells(answer)
        return png(captioned(enlarged(image.numpy()), f"{cells['class']} {cells['probability']}"))

    def verdict(self, answer: Answer) -> str:
        if answer.seen is None:
            return ""
        cells = self.cells(answer)
        right, sure = cells["class"] == answer.seen, f"{cells['class']} ({cells['probability']})"
        return f"{sure}, right" if right else f"{answer.seen}, taken for {sure}"

    def about(self, facts: Facts) -> str:
        size = self.data.preprocess
        colour = "grey" if size.channels == 1 else "colour"
        return f"{len(facts['classes']):,} classes, {colour} {size.image_size} x {size.image_size}"

    def panels(self, scores: Scores) -> Sequence[Panel]:
        classes, confused = scores.details["classes"], scores.details.get("confused", ())
        return (*confusion_panel(classes, confused), class_sheet(classes, confused, LISTED_CLASSES))


@dataclass(frozen=True)
class LabelledImages:
    """A set of images as a split: pairs of image and label.

    Attributes:
        images: the set.
        crop: of training images.
    """

    images: Images
    crop: RandomCrop | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def strata(self) -> Int[Tensor, " N"]:
        """Of all images."""
        return self.images.labels

    def read(self, index: int, draw: Draw | None = None) -> tuple[Tensor, int]:
        crop = None if draw is None or self.crop is None else (self.crop, draw())
        return self.images.read(index, crop), int(self.images.labels[index])

    def runs(self) -> Runs | None:
        return self.images.runs()


class _Scorer(Scorer):
    """Counts images, and images right, of each class, and what else they were taken for; adds up the cross-entropy.

    It did well on an image by the probability of the right answer, badly by that of a wrong one: the surest mistake is
    the worst.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = classes
        self._count = torch.zeros(len(classes), dtype=torch.int64)
        self._right = torch.zeros_like(self._count)
        self._loss = torch.zeros((), dtype=torch.float64)
        self._mistakes = Mistakes(len(classes))

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, Labelled)
        logits, labels = run(batch.images).float().cpu(), batch.labels.cpu()
        if not len(batch):
            return []
        self._loss += cross_entropy(logits, labels, reduction="sum")
        taken = logits.argmax(1)
        sure, hit = logits.softmax(1).gather(1, taken[:, None])[:, 0], taken == labels
        self._count += labels.bincount(minlength=len(self._count))
        self._right += labels[hit].bincount(minlength=len(self._count))
        self._mistakes.add(labels, taken)
        return torch.where(hit, sure, -sure).tolist()

    def state(self) -> tuple[Tensor, Tensor, Tensor, dict[int, int]]:
        return self._count, self._right, self._loss, dict(self._mistakes.counts)

    def scores(self, states: Sequence[tuple[Tensor, Tensor, Tensor, dict[int, int]]]) -> Scores:
        count, right, loss = (torch.stack(parts).sum(0) for parts in list(zip(*states, strict=True))[:3])
        mistakes = Mistakes(len(self._classes))
        for *_, own in states:
            mistakes.counts.update(own)
        total = max(1, int(count.sum()))
        classes = {
            name: {"images": int(own), "accuracy": int(hit) / max(1, int(own))}
            for name, own, hit in zip(self._classes, count, right, strict=True)
        }
        details = {"classes": classes, "confused": mistakes.listed(self._classes)}
        return Scores({"loss": float(loss) / total, "accuracy": int(right.sum()) / total}, details)
