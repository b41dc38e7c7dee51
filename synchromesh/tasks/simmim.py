"""SimMIM: hide parts of pictures and reconstruct them from the rest (arXiv 2111.09886). Needs no labels.

Any other task can start from the backbone's weights: give the run's folder to its `--start.weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.data.augment import denormalized, normalize
from synchromesh.data.colors import RandomColors
from synchromesh.data.hiding import filled_bilinearly, filled_with_mean, random_cells
from synchromesh.data.images import Preprocess, decode_image
from synchromesh.data.local_norm import surroundings
from synchromesh.data.photographs import PackagePhotographs, PhotographFolder, Photographs, PhotographSource
from synchromesh.data.pictures import captioned, enlarged, png, side_by_side
from synchromesh.errors import at_least
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.pixels import PixelDecoder, hidden_positions, masked_l1
from synchromesh.moe.layer import MoE
from synchromesh.training.metrics import short_name
from synchromesh.training.panels import Bars
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
from synchromesh.types import Routing


@dataclass(frozen=True)
class CropData:
    """Which pictures, and how crops of them become the model's input.

    Attributes:
        source: of the pictures.
        preprocess: size, channels, normalisation.
        train: crops of an epoch.
        test: crops to score on, the same ones always.
        scale: least and most side of a crop over its picture's shorter side.
        flip: chance of a mirror image, in training.
        colors: random changes of colour, in training; none for the photographs' own.
    """

    source: PhotographSource = field(default_factory=PackagePhotographs)
    preprocess: Preprocess = field(
        default_factory=lambda: Preprocess(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    )
    train: int = 2048
    test: int = 256
    scale: tuple[float, float] = (0.2, 0.8)
    flip: float = 0.5
    colors: RandomColors | None = field(default_factory=RandomColors)

    def __post_init__(self) -> None:
        at_least("data.", self, train=1, test=1, flip=0.0)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale is {self.scale}, wanted shares of the shorter side, 0 < least <= most <= 1")


@dataclass(frozen=True)
class Crop:
    """A picture, and what of it is hidden.

    Attributes:
        image: all of its pixels.
        hidden: those that the model does not see.
    """

    image: UInt8[Tensor, "C H W"]
    hidden: Bool[Tensor, "H W"]


@dataclass(frozen=True)
class Hidden(Batch):
    """Pictures of one size and what of them is hidden.

    Attributes:
        images: normalised, whole.
        hidden: their hidden pixels.
    """

    images: Float[Tensor, "B C H W"]
    hidden: Bool[Tensor, "B H W"]


@final
@dataclass(frozen=True)
class SimMIM(Task):
    """Draw what is hidden of a picture. A sample is a `Crop`.

    Attributes:
        data: which pictures.
        cell: side of the squares that are hidden, pixels; a multiple of the backbone's patches.
        ratio: share of them that is hidden.
        window: side of the square around a pixel by whose mean and deviation it is normalised before it is drawn, odd;
            0 draws colours as they are.
    """

    data: CropData = field(default_factory=CropData)
    cell: int = 32
    ratio: float = 0.6
    window: int = 0

    unit = "crops"
    numbers = (
        Number("masked_l1", "L1 of hidden pixels", "{:.4f}", more_is_better=False),
        Number("mean_colour_l1", "of the mean colour", "{:.4f}", more_is_better=False),
        Number("bilinear_l1", "of bilinear filling", "{:.4f}", more_is_better=False),
        Number("routing_gap", "experts of hidden and visible tokens apart", "{:.1%}", more_is_better=False),
    )

    def __post_init__(self) -> None:
        if self.cell < 1 or not 0 < self.ratio <= 1:
            raise ValueError(f"cell is {self.cell} and ratio {self.ratio}, wanted cell >= 1 and 0 < ratio <= 1")
        if self.window < 0 or (self.window and self.window % 2 == 0) or self.window == 1:
            raise ValueError(f"window is {self.window}, wanted 0, or an odd number of pixels from 3 on")

    def splits(self, *, seed: int) -> Splits:
        train, test = self.data.source.load(self.data.preprocess.channels)
        return Splits(CropSet(self, train, self.data.train), CropSet(self, test, self.data.test))

    def reading(self, folder: Path) -> SimMIM:
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=PhotographFolder(folder)))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        """Return crops of all photographs of a folder."""
        train, test = PhotographFolder(folder).load(self.data.preprocess.channels)
        both = dataclasses.replace(train, paths=(*train.paths, *test.paths))
        return CropSet(self, both, self.data.test)

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels).hiding()

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        built = backbone.build()
        if self.cell % built.strides[0]:
            raise ValueError(
                f"cells of {self.cell} hidden pixels do not consist of whole patches: take a multiple of "
                f"{built.strides[0]} for `cell`"
            )
        return PixelDecoder(built, self.data.preprocess.channels)

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> Hidden:
        size = self.data.preprocess
        side = size.image_size
        if not samples:
            blank = torch.zeros(0, size.channels, side, side, device=device)
            return Hidden(blank, torch.zeros(0, side, side, dtype=torch.bool, device=device))
        pixels = torch.stack([crop.image for crop in samples]).to(device)
        return Hidden(normalize(pixels, size), torch.stack([crop.hidden for crop in samples]).to(device))

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, Hidden)
        return {"masked_l1": int(batch.hidden.sum()) * batch.images.shape[1]}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the sum of |drawn - true| over hidden pixels and channels."""
        assert isinstance(batch, Hidden)
        return {"masked_l1": Term(masked_l1(run(batch.images, batch.hidden), self.target(batch.images), batch.hidden))}

    def target(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return what is to be drawn of normalised pictures."""
        return surroundings(images, self.window).leave(images) if self.window else images

    def seen_as(self, drawn: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return what was drawn as pixels; where targets are normalised, by the true surroundings of each pixel."""
        return surroundings(images, self.window).enter(drawn) if self.window else drawn

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self)

    def open(self, path: Path) -> Crop:
        """Read a file, and hide the same cells of it every time."""
        image = decode_image(path, self.data.preprocess)
        return Crop(image, self.hidden_of(image, seeds.numpy_generator(0, seeds.SPLIT)))

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        assert isinstance(batch, Hidden)
        drawn = run(batch.images, batch.hidden).float()
        errors = (drawn - self.target(batch.images)).abs() * batch.hidden[:, None]
        counts = batch.hidden.flatten(1).sum(1).clamp(min=1) * batch.images.shape[1]
        mean = errors.flatten(1).sum(1) / counts
        share = batch.hidden.flatten(1).float().mean(1)
        pixels = denormalized(self.seen_as(drawn, batch.images), self.data.preprocess).cpu()
        return [
            Answer({"masked_l1": round(error, 5), "hidden": round(hidden, 4)}, seen)
            for error, hidden, seen in zip(mean.tolist(), share.tolist(), pixels, strict=True)
        ]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return {"L1 of hidden pixels": f"{answer.said['masked_l1']:.4f}", "hidden": f"{answer.said['hidden']:.0%}"}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw what the model saw, what it drew into the holes, and the true picture."""
        image, hidden = sample.image, sample.hidden
        shown = [torch.where(hidden, 128, image), torch.where(hidden, answer.seen, image), image]
        row = side_by_side([enlarged(one.to(torch.uint8).numpy()) for one in shown])
        return png(captioned(row, f"seen, drawn, true: L1 of hidden pixels {answer.said['masked_l1']:.3f}"))

    def pictures_by_default(self) -> bool:
        return True

    def panels(self, scores: Scores) -> Sequence[Bars]:
        """Show, for each layer, which experts hidden and visible tokens went to."""
        panels = []
        for layer, (hidden, visible) in scores.details["load_of_hidden_and_visible"].items():
            both = {"hidden tokens": hidden, "visible tokens": visible}
            series = {name: tuple(100 * share for share in own) for name, own in both.items()}
            labels = tuple(map(str, range(len(hidden))))
            title = f"Load of hidden and visible tokens: {short_name(layer)}"
            panels.append(Bars(title, "expert", "share of these tokens, %", labels, series, 100 / len(hidden)))
        return panels

    def hidden_of(self, image: UInt8[Tensor, "C H W"], rng: np.random.Generator) -> Bool[Tensor, "H W"]:
        """Draw what is hidden of a picture."""
        return torch.from_numpy(random_cells(*image.shape[1:], cell=self.cell, ratio=self.ratio, rng=rng))


@dataclass(frozen=True)
class CropSet:
    """Crops of photographs by number, cut when they are read.

    Attributes:
        task: tells how they are cut, and what of them is hidden.
        photographs: to cut from.
        count: crops in all.
    """

    task: SimMIM
    photographs: Photographs
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Draw | None = None) -> Crop:
        """Return a crop: a new one where `draw` is given, else the fixed one of this number."""
        rng, data = seeds.numpy_generator(0, seeds.SPLIT, index) if draw is None else draw(), self.task.data
        image = self.photographs.crop(data.preprocess.image_size, rng, scale=data.scale)
        if draw is not None:
            image = image.flip(2) if rng.random() < data.flip else image
            image = image if data.colors is None else data.colors(image, rng)
        return Crop(image, self.task.hidden_of(image, rng))


class _Scorer(Scorer):
    """Adds up errors over hidden pixels, of the model and of simple fillings, and the load of experts."""

    def __init__(self, task: SimMIM) -> None:
        self._task = task
        self._sums = np.zeros(4)  # of the model, of the mean colour, of bilinear filling, and pixels times channels
        self._loads: dict[str, Tensor] = {}

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, Hidden)
        with loads_apart(run.model, batch.hidden, self._loads):
            drawn = run(batch.images, batch.hidden).float()
        own = []
        targets = self._task.target(batch.images.float()).cpu().numpy()
        hidden_BHW, images = batch.hidden.cpu().numpy(), batch.images.float().cpu().numpy()
        for image, target, got, hidden in zip(images, targets, drawn.cpu().numpy(), hidden_BHW, strict=True):
            guesses = (got, *(self._targeted(image, filled) for filled in _fillings(image, hidden)))
            errors = [float(np.abs(guess - target)[:, hidden].sum()) for guess in guesses]
            count = int(hidden.sum()) * len(image)
            self._sums += [*errors, count]
            own.append(-errors[0] / max(1, count))
        return own

    def _targeted(self, image: np.ndarray, filled: np.ndarray) -> np.ndarray:
        """Return a filling in the units of what is drawn: those of the true picture's surroundings."""
        if not self._task.window:
            return filled
        own = surroundings(torch.from_numpy(image)[None], self._task.window)
        return own.leave(torch.from_numpy(filled)[None])[0].numpy()

    def state(self) -> tuple[np.ndarray, dict[str, Tensor]]:
        return self._sums, self._loads

    def scores(self, states: Sequence[tuple[np.ndarray, dict[str, Tensor]]]) -> Scores:
        *errors, count = sum((sums for sums, _ in states), np.zeros(4))
        names = [number.name for number in self._task.numbers[:3]]
        numbers = {name: float(error) / max(1, count) for name, error in zip(names, errors, strict=True)}
        loads = {name: sum(own[name] for _, own in states if name in own) for _, own in states for name in own}
        shares = {name: _shares(load) for name, load in loads.items() if isinstance(load, Tensor)}
        numbers["routing_gap"] = _gap(shares)
        return Scores(numbers, {"load_of_hidden_and_visible": shares})


@contextmanager
def loads_apart(model: nn.Module, hidden: Bool[Tensor, "B H W"], into: dict[str, Tensor]) -> Iterator[None]:
    """Count, in the forward inside the block, the pairs of hidden and of visible tokens that each expert gets.

    Args:
        model: with a `backbone`.
        hidden: pixels of its images.
        into: by layer, counts [2, E] of hidden and visible tokens, which are added to.
    """
    strides = getattr(model.get_submodule("backbone"), "strides", ())

    def watch(name: str) -> Any:
        def count(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            # Ids are moved by one, so that the count of absent pairs (-1) is the first and can be dropped.
            flags = _flags_of(hidden, len(routing.expert_ids), strides)
            ids = routing.expert_ids
            found = [
                ids[flags == of_hidden].flatten().add(1).bincount(minlength=routing.num_experts + 1)[1:]
                for of_hidden in (True, False)
            ]
            counts = torch.stack(found).cpu()
            into[name] = into[name] + counts if name in into else counts

        return count

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MoE)]
    handles = [layer.router.register_forward_hook(watch(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flags_of(hidden: Bool[Tensor, "B H W"], tokens: int, strides: Sequence[int]) -> Bool[Tensor, " T"]:
    """Return which tokens of a map see a hidden pixel; its number of tokens tells which map it is.

    A class token before those of each picture counts as visible.
    """
    found = [hidden_positions(hidden, stride) for stride in strides]
    for flags in (*found, *(nn.functional.pad(flags, (1, 0)) for flags in found)):
        if flags.numel() == tokens:
            return flags.flatten()
    raise ValueError(f"a layer of experts got {tokens} tokens, wanted one for each position of a map of the backbone")


def _fillings(image: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return filled_with_mean(image, hidden), filled_bilinearly(image, hidden)


def _gap(shares: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """Return how far apart the loads of hidden and of visible tokens are, mean over layers.

    It is half the sum of their differences: 0 where both kinds go to the same experts, 1 where they share none, and 0
    where there is one kind alone.
    """
    both = [own for own in shares.values() if all(map(sum, own))]
    gaps = [sum(abs(one - other) for one, other in zip(*own, strict=True)) / 2 for own in both]
    return sum(gaps) / max(1, len(gaps))


def _shares(counts: Tensor) -> list[list[float]]:
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    return [[round(v, 5) for v in own] for own in shares.tolist()]
