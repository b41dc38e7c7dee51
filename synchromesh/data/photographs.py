"""Photographs: real ones that come with two installed packages, or those of a folder, as arrays to cut from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.files import KINDS, pictures_in, read_picture
from synchromesh.errors import InputError, UnreadableError

# All photographs of scikit-image and scikit-learn; drawings, text and test patterns are left out.
LEARNT_FROM = (
    *("skimage/data/astronaut.png", "skimage/data/brick.png", "skimage/data/camera.png", "skimage/data/cell.png"),
    *("skimage/data/clock_motion.png", "skimage/data/coins.png", "skimage/data/gravel.png", "skimage/data/ihc.png"),
    *("skimage/data/hubble_deep_field.jpg", "skimage/data/moon.png", "skimage/data/motorcycle_left.png"),
    "sklearn/datasets/images/china.jpg",
)
HELD_OUT = (
    *("skimage/data/chelsea.png", "skimage/data/coffee.png", "skimage/data/grass.png", "skimage/data/rocket.jpg"),
    *("skimage/data/retina.jpg", "sklearn/datasets/images/flower.jpg"),
)

KEPT = 512  # decoded photographs in memory, of 1.2 MB at most unless `longest` is larger


@dataclass(frozen=True)
class Photographs:
    """Files of photographs, each read when it is asked for.

    Attributes:
        paths: of the files.
        channels: 1 for grey, 3 for colour.
        longest: pixels of the longer side, to which larger photographs are shrunk.
    """

    paths: tuple[Path, ...]
    channels: int = 3
    longest: int = 640

    def __len__(self) -> int:
        return len(self.paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return Photographs, (self.paths, self.channels, self.longest)  # other processes read for themselves

    def pixels(self, number: int) -> UInt8[Tensor, "C _ _"] | UnreadableError:
        """Return one of them decoded, or what is wrong with it; those asked for last are kept."""
        return self._kept(self.paths[number])

    @cached_property
    def _kept(self) -> Callable[[Path], Tensor | UnreadableError]:
        return lru_cache(KEPT)(self._read)

    def crop(self, size: int, rng: np.random.Generator, *, scale: tuple[float, float]) -> UInt8[Tensor, "C S S"]:
        """Return a random square of a random photograph.

        Args:
            size: pixels of its side.
            rng: draws it.
            scale: least and most of its side over the photograph's shorter side.

        Raises:
            UnreadableError: that photograph is not readable; the others still are.
        """
        pixels = self.pixels(int(rng.integers(len(self))))
        if isinstance(pixels, UnreadableError):
            raise UnreadableError(pixels.path, pixels.reason)
        height, width = pixels.shape[1:]
        side = max(1, round(min(height, width) * rng.uniform(*scale)))
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        cut = pixels[:, top : top + side, left : left + side].permute(1, 2, 0).numpy()
        picture = Image.fromarray(cut[:, :, 0] if self.channels == 1 else cut)
        small = np.array(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)
        return torch.from_numpy(small.reshape(size, size, self.channels)).permute(2, 0, 1).contiguous()

    def _read(self, path: Path) -> Tensor | UnreadableError:
        try:
            picture = read_picture(path, self.channels)
        except UnreadableError as error:
            return error
        picture.thumbnail((self.longest, self.longest), Image.Resampling.BICUBIC)
        pixels = np.array(picture, dtype=np.uint8).reshape(picture.height, picture.width, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class PackagePhotographs:
    """18 photographs that scikit-image and scikit-learn carry: 12 to learn from, 6 other ones to score on.

    Attributes:
        without: names of files that are left out, such as "motorcycle_left", to be scored on in another way.
    """

    without: tuple[str, ...] = ()

    def load(self, channels: int) -> tuple[Photographs, Photographs]:
        """Return those to learn from and those to score on.

        Raises:
            InputError: a package is missing, or there is no photograph of a name that is to be left out.
        """
        known = {Path(name).stem for name in (*LEARNT_FROM, *HELD_OUT)}
        if unknown := set(self.without) - known:
            raise InputError(f"there is no photograph {', '.join(sorted(unknown))}: wanted {', '.join(sorted(known))}")
        kept = ([name for name in names if Path(name).stem not in self.without] for names in (LEARNT_FROM, HELD_OUT))
        learnt, held = (_in_packages(names, channels) for names in kept)
        return learnt, held


@dataclass(frozen=True)
class PhotographFolder:
    """A folder of files of pictures, in folders of any depth.

    Attributes:
        path: the folder.
        test_share: of the files, to score on.
        split_seed: chooses these, by their names alone.
    """

    path: Path
    test_share: float = 0.2
    split_seed: int = 0

    def load(self, channels: int) -> tuple[Photographs, Photographs]:
        """Return those to learn from and those to score on. Raises InputError where there are fewer than two."""
        if not self.path.is_dir():
            raise InputError(f"the folder of photographs {self.path} does not exist")
        found, _ = pictures_in(self.path.rglob("*"))
        if len(found) < 2:
            raise InputError(
                f"{self.path} holds {len(found)} photographs ({KINDS}), wanted two at least: one to score on"
            )
        count = min(len(found) - 1, max(1, round(self.test_share * len(found))))
        order = seeds.numpy_generator(self.split_seed, seeds.SPLIT).permutation(len(found))
        chosen = set(order[:count].tolist())
        train, test = ([p for i, p in enumerate(found) if (i in chosen) == held] for held in (False, True))
        return Photographs(tuple(train), channels), Photographs(tuple(test), channels)


PhotographSource = PackagePhotographs | PhotographFolder


def _in_packages(names: Sequence[str], channels: int) -> Photographs:
    paths = []
    for name in names:
        package, _, rest = name.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise InputError(
                "these photographs come with scikit-image and scikit-learn: pip install 'synchromesh[vision]'"
            )
        paths.append(Path(found.origin).parent / rest)
    return Photographs(tuple(paths), channels)
