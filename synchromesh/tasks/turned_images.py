"""Classification at angles that a model learned from, and at others: what is learned and what carries over."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from synchromesh.data.augment import normalize_turned
from synchromesh.data.sources import own_data, take_shots
from synchromesh.models.features import BackboneConfig
from synchromesh.tasks.classification import Classification, Data, Labelled, LabelledImages
from synchromesh.training.mean_scorer import MeanScorer
from synchromesh.training.task import Answer, Ask, Batch, Draw, Facts, Number, Run, Scorer, Split, Splits, Task, Term


@dataclass(frozen=True)
class TurnedImage:
    """An image and by how much it is to be turned.

    Attributes:
        image: as it is.
        label: its class; -1 where it is not known.
        degrees: to turn it by, a tensor of one number.
    """

    image: UInt8[Tensor, "C H W"]
    label: int
    degrees: Float[Tensor, ""]


@dataclass(frozen=True)
class TurnedBatch(Batch):
    """Images that are to be turned.

    Attributes:
        images: as they are.
        labels: int64; -1 where it is not known.
        degrees: to turn each by.
    """

    images: UInt8[Tensor, "B C H W"]
    labels: Int[Tensor, " B"]
    degrees: Float[Tensor, " B"]


@final
@dataclass(frozen=True)
class TurnedImages(Task):
    """Name what is in images turned by angles, some of which training never shows. A sample is a `TurnedImage`.

    Each image that is scored is looked at under every angle.

    Attributes:
        data: which images.
        seen: degrees; a training image is turned by one of them, drawn for it.
        unseen: degrees that are only scored on.
        label_smoothing: share of the target spread over all classes.
    """

    data: Data = field(default_factory=Data)
    seen: tuple[float, ...] = (0.0, 15.0, 30.0, 45.0)
    unseen: tuple[float, ...] = (60.0, 75.0)
    label_smoothing: float = 0.05

    unit = "pictures"
    numbers = (
        Number("seen", "right at seen angles", "{:.2%}"),
        Number("unseen", "right at unseen angles", "{:.2%}"),
    )
    pipeline = "image-classification"

    def __post_init__(self) -> None:
        if not self.seen or not self.unseen or set(self.seen) & set(self.unseen):
            raise ValueError(
                f"got the angles {self.seen} to learn from and {self.unseen} to score on besides, wanted some of each, "
                "and none in both"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}, wanted 0 <= label_smoothing < 1")

    def splits(self, *, seed: int) -> Splits:
        found = self.data.source.load(self.data.preprocess)
        train = take_shots(found.train, self.data.shots, seed=seed) if self.data.shots else found.train
        facts = {"classes": list(train.classes)}
        learned, scored = (TurnedSet(LabelledImages(images), self.seen) for images in (train, found.test))
        return Splits(learned, scored, facts, found.notes)

    def reading(self, folder: Path) -> TurnedImages:
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=own_data(folder)))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        images = own_data(folder).load_all(self.data.preprocess, tuple(facts["classes"]))
        return TurnedSet(LabelledImages(images), self.seen)

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        return self._upright().sized(backbone)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return self._upright().build(backbone, facts)

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> TurnedBatch:
        size = self.data.preprocess
        blank = torch.zeros(0, size.channels, size.image_size, size.image_size, dtype=torch.uint8)
        images = torch.stack([one.image for one in samples]) if samples else blank
        labels = torch.tensor([one.label for one in samples], dtype=torch.int64)
        degrees = torch.stack([one.degrees for one in samples]) if samples else torch.zeros(0)
        return TurnedBatch(images, labels, degrees).to(device)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"cross_entropy": len(batch)}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the sum of cross-entropies, in float32."""
        assert isinstance(batch, TurnedBatch)
        logits = run(self._turned(batch, batch.degrees)).float()
        # An empty batch still needs a loss with a gradient: other ranks wait for this one's backward.
        total = (
            cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.label_smoothing)
            if len(batch)
            else logits.sum()
        )
        return {"cross_entropy": Term(total)}

    def scorer(self, facts: Facts) -> Scorer:
        return MeanScorer(self.numbers, self._measured)

    def open(self, path: Path) -> TurnedImage:
        """Read a file, upright."""
        image, label = self._upright().open(path)
        return TurnedImage(image, label, torch.zeros(()))

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        assert isinstance(batch, TurnedBatch)
        labelled = Labelled(self._turned(batch, batch.degrees), batch.labels)
        return self._upright().predict(run, labelled, facts, ask)

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return self._upright().cells(answer)

    def draw(self, sample: Any, answer: Answer) -> bytes:
        return self._upright().draw((sample.image, sample.label), answer)

    def verdict(self, answer: Answer) -> str:
        return self._upright().verdict(answer)

    def about(self, facts: Facts) -> str:
        seen, unseen = (", ".join(f"{angle:g}" for angle in angles) for angles in (self.seen, self.unseen))
        return f"{self._upright().about(facts)}, turned by {seen} degrees, scored at {unseen} too"

    def _upright(self) -> Classification:
        """Return the task of naming these images as they are."""
        return Classification(self.data, label_smoothing=self.label_smoothing)

    def _turned(self, batch: TurnedBatch, degrees: Float[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        return normalize_turned(batch.images, degrees, self.data.preprocess)

    def _measured(self, run: Run, batch: Batch) -> Mapping[str, Tensor]:
        """Return the share of the angles of each kind at which each image is named rightly."""
        assert isinstance(batch, TurnedBatch)
        found = {}
        for name, angles in (("seen", self.seen), ("unseen", self.unseen)):
            right = [
                run(self._turned(batch, torch.full_like(batch.degrees, angle))).argmax(1) == batch.labels
                for angle in angles
            ]
            found[name] = torch.stack(right).float().mean(0)
        return found


@dataclass(frozen=True)
class TurnedSet:
    """Images by number, each turned by an angle that is drawn when it is read.

    Attributes:
        images: upright.
        angles: degrees.
    """

    images: LabelledImages
    angles: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def strata(self) -> Int[Tensor, " N"]:
        """Of all images."""
        return self.images.strata

    def read(self, index: int, draw: Draw | None = None) -> TurnedImage:
        """Return an image: turned by an angle of these where `draw` is given, else upright."""
        image, label = self.images.read(index)
        angle = 0.0 if draw is None else self.angles[int(draw().integers(len(self.angles)))]
        return TurnedImage(image, label, torch.tensor(angle))
