"""CroCo v2: draw hidden patches of a view from the visible ones and a second view (arXiv 2211.10408). Needs no labels.

Shape letters: B pairs, C channels, H W pixels, L patches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.data.augment import denormalized
from synchromesh.data.hiding import random_cells
from synchromesh.data.pictures import captioned, enlarged, png, side_by_side
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.croco import CrossViewDecoder, as_vit
from synchromesh.models.patches import hidden_error, painted, patches_of, pictures_of
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.tasks.view_pairs import DrawnPair, PairData, PairSet
from synchromesh.training.mean_scorer import MeanScorer
from synchromesh.training.task import Answer, Ask, Batch, Draw, Facts, Number, Run, Scorer, Split, Splits, Task, Term


@dataclass(frozen=True)
class HiddenPair:
    """Two views, and what of the first one is hidden.

    Attributes:
        first: all of its pixels.
        second: of the same scene.
        wrong: of another one, to compare with; None where one learns.
        hidden: patches of the first that the model does not see, row by row.
    """

    first: UInt8[Tensor, "C S S"]
    second: UInt8[Tensor, "C S S"]
    wrong: UInt8[Tensor, "C S S"] | None
    hidden: Bool[Tensor, " L"]


@dataclass(frozen=True)
class HiddenPairs(Batch):
    """Pairs of views of one size and what of the first ones is hidden.

    Attributes:
        first: normalised, whole.
        second: normalised.
        wrong: normalised; None where one learns.
        hidden: their hidden patches.
    """

    first: Float[Tensor, "B C H W"]
    second: Float[Tensor, "B C H W"]
    wrong: Float[Tensor, "B C H W"] | None
    hidden: Bool[Tensor, "B L"]


@final
@dataclass(frozen=True)
class CroCo(Task):
    """Draw what is hidden of a view, with a second view of the same scene. A sample is a `HiddenPair`.

    Attributes:
        data: which pairs.
        decoder: draws, with attention to the second view.
        patch: side of a patch, pixels: that of the backbone.
        ratio: share of the first view's patches that is hidden.
    """

    data: PairData = field(default_factory=PairData)
    decoder: ViTDecoderConfig = field(default_factory=ViTDecoderConfig)
    patch: int = 16
    ratio: float = 0.9

    unit = "pairs"
    numbers = (
        Number("hidden_mse", "error of hidden patches", "{:.4f}", more_is_better=False),
        Number("wrong_view_mse", "with a view of another scene", "{:.4f}", more_is_better=False),
        Number("no_view_mse", "without a second view", "{:.4f}", more_is_better=False),
        Number("flat_mse", "of flat patches", "{:.4f}", more_is_better=False),
    )

    def __post_init__(self) -> None:
        if self.patch < 1 or not 0 < self.ratio < 1:
            raise ValueError(f"patch is {self.patch} and ratio {self.ratio}, wanted patch >= 1 and 0 < ratio < 1")
        if self.data.preprocess.image_size % self.patch:
            raise ValueError(
                f"views of {self.data.preprocess.image_size} pixels do not consist of patches of {self.patch}"
            )
        patches = (self.data.preprocess.image_size // self.patch) ** 2
        if math.ceil(patches * self.ratio) == patches:
            raise ValueError(f"ratio is {self.ratio}, wanted at least one of {patches} patches to be seen")

    def splits(self, *, seed: int) -> Splits:
        train, test = self.data.splits()
        return Splits(HiddenSet(self, train), HiddenSet(self, test))

    def reading(self, folder: Path) -> CroCo:
        """Return this task on pairs of overlapping crops of a folder's photographs."""
        return dataclasses.replace(self, data=self.data.of_folder(folder))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        return self.reading(folder).splits(seed=0).test

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        built = as_vit(backbone.build(), "CroCo")
        if built.strides[0] != self.patch:
            raise ValueError(f"hidden patches have {self.patch} pixels, those of the backbone {built.strides[0]}")
        return CrossViewDecoder(built, self.decoder, self.data.preprocess.channels)

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> HiddenPairs:
        first, second = (self.data.normalized([getattr(s, n) for s in samples], device) for n in ("first", "second"))
        wrong = [sample.wrong for sample in samples if sample.wrong is not None]
        hidden = (
            torch.stack([s.hidden for s in samples]) if samples else torch.zeros(0, self._places(), dtype=torch.bool)
        )
        return HiddenPairs(
            first,
            second,
            self.data.normalized(wrong, device) if len(wrong) == len(samples) else None,
            hidden.to(device),
        )

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, HiddenPairs)
        return {"hidden_mse": int(batch.hidden.sum())}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the sum over hidden patches of the mean square of drawn - true, true ones normalised."""
        assert isinstance(batch, HiddenPairs)
        drawn = run(batch.first, batch.second, batch.hidden)
        return {"hidden_mse": Term(hidden_error(drawn, self._patches(batch), batch.hidden).sum())}

    def scorer(self, facts: Facts) -> Scorer:
        return MeanScorer(self.numbers, self._measured)

    def open(self, path: Path) -> HiddenPair:
        """Read a file: two overlapping crops of its picture, the same ones every time."""
        return self.with_hidden(DrawnPair(self.data.one_of(path), None, seeds.numpy_generator(0, seeds.SPLIT)))

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        assert isinstance(batch, HiddenPairs)
        drawn, patches = run(batch.first, batch.second, batch.hidden).float(), self._patches(batch).float()
        errors = hidden_error(drawn, patches, batch.hidden) / batch.hidden.sum(1).clamp(min=1)
        side = self.data.preprocess.image_size // self.patch
        shown = torch.where(batch.hidden[..., None], painted(drawn, patches), patches)
        pixels = denormalized(pictures_of(shown, self.patch, (side, side)), self.data.preprocess).cpu()
        share = batch.hidden.float().mean(1)
        return [
            Answer({"hidden_mse": round(error, 5), "hidden": round(hidden, 4)}, seen)
            for error, hidden, seen in zip(errors.tolist(), share.tolist(), pixels, strict=True)
        ]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return {
            "error of hidden patches": f"{answer.said['hidden_mse']:.4f}",
            "hidden": f"{answer.said['hidden']:.0%}",
        }

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw the second view, what is visible of the first, what was drawn into it, and all of it."""
        side = self.data.preprocess.image_size // self.patch
        hidden = sample.hidden.view(side, side).repeat_interleave(self.patch, 0).repeat_interleave(self.patch, 1)
        shown = [sample.second, torch.where(hidden, 128, sample.first), answer.seen, sample.first]
        row = side_by_side([enlarged(one.to(torch.uint8).numpy()) for one in shown])
        return png(captioned(row, f"second view, seen, drawn, true: error {answer.said['hidden_mse']:.3f}"))

    def pictures_by_default(self) -> bool:
        return True

    def with_hidden(self, drawn: DrawnPair) -> HiddenPair:
        """Draw what is hidden of a pair's first view."""
        size = self.data.preprocess.image_size
        cells = random_cells(size, size, cell=self.patch, ratio=self.ratio, rng=drawn.rng)
        hidden = torch.from_numpy(np.ascontiguousarray(cells[:: self.patch, :: self.patch])).flatten()
        return HiddenPair(drawn.pair.first, drawn.pair.second, drawn.wrong, hidden)

    def _patches(self, batch: HiddenPairs) -> Float[Tensor, "B L P"]:
        return patches_of(batch.first, self.patch)

    def _places(self) -> int:
        return (self.data.preprocess.image_size // self.patch) ** 2

    def _measured(self, run: Run, batch: Batch) -> Mapping[str, Tensor]:
        """Return the errors of each pair with the right second view, with a wrong one, with none, and of no drawing."""
        assert isinstance(batch, HiddenPairs)
        patches, count = self._patches(batch), batch.hidden.sum(1).clamp(min=1)
        drawn = [run(batch.first, other, batch.hidden) for other in (batch.second, batch.wrong, None)]
        errors = [hidden_error(own, patches, batch.hidden) / count for own in (*drawn, torch.zeros_like(patches))]
        return dict(zip((number.name for number in self.numbers), errors, strict=True))


@dataclass(frozen=True)
class HiddenSet:
    """Pairs with hidden patches, by number.

    Attributes:
        task: says what is hidden.
        pairs: to hide patches of.
    """

    task: CroCo
    pairs: PairSet

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int, draw: Draw | None = None) -> HiddenPair:
        """Return a pair: a new one where `draw` is given, else the fixed one of this number."""
        return self.task.with_hidden(self.pairs.read(index, draw))
