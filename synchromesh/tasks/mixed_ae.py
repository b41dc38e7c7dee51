"""MixedAE: restore pictures whose patches were mixed, and know which belong together (CVPR 2023). Needs no labels.

After the paper: positions and temperature of the contrast are recalled; see `models.heads.mixed_ae`.

Shape letters: B groups, G pictures of a group, M mixtures of it, C channels, H W pixels, L patches, P their numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.data.augment import denormalized, normalize
from synchromesh.data.images import decode_image
from synchromesh.data.patch_mixing import random_sources
from synchromesh.data.photographs import PhotographFolder, Photographs
from synchromesh.data.pictures import captioned, enlarged, png, side_by_side
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.croco import as_vit
from synchromesh.models.heads.mixed_ae import MixedAutoencoder, Restored, same_source
from synchromesh.models.homologous_attention import homologous_contrast, nearest_of_same_source
from synchromesh.models.patches import mixed, painted, patch_errors, patches_of, pictures_of
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.tasks.simmim import CropData
from synchromesh.training.mean_scorer import MeanScorer
from synchromesh.training.task import Answer, Ask, Batch, Draw, Facts, Number, Run, Scorer, Split, Splits, Task, Term


def plain_decoder() -> ViTDecoderConfig:
    """Return the decoder of MAE: no second view."""
    return ViTDecoderConfig(cross=False)


@dataclass(frozen=True)
class Group:
    """Pictures that are mixed with each other.

    Attributes:
        images: all of their pixels.
        sources: picture that each place of each mixture is taken from.
    """

    images: UInt8[Tensor, "G C S S"]
    sources: Int64[Tensor, "M L"]


@dataclass(frozen=True)
class Groups(Batch):
    """Groups of pictures of one size.

    Attributes:
        images: normalised.
        sources: picture that each place of each mixture is taken from.
    """

    images: Float[Tensor, "B G C H W"]
    sources: Int64[Tensor, "B M L"]


@final
@dataclass(frozen=True)
class MixedAE(Task):
    """Restore each picture of a mixture from its part of it. A sample is a `Group`.

    With `keys` of 1 and `contrast` of 0 it is naive mixing, which the paper compares with.

    Attributes:
        data: which pictures; `train` and `test` count groups.
        decoder: of each picture; without cross-attention.
        patch: side of a patch, pixels: that of the backbone.
        group: pictures that are mixed, 1 / r of the paper.
        mixtures: of a group that are made and learnt from; of `group` ones, each patch is in exactly one.
        keys: share of the keys that a query attends to; None for 1 / group, 1 for plain attention.
        contrast: weight of the contrast of patches.
        temperature: of it.
        projection: width of the rows that are contrasted.
    """

    data: CropData = field(default_factory=CropData)
    decoder: ViTDecoderConfig = field(default_factory=plain_decoder)
    patch: int = 16
    group: int = 4
    mixtures: int = 1
    keys: float | None = None
    contrast: float = 0.1
    temperature: float = 0.25
    projection: int = 128

    unit = "groups"
    numbers = (
        Number("restored_mse", "error of restored patches", "{:.4f}", more_is_better=False),
        Number("flat_mse", "of flat patches", "{:.4f}", more_is_better=False),
        Number("homologous", "nearest patch of the same picture", "{:.4f}"),
        Number("homologous_chance", "by chance", "{:.4f}"),
    )

    watched = (Number("contrast", "contrast of patches", "{:.3f}", more_is_better=False),)

    def __post_init__(self) -> None:
        if self.group < 2 or not 1 <= self.mixtures <= self.group or self.patch < 1 or self.projection < 1:
            raise ValueError(
                f"got group {self.group}, mixtures {self.mixtures}, patch {self.patch} and projection "
                f"{self.projection}, wanted two pictures at least, from 1 to that many mixtures, and sizes >= 1"
            )
        if not self.temperature > 0 or self.contrast < 0 or not (self.keys is None or 0 < self.keys <= 1):
            raise ValueError(
                f"got temperature {self.temperature}, contrast {self.contrast} and keys {self.keys}, wanted a "
                "temperature above 0, a weight of 0 or more, and a share of the keys"
            )
        side = self.data.preprocess.image_size
        if side % self.patch or (side // self.patch) ** 2 % self.group:
            raise ValueError(
                f"pictures of {side} pixels do not consist of patches of {self.patch} whose number {self.group} divides"
            )

    def splits(self, *, seed: int) -> Splits:
        train, test = self.data.source.load(self.data.preprocess.channels)
        return Splits(GroupSet(self, train, self.data.train), GroupSet(self, test, self.data.test))

    def reading(self, folder: Path) -> MixedAE:
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=PhotographFolder(folder)))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        """Return groups of all photographs of a folder."""
        train, test = PhotographFolder(folder).load(self.data.preprocess.channels)
        return GroupSet(self, dataclasses.replace(train, paths=(*train.paths, *test.paths)), self.data.test)

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        built = as_vit(backbone.build(), "MixedAE")
        if built.strides[0] != self.patch:
            raise ValueError(f"mixed patches have {self.patch} pixels, those of the backbone {built.strides[0]}")
        ratio = 1 / self.group if self.keys is None else self.keys
        channels = self.data.preprocess.channels
        model = MixedAutoencoder(built, self.decoder, channels, ratio=ratio, projection=self.projection)
        model.projector.requires_grad_(self.contrast > 0)  # ranks would wait for a gradient that never comes
        return model

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> Groups:
        size = self.data.preprocess
        side, places = size.image_size, self._side**2
        if not samples:
            blank = torch.zeros(0, self.group, size.channels, side, side, device=device)
            return Groups(blank, torch.zeros(0, self.mixtures, places, dtype=torch.long, device=device))
        pixels = torch.cat([sample.images for sample in samples]).to(device)
        images = normalize(pixels, size).unflatten(0, (len(samples), self.group))
        return Groups(images, torch.stack([sample.sources for sample in samples]).to(device))

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, Groups)
        places = batch.sources.numel()
        return {"restored_mse": places * (self.group - 1), "contrast": places}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the sum of errors over patches that a mixture lacks, and of the contrast over its places."""
        assert isinstance(batch, Groups)
        found = run(batch.images, batch.sources)
        contrast = homologous_contrast(found.projected.flatten(0, 1), self._same(batch), self.temperature)
        return {
            "restored_mse": Term(self._errors(found, batch).sum()),
            "contrast": Term(contrast.sum(), self.contrast),
        }

    def scorer(self, facts: Facts) -> Scorer:
        return MeanScorer(self.numbers, self._measured)

    def open(self, path: Path) -> Group:
        """Read a file, and mix its picture with itself turned by quarters, always in the same way."""
        image = decode_image(path, self.data.preprocess)
        turned = torch.stack([image.rot90(number, (1, 2)) for number in range(self.group)])
        return Group(turned, self.sources_of(seeds.numpy_generator(0, seeds.SPLIT)))

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Say how well the pictures of the first mixture of each group are restored."""
        assert isinstance(batch, Groups)
        found = run(batch.images, batch.sources)
        numbers = self._numbers(found, batch)
        shown = torch.where(
            self._hidden(batch)[:, 0, ..., None],
            painted(found.drawn[:, 0].float(), self._patches(batch)),
            self._patches(batch),
        )
        pictures = pictures_of(shown.flatten(0, 1), self.patch, (self._side, self._side))
        pixels = denormalized(pictures, self.data.preprocess).unflatten(0, (len(batch), self.group)).cpu()
        rows = zip(numbers["restored_mse"].tolist(), numbers["homologous"].tolist(), pixels, strict=True)
        return [
            Answer({"restored_mse": round(error, 5), "homologous": round(same, 4)}, seen) for error, same, seen in rows
        ]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return {
            "error of restored patches": f"{answer.said['restored_mse']:.4f}",
            "nearest patch of the same picture": f"{answer.said['homologous']:.0%}",
        }

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw the first mixture, and its first two pictures as they were restored and as they are."""
        patches = patches_of(sample.images.float(), self.patch)[None]
        (mixture,) = pictures_of(mixed(patches, sample.sources[None, :1])[0], self.patch, (self._side, self._side))
        shown = [mixture, answer.seen[0], sample.images[0], answer.seen[1], sample.images[1]]
        row = side_by_side([enlarged(one.to(torch.uint8).numpy()) for one in shown])
        return png(captioned(row, f"mixed, then drawn and true, twice: error {answer.said['restored_mse']:.3f}"))

    def pictures_by_default(self) -> bool:
        return True

    def sources_of(self, rng: np.random.Generator) -> Int64[Tensor, "M L"]:
        """Draw which picture each place of each mixture shows."""
        return torch.from_numpy(random_sources(self.group, self._side**2, rng)[: self.mixtures])

    @property
    def _side(self) -> int:
        return self.data.preprocess.image_size // self.patch

    def _patches(self, batch: Groups) -> Float[Tensor, "B G L P"]:
        return patches_of(batch.images.flatten(0, 1), self.patch).unflatten(0, (len(batch), self.group))

    def _same(self, batch: Groups) -> Bool[Tensor, "B2 L L"]:
        return same_source(batch.sources.flatten(0, 1))

    def _hidden(self, batch: Groups) -> Bool[Tensor, "B M G L"]:
        """Return which patches of each picture a mixture lacks."""
        pictures = torch.arange(self.group, device=batch.sources.device)
        return batch.sources[:, :, None] != pictures[:, None]

    def _errors(self, found: Restored, batch: Groups) -> Float[Tensor, " B"]:
        """Return the sum of errors over the patches that mixtures lack."""
        errors = patch_errors(found.drawn, self._patches(batch)[:, None].expand_as(found.drawn))
        return (errors * self._hidden(batch)).flatten(1).sum(1)

    def _numbers(self, found: Restored, batch: Groups) -> dict[str, Tensor]:
        count = self.mixtures * (self.group - 1) * self._side**2
        flat = Restored(torch.zeros_like(found.drawn), found.projected, found.tokens)
        nearest = nearest_of_same_source(found.tokens.flatten(0, 1), self._same(batch))
        own = self._side**2 // self.group
        chance = torch.full((len(batch),), (own - 1) / (self._side**2 - 1))
        return {
            "restored_mse": self._errors(found, batch) / count,
            "flat_mse": self._errors(flat, batch) / count,
            "homologous": nearest.view(len(batch), self.mixtures).mean(1),
            "homologous_chance": chance.to(nearest.device),
        }

    def _measured(self, run: Run, batch: Batch) -> Mapping[str, Tensor]:
        assert isinstance(batch, Groups)
        return self._numbers(run(batch.images, batch.sources), batch)


@dataclass(frozen=True)
class GroupSet:
    """Groups of crops of photographs by number, cut when they are read.

    Attributes:
        task: tells how they are cut and mixed.
        photographs: to cut from.
        count: groups in all.
    """

    task: MixedAE
    photographs: Photographs
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Draw | None = None) -> Group:
        """Return a group: a new one where `draw` is given, else the fixed one of this number."""
        rng = seeds.numpy_generator(0, seeds.SPLIT, index) if draw is None else draw()
        images = torch.stack([self._crop(rng, change=draw is not None) for _ in range(self.task.group)])
        return Group(images, self.task.sources_of(rng))

    def _crop(self, rng: np.random.Generator, *, change: bool) -> UInt8[Tensor, "C S S"]:
        data = self.task.data
        image = self.photographs.crop(data.preprocess.image_size, rng, scale=data.scale)
        if not change:
            return image
        image = image.flip(2) if rng.random() < data.flip else image
        return image if data.colors is None else data.colors(image, rng)
