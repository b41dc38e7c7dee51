"""What tasks of objects learn from and score on: settings of the data, and pictures with objects as a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from synchromesh.data.annotated_split import AnnotatedSplit, ObjectScenes, Reading
from synchromesh.data.annotation import AnnotatedPicture
from synchromesh.data.augment import normalize
from synchromesh.data.colors import RandomColors
from synchromesh.data.images import Preprocess, read_picture
from synchromesh.data.instances import Instances
from synchromesh.data.layouts import is_annotated
from synchromesh.data.mosaic import Mosaic
from synchromesh.data.moves import Fit, Move, RandomMoves, Size
from synchromesh.data.object_sources import (
    ObjectFiles,
    ObjectPictures,
    ObjectReaders,
    check_classes,
    check_objects,
    check_regions,
    scored_pictures,
)
from synchromesh.data.photographs import PhotographFolder
from synchromesh.data.scene import Scene
from synchromesh.data.scenes import ComposedScenes
from synchromesh.models.heads.objects import Objects
from synchromesh.tasks.category_ids import CATEGORY_IDS, CLASSES
from synchromesh.training.task import Batch, Split, Splits


@dataclass(frozen=True)
class SceneData:
    """Which scenes, and how they become the model's input.

    Attributes:
        source: of the scenes: composed, or pictures that people have annotated.
        preprocess: longest side, channels, normalisation.
        fit: how an annotated picture is scaled to be scored on; none for its longer side as in `preprocess`.
        moves: what is drawn for each training crop of an annotated picture; none for whole pictures.
        colors: other colours in training; none for a picture's own.
        mosaic: four annotated pictures as one in training.
    """

    source: ComposedScenes | ObjectFiles | ObjectReaders = field(default_factory=ComposedScenes)
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(image_size=96))
    fit: Fit | None = None
    moves: RandomMoves | None = None
    colors: RandomColors | None = None
    mosaic: Mosaic = field(default_factory=Mosaic)

    def __post_init__(self) -> None:
        changed = self.fit or self.moves or self.colors or self.mosaic.chance
        if isinstance(self.source, ComposedScenes) and changed:
            raise ValueError("composed scenes are new ones each time: leave data.fit, moves, colors and mosaic out")

    def reading(self) -> Reading:
        """Return how annotated pictures are read."""
        fit = self.fit or Fit(longer=self.preprocess.image_size)
        return Reading(self.preprocess.channels, fit, self.moves, self.colors, self.mosaic)

    def splits(self, *, masks: bool, seed: int) -> Splits:
        """Return the scenes, with masks or without. Raises InputError."""
        if isinstance(self.source, ComposedScenes):
            learnt, scored = self.source.load(self.preprocess)
            return Splits(learnt, scored, {CLASSES: list(self.source.classes)})
        train, test = self.source.load(seed)
        facts = {CLASSES: list(train.classes), CATEGORY_IDS: list(train.category_ids)}
        notes = [*train.notes(), *test.notes(), *check_objects(train, test)]
        if masks:
            notes += [*check_regions(train), *check_regions(test)]
        return Splits(self._split(train, masks), self._split(test, masks), facts, tuple(notes))

    def on(self, path: Path) -> SceneData:
        """Return the settings for a json file or a folder of a user.

        Where scenes are composed, a folder of no known layout holds photographs for their backgrounds.
        """
        if not isinstance(self.source, ComposedScenes):
            share = self.source.test_share if isinstance(self.source, ObjectFiles) else ObjectFiles.test_share
            return dataclasses.replace(self, source=ObjectFiles(path, test_share=share))
        if not is_annotated(path):
            photographs = PhotographFolder(path)
            return dataclasses.replace(self, source=dataclasses.replace(self.source, photographs=photographs))
        side = self.preprocess.image_size
        return dataclasses.replace(self, source=ObjectFiles(path), moves=RandomMoves(((side, side),)))

    def scored_on(self, path: Path, classes: Sequence[str], *, masks: bool) -> Split:
        """Return what a json file or a folder has to be scored on. Raises InputError."""
        on = self.on(path)
        if isinstance(on.source, ComposedScenes):
            return on.splits(masks=masks, seed=0).test
        source = self.source
        # A folder of pictures that was named for this very file holds; that of other files says nothing of it.
        images = source.images if isinstance(source, ObjectFiles) and source.path == path else None
        annotated = scored_pictures(path, images)
        check_classes(annotated, tuple(classes), "the model")
        if masks:
            check_regions(annotated)
        return on._split(annotated, masks)

    def open(self, path: Path) -> Scene:
        """Read a picture of any size as it is scored, the longer side of composed scenes as in training."""
        if not isinstance(self.source, ComposedScenes):
            return self.reading().unknown(path)
        picture = read_picture(path, self.preprocess.channels)
        factor = self.preprocess.image_size / max(picture.size)
        width, height = (max(1, round(side * factor)) for side in picture.size)
        pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)
        image = torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).contiguous()
        scale = width / picture.width, height / picture.height
        move = Move((picture.height, picture.width), (height, width), scale)
        return Scene(image, scale=scale, move=move)

    def canvas(self, *, learning: bool) -> Size:
        """Return the least size of a batch's images.

        Where it is known before, a picture is padded as much alone as in a batch, and on one rank as on many: norms of
        whole maps see padding.
        """
        if isinstance(self.source, ComposedScenes):
            return 1, 1
        if learning and self.moves is not None:
            return self.moves.largest()
        fit = self.reading().fit
        if fit.size is not None:
            return fit.size
        return (fit.longer, fit.longer) if fit.shorter is None and fit.longer is not None else (1, 1)

    def _split(self, annotated: ObjectPictures, masks: bool) -> AnnotatedSplit[AnnotatedPicture, Scene]:
        return AnnotatedSplit(annotated, ObjectScenes(masks), self.reading())


@dataclass(frozen=True)
class Scenes(Batch):
    """Pictures of one size, smaller ones padded at the right and at the bottom, and their objects.

    Attributes:
        images: normalised.
        boxes: of the objects of each picture, in pixels.
        labels: of these objects.
        sizes: height and width of each picture without its padding.
        scales: of each picture, as in `Scene`.
        masks: the pixels of these objects, with the padding; None where nobody asks for them.
        pictures: what is annotated in each whole picture; None of composed scenes.
        moves: from each whole picture; None of composed scenes.
    """

    images: Float[Tensor, "B C H W"]
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    sizes: tuple[tuple[int, int], ...]
    scales: tuple[tuple[float, float], ...]
    masks: tuple[Bool[Tensor, "_ _ _"], ...] | None = None
    pictures: tuple[AnnotatedPicture | None, ...] | None = None
    moves: tuple[Move | None, ...] | None = None

    def image_sizes(self) -> Int[Tensor, "B 2"]:
        """Return the sizes as a tensor beside the images."""
        return torch.tensor(self.sizes, dtype=torch.int64, device=self.images.device).reshape(-1, 2)

    def objects(self) -> Objects:
        """Return the objects of all pictures."""
        device, size = self.images.device, self.images.shape[-2:]
        counts = torch.tensor([len(own) for own in self.labels], device=device, dtype=torch.int64)
        image = torch.arange(len(self), device=device).repeat_interleave(counts)
        boxes = torch.cat(self.boxes) if self.boxes else torch.zeros(0, 4, device=device)
        labels = torch.cat(self.labels) if self.labels else torch.zeros(0, dtype=torch.int64, device=device)
        if self.masks is None:
            return Objects(image, boxes, labels)
        none = torch.zeros(0, *size, dtype=torch.bool, device=device)
        return Objects(image, boxes, labels, torch.cat(self.masks) if self.masks else none)

    def resized(self, factor: float) -> Scenes:
        """Return the batch scaled by a factor: images bilinear, masks by nearest pixels."""
        if factor == 1.0:
            return self
        height, width = (max(1, round(side * factor)) for side in self.images.shape[-2:])
        sizes = tuple(
            (min(height, max(1, round(h * factor))), min(width, max(1, round(w * factor)))) for h, w in self.sizes
        )
        return dataclasses.replace(
            self,
            images=_smooth(self.images, (height, width))
            if len(self)
            else self.images.new_zeros(0, self.images.shape[1], height, width),
            boxes=tuple(own * factor for own in self.boxes),
            sizes=sizes,
            scales=tuple((x * factor, y * factor) for x, y in self.scales),
            masks=self.masks and tuple(_nearest(own, (height, width)) for own in self.masks),
        )


def batch_of(samples: Sequence[Scene], data: SceneData, device: torch.device, *, learning: bool, masks: bool) -> Scenes:
    """Put scenes together on a device, perhaps none; with masks of objects where they are learnt from or composed."""
    preprocess, least = data.preprocess, data.canvas(learning=learning)
    side = preprocess.image_size if least == (1, 1) else 0
    height = max((scene.image.shape[1] for scene in samples), default=side)
    width = max((scene.image.shape[2] for scene in samples), default=side)
    height, width = max(height, least[0]), max(width, least[1])
    images = torch.zeros(len(samples), preprocess.channels, height, width, device=device)
    for image, scene in zip(images, samples, strict=True):
        own = normalize(scene.image[None].to(device), preprocess)[0]
        image[:, : own.shape[1], : own.shape[2]] = own
    truths = [scene.truth or Instances.none() for scene in samples]
    return Scenes(
        images,
        tuple(truth.boxes.to(device) for truth in truths),
        tuple(truth.labels.to(device) for truth in truths),
        tuple((scene.image.shape[1], scene.image.shape[2]) for scene in samples),
        tuple(scene.scale for scene in samples),
        tuple(_padded(truth, (height, width)).to(device) for truth in truths) if masks else None,
        tuple(scene.picture for scene in samples),
        tuple(scene.move for scene in samples),
    )


def _padded(truth: Instances, size: Size) -> Bool[Tensor, "M H W"]:
    found = torch.zeros(len(truth), *size, dtype=torch.bool)
    if truth.masks is not None:
        found[:, : truth.masks.shape[1], : truth.masks.shape[2]] = truth.masks
    return found


def _smooth(images: Float[Tensor, "B C _ _"], size: Size) -> Float[Tensor, "B C H W"]:
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def _nearest(masks: Bool[Tensor, "M _ _"], size: Size) -> Bool[Tensor, "M H W"]:
    rows, columns = (
        ((torch.arange(many, device=masks.device) + 0.5) * (of / many)).long()
        for many, of in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns]
