"""Sets of labelled images: held in memory, or decoded from files when a batch asks for them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from synchromesh.data.files import Picture, header, read_picture
from synchromesh.data.runs import Runs

ENOUGH = 2  # pixels of a decoded JPEG for each one that is wanted, along a side


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the model's input; stored with every checkpoint, so that predictions use the same.

    Attributes:
        image_size: side of the square input, pixels.
        channels: 1 for grey, 3 for colour.
        crop_ratio: the centre crop's share of the resized shorter side; training crops ignore it.
        mean: of each channel's values, which are 0 to 1.
        std: standard deviation of each channel's values.
    """

    image_size: int = 28
    channels: int = 1
    crop_ratio: float = 1.0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}, wanted 1 (grey) or 3 (colour)")
        if self.image_size < 1 or not 0 < self.crop_ratio <= 1:
            raise ValueError(f"got image_size {self.image_size} and crop_ratio {self.crop_ratio}, wanted >= 1 and 0..1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} numbers for {self.channels} channels: give one per channel")


@dataclass(frozen=True)
class RandomCrop:
    """A training crop.

    Attributes:
        scale: least and most of its share of the picture's area.
        ratio: least and most of its width over its height.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
        """Draw (left, top, right, bottom) in pixels; the whole centre where ten draws do not fit."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = np.exp(rng.uniform(np.log(self.ratio[0]), np.log(self.ratio[1])))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = float(rng.integers(0, width - w + 1)), float(rng.integers(0, height - h + 1))
                return left, top, left + w, top + h
        return _centre(height, width, 1.0)


@dataclass(frozen=True)
class Images(ABC):
    """A set of labelled images of one size after preprocessing.

    Attributes:
        labels: int64 class of each image.
        classes: their names.
        preprocess: size and channels of what `read` returns.
    """

    labels: Int[Tensor, " N"]
    classes: tuple[str, ...]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int, crop: tuple[RandomCrop, np.random.Generator] | None = None) -> Tensor:
        """Return image `index`, uint8 [C H W]; a random crop for training, else the centre. Raises InputError."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> Images:
        """Return the set of these images only."""

    def runs(self) -> Runs | None:
        """Return which images are best read together; None where any order is as good."""
        return None


@dataclass(frozen=True)
class TwoSets:
    """The images to learn from and those to score on.

    Attributes:
        train: to learn from.
        test: to score on.
        notes: what a person should know of them.
    """

    train: Images
    test: Images
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class MemoryImages(Images):
    """Images held as one uint8 tensor [N C H W]."""

    images: UInt8[Tensor, "N C H W"]

    def read(self, index: int, crop: tuple[RandomCrop, np.random.Generator] | None = None) -> Tensor:
        image, size = self.images[index], self.preprocess.image_size
        height, width = image.shape[-2:]
        if crop is None:
            box = _centre(height, width, self.preprocess.crop_ratio)
        else:
            box = crop[0].box(height, width, crop[1])
        left, top, right, bottom = (round(side) for side in box)
        image = image[:, top:bottom, left:right]
        if image.shape[-2:] == (size, size):
            return image
        resized = interpolate(image[None].float(), size=(size, size), mode="bicubic", antialias=True)
        return resized[0].round_().clamp_(0, 255).to(torch.uint8)

    def prepared(self) -> MemoryImages:
        """Return the set with every image as `read` gives it without a random crop: resized once."""
        if self.images.shape[-2:] == (self.preprocess.image_size,) * 2 and self.preprocess.crop_ratio == 1:
            return self
        small = torch.stack([self.read(i) for i in range(len(self))])
        return dataclasses.replace(self, images=small, preprocess=dataclasses.replace(self.preprocess, crop_ratio=1.0))

    def subset(self, indices: Sequence[int]) -> MemoryImages:
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        return MemoryImages(self.labels[chosen], self.classes, self.preprocess, self.images[chosen])


@dataclass(frozen=True)
class EncodedImages(Images):
    """Images that are decoded on demand."""

    @abstractmethod
    def file(self, index: int) -> Picture:
        """Return the file of an image, or its bytes. Raises InputError."""

    def read(self, index: int, crop: tuple[RandomCrop, np.random.Generator] | None = None) -> Tensor:
        return decode_image(self.file(index), self.preprocess, crop)


@final
@dataclass(frozen=True)
class FileImages(EncodedImages):
    """Images that lie in files of their own."""

    paths: tuple[Path, ...]

    def file(self, index: int) -> Path:
        return self.paths[index]

    def subset(self, indices: Sequence[int]) -> FileImages:
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        paths = tuple(self.paths[i] for i in indices)
        return FileImages(self.labels[chosen], self.classes, self.preprocess, paths)


def decode_image(
    file: Picture, preprocess: Preprocess, crop: tuple[RandomCrop, np.random.Generator] | None = None
) -> UInt8[Tensor, "C S S"]:
    """Decode one file, turned upright by its EXIF orientation, flattened on black, cropped and resized (bicubic).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, where the crop then still has `ENOUGH` times the pixels of each
    side that are wanted. `read_picture` says what becomes of pictures that are not of 8 bits.

    Raises:
        UnreadableError: the file is missing or not a readable picture; the message names it.
    """
    size = preprocess.image_size
    if crop is None:
        image = read_picture(file, preprocess.channels, draft=ENOUGH * size)
        box = _centre(image.height, image.width, preprocess.crop_ratio)
    else:
        image, box = _random_part(file, preprocess, *crop)
    if box != (0, 0, size, size) or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels[None] if preprocess.channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _random_part(
    file: Picture, preprocess: Preprocess, crop: RandomCrop, rng: np.random.Generator
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Return a picture and the box of a random crop in it, which is drawn before the picture is decoded."""
    (height, width), _ = header(file)
    left, top, right, bottom = crop.box(height, width, rng)
    times = int(min(right - left, bottom - top) // (ENOUGH * preprocess.image_size))
    image = read_picture(file, preprocess.channels, draft=min(height, width) // times if times > 1 else None)
    x, y = image.width / width, image.height / height
    return image, (left * x, top * y, right * x, bottom * y)


def _centre(height: int, width: int, share: float) -> tuple[float, float, float, float]:
    side = min(height, width) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
