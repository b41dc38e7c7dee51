"""What tasks with a value for every pixel share: their data, batches of padded pictures, pictures at their own size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from synchromesh.data.annotated import Annotated
from synchromesh.data.annotated_split import Reading
from synchromesh.data.augment import normalize
from synchromesh.data.colors import RandomColors
from synchromesh.data.files import read_picture
from synchromesh.data.images import Preprocess
from synchromesh.data.map_scenes import MapScene
from synchromesh.data.moves import Fit, Move, RandomMoves, Size
from synchromesh.data.pictures import factor_of
from synchromesh.data.pixel_sources import AnnotatedFiles, ReaderPair, TwoParts
from synchromesh.data.scene import as_picture
from synchromesh.data.scenes import ComposedScenes
from synchromesh.errors import InputError

UNKNOWN = -1
"""Stands in the labels of a batch where nobody knows, and in padding, whatever the files have there."""

S = TypeVar("S", bound=MapScene[Any, Any])


@dataclass(frozen=True)
class PixelData:
    """Which pictures, and how they become the model's input.

    Attributes:
        source: scenes composed of digits and photographs, files of a layout that is found, or two readers.
        preprocess: the size of images that the model is made for, channels, normalisation.
        fit: how a whole picture is scaled to be scored on or predicted; None for a longer side of that size.
        moves: what is drawn for each training crop; None for whole pictures. Composed scenes have no need of it.
        colors: other colours in training; None for their own.
    """

    source: ComposedScenes | AnnotatedFiles | ReaderPair = field(default_factory=ComposedScenes)
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(image_size=96))
    fit: Fit | None = None
    moves: RandomMoves | None = None
    colors: RandomColors | None = None

    def of_files(self, path: Path) -> PixelData:
        """Return the settings for annotated files; with random crops, where scenes were composed until now."""
        side, moves = self.preprocess.image_size, self.moves
        if moves is None and isinstance(self.source, ComposedScenes):
            moves = RandomMoves(sizes=((side, side),))
        return dataclasses.replace(self, source=AnnotatedFiles(path), moves=moves)

    def reading(self) -> Reading:
        """Return how files are read."""
        fit = self.fit or Fit(longer=self.preprocess.image_size)
        return Reading(self.preprocess.channels, fit, self.moves, self.colors)

    def parts(self, wanted: type, said: str) -> TwoParts:
        """Read the annotations of files.

        Args:
            wanted: class of the pictures.
            said: what these are, for people.

        Raises:
            InputError: there are none, or they are of another kind.
        """
        assert not isinstance(self.source, ComposedScenes)
        train, test = self.source.load()
        for part in (train, test):
            check_kind(part, wanted, said)
        return train, test

    def size_of_batch(self, rng: np.random.Generator | None) -> Size | None:
        """Draw one of the sizes of training crops; None where pictures have their own."""
        if rng is None or self.moves is None:
            return None
        return self.moves.sizes[int(rng.integers(len(self.moves.sizes)))]

    def at_size(self, scenes: Sequence[S], size: Size | None) -> Sequence[S]:
        """Return crops, which are read at the largest of the sizes, at another one of them."""
        if size is None or self.moves is None or size == self.moves.largest():
            return scenes
        return [scene.resized(self.moves.shrunk(size)) for scene in scenes]


def check_kind(annotated: Annotated[Any], wanted: type, said: str) -> None:
    """Raise InputError where pictures are of another kind than wanted."""
    first = annotated.pictures[0] if len(annotated) else None
    if not isinstance(first, wanted):
        found = "no picture" if first is None else f"pictures of the kind {type(first).__name__}"
        raise InputError(f"{annotated.origin} has {found}, wanted {said} ({wanted.__name__})")


@dataclass(frozen=True)
class Padded:
    """Pictures of one size, smaller ones padded at the right and at the bottom.

    Attributes:
        images: normalised; zeros in padding.
        sizes: height and width of each without its padding.
    """

    images: Float[Tensor, "B C H W"]
    sizes: tuple[Size, ...]

    def maps(self, own: Sequence[Shaped[np.ndarray, "_ _"] | None], padding: int | float, dtype: torch.dtype) -> Tensor:
        """Return maps [B, H, W] of the pictures' pixels beside the images; None stands for padding all over."""
        found = torch.full((len(self.sizes), *self.images.shape[2:]), padding, dtype=dtype)
        for row, values in zip(found, own, strict=True):
            if values is not None:
                row[: values.shape[0], : values.shape[1]] = torch.from_numpy(values)
        return found.to(self.images.device)


def padded(
    scenes: Sequence[MapScene[Any, Any]], preprocess: Preprocess, device: torch.device, least: Size | None = None
) -> Padded:
    """Return the pictures of scenes, perhaps of none.

    Args:
        scenes: whose images have at most the size `least`, where that is given.
        preprocess: normalisation.
        device: of the images.
        least: height and width of the batch; None for those of the largest image.
    """
    sizes = tuple((scene.image.shape[1], scene.image.shape[2]) for scene in scenes)
    blank = [least or (preprocess.image_size, preprocess.image_size)] if least or not scenes else []
    height, width = (max(side) for side in zip(*sizes, *blank, strict=True))
    images = torch.zeros(len(scenes), preprocess.channels, height, width, device=device)
    for image, scene, (rows, columns) in zip(images, scenes, sizes, strict=True):
        image[:, :rows, :columns] = normalize(scene.image[None].to(device), preprocess)[0]
    return Padded(images, sizes)


def sizes_beside(images: Tensor, sizes: Sequence[Size]) -> Int[Tensor, "B 2"]:
    """Return sizes as a tensor on the device of the images."""
    return torch.tensor(sizes, dtype=torch.int64, device=images.device).reshape(-1, 2)


def opened(kind: type[S], path: Path, data: PixelData) -> S:
    """Read a file of any size, upright, as it is scored. Raises UnreadableError."""
    found = data.reading().unknown(path)
    return kind(found.image, picture=found.picture, move=found.move)


def as_given(x: Float[Tensor, "N _ _"], size: Size, move: Move) -> Float[Tensor, "N H W"]:
    """Return maps of an image, without their padding, at the size that its picture has, bilinear.

    Args:
        x: with padding.
        size: height and width of the image without its padding.
        move: from the picture to the image: a whole one, scaled and no more.
    """
    assert move.size == size
    assert not move.flip
    assert move.offset == (0.0, 0.0)
    x = x[:, : size[0], : size[1]]
    if move.source == size:
        return x
    return F.interpolate(x[None], size=move.source, mode="bilinear", align_corners=False)[0]


def original(scene: MapScene[Any, Any], channels: int) -> UInt8[np.ndarray, "C H W"]:
    """Return the picture of a scene as it was: read again where it was scaled, for its details."""
    move = scene.move
    if move is None or move.size == move.source:
        return scene.image.numpy()
    path = None if scene.picture is None else scene.picture.path
    if path is not None:
        picture = read_picture(path, channels)
        if (picture.height, picture.width) == move.source:  # else it is a part, or lies otherwise than its labels
            return np.asarray(picture).reshape(*move.source, -1).transpose(2, 0, 1)
    return move.inverse().pixels(as_picture(scene.image)).numpy()


def large_map(values: Shaped[np.ndarray, "H W"]) -> Shaped[np.ndarray, "H2 W2"]:
    """Return a map with its values repeated as often as `enlarged` repeats the pixels of its picture."""
    times = factor_of(*values.shape)
    return np.repeat(np.repeat(values, times, axis=0), times, axis=1)
