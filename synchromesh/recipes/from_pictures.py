"""A recipe for pictures of classes, and data alone of every kind: what lies there names the task, size and colours."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from synchromesh.data.augment import Affine, Augment
from synchromesh.data.files import header, is_grey
from synchromesh.data.images import EncodedImages, Preprocess, RandomCrop
from synchromesh.data.layouts import found_in, is_annotated
from synchromesh.data.sources import ImageFolder, OwnData, stored_at
from synchromesh.data.stored import StoredFiles
from synchromesh.errors import UnreadableError
from synchromesh.recipes import from_data
from synchromesh.tasks.classification import Classification, Data
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.loader import Loading
from synchromesh.training.optim import Optim

LOOKED_AT = 50  # pictures that are opened for their size and colours, spread over all
SIDES = 32, 192  # least and most pixels of an image's side, a multiple of the first
MIDDLE = 0.875  # of the shorter side of pictures that are large, as with ImageNet
IMAGES_SEEN = 100_000  # in a training, whatever their number
EPOCHS = 4, 100  # least and most
BATCH = 64
EVALUATIONS = 20  # at most, in a training
# ImageNet's statistics; grey is its luminance.
COLOUR = Preprocess(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
GREY = Preprocess(channels=1, mean=(0.459,), std=(0.226,))
OPTIM = Optim(
    lr=2e-3, warmup_lr=0.0, final_lr=1e-5, lr_batch=64, warmup_epochs=1.0, weight_decay=0.05, betas=(0.9, 0.99)
)


def of_data(path: Path, images: Path | None) -> TrainConfig:
    """Return the recipe for a json file, a folder, or files of pictures with their classes.

    Args:
        path: the file or folder.
        images: the folder of pictures, where a json file does not lie beside it.

    Raises:
        InputError: it is of no known layout, or there is nothing to learn.
    """
    stored = None if images is not None else stored_at(path)
    if stored is not None:
        return classes(stored)
    if images is not None or is_annotated(path) or found_in(path) is not None:
        return from_data.of_data(path, images)
    return classes(ImageFolder(path))


def classes(source: OwnData) -> TrainConfig:
    """Return the recipe for pictures of classes: a small SwinV2-MoE of fitting size, grey where all of them are.

    Raises:
        InputError: there is nothing to learn, or no picture can be read.
    """
    images, count = _looked_at(source)
    seen = Seen.of(images)
    epochs = min(EPOCHS[1], max(EPOCHS[0], round(IMAGES_SEEN / count)))
    return TrainConfig(
        name="classes",
        task=Classification(data=Data(source, seen.preprocess()), augment=seen.augment()),
        model=from_data.backbone(seen.side),
        optim=OPTIM,
        epochs=epochs,
        batch_size=max(1, min(BATCH, count // 4)),
        eval_batch_size=BATCH,
        bf16=False,
        loading=Loading(skip_bad_images=True),  # each is named where the run ends
        keep=Keep(evaluate_epochs=max(1, epochs // EVALUATIONS)),
    )


def _looked_at(source: OwnData) -> tuple[EncodedImages, int]:
    """Return pictures to look at, and how many there are to learn from, about; training alone lists all of a store."""
    if isinstance(source, StoredFiles):
        glance = source.glance(COLOUR)
        return glance.images, glance.count
    found = source.load(COLOUR).train
    assert isinstance(found, EncodedImages)
    return found, len(found)


@dataclass(frozen=True)
class Seen:
    """What some of the pictures are like.

    Attributes:
        shorter: the usual shorter side, pixels.
        grey: whether none of them has a colour.
    """

    shorter: float
    grey: bool

    @classmethod
    def of(cls, images: EncodedImages) -> Seen:
        """Look at some pictures. Raises UnreadableError where not one can be read."""
        sides, grey, wrong = [], True, None
        for index in range(0, len(images), max(1, len(images) // LOOKED_AT)):
            picture = images.file(index)
            try:
                upright, _ = header(picture)
                grey = grey and is_grey(picture)
            except UnreadableError as error:
                wrong = error
            else:
                sides.append(min(upright))
        if wrong is not None and not sides:
            raise wrong
        return cls(float(statistics.median(sides)), grey)

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return min(SIDES[1], max(SIDES[0], math.ceil(self.shorter / SIDES[0]) * SIDES[0]))

    def preprocess(self) -> Preprocess:
        """Return how pictures become images."""
        base, large = GREY if self.grey else COLOUR, self.shorter * MIDDLE >= self.side
        return Preprocess(self.side, base.channels, MIDDLE if large else 1.0, base.mean, base.std)

    def augment(self) -> Augment:
        """Return what is drawn in training: what is grey may be writing or a scan, which has no mirror image."""
        if self.grey:
            return Augment(affine=Affine())
        return Augment(crop=RandomCrop(scale=(0.35, 1.0)), flip=0.5)
