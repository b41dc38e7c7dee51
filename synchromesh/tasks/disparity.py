"""Disparity: how far each pixel of the left view moves to the right one, by encoder and decoder of CroCo v2.

The loss is Laplacian with bounded scales (arXiv 2211.10408). After the paper: its head is a DPT on decoder features,
here it is one linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.data.pictures import captioned, enlarged, png, side_by_side
from synchromesh.errors import InputError
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.croco import DisparityDecoder, as_vit, laplacian
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.tasks.view_pairs import DrawnPair, PairData
from synchromesh.training.task import Answer, Ask, Batch, Facts, Number, Run, Scorer, Scores, Splits, Task, Term

BINS = 64  # of a pixel, by which the best constant is found


def stereo_pairs() -> PairData:
    """Return pairs of the stereo scene alone: no others have a known disparity."""
    return PairData(also=None)


@dataclass(frozen=True)
class StereoPairs(Batch):
    """Pairs of one size and their disparity.

    Attributes:
        first: left views, normalised.
        second: right views, normalised.
        wrong: right views of other scenes; None where one learns.
        disparity: pixels; 0 where nobody knows.
    """

    first: Float[Tensor, "B C H W"]
    second: Float[Tensor, "B C H W"]
    wrong: Float[Tensor, "B C H W"] | None
    disparity: Float[Tensor, "B H W"]


@final
@dataclass(frozen=True)
class Disparity(Task):
    """Find how far each pixel moves between two views. A sample is a `DrawnPair`.

    Attributes:
        data: which pairs.
        decoder: with attention to the second view.
        measure: pixels of disparity for an output of 1.
    """

    data: PairData = field(default_factory=stereo_pairs)
    decoder: ViTDecoderConfig = field(default_factory=ViTDecoderConfig)
    measure: float = 8.0

    unit = "pairs"
    numbers = (
        Number("epe", "end-point error", "{:.3f}", "pixels", more_is_better=False),
        Number("constant_epe", "of the best constant", "{:.3f}", "pixels", more_is_better=False),
        Number("wrong_view_epe", "with a view of another scene", "{:.3f}", "pixels", more_is_better=False),
    )

    def __post_init__(self) -> None:
        if not self.measure > 0:
            raise ValueError(f"measure is {self.measure}, wanted pixels of disparity, above 0")

    def splits(self, *, seed: int) -> Splits:
        return Splits(*self.data.splits())

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return DisparityDecoder(as_vit(backbone.build(), "Disparity"), self.decoder, self.measure)

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> StereoPairs:
        pairs = [sample.pair for sample in samples]
        first, second = (self.data.normalized([getattr(p, n) for p in pairs], device) for n in ("first", "second"))
        wrong = [sample.wrong for sample in samples if sample.wrong is not None]
        side = self.data.preprocess.image_size
        known = torch.stack([p.disparity for p in pairs]) if pairs else torch.zeros(0, side, side)
        return StereoPairs(
            first,
            second,
            self.data.normalized(wrong, device) if len(wrong) == len(samples) else None,
            known.to(device),
        )

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, StereoPairs)
        return {"laplacian": int((batch.disparity > 0).sum())}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the sum of |e| / s + log s over pixels of known disparity."""
        assert isinstance(batch, StereoPairs)
        return {"laplacian": Term(laplacian(run(batch.first, batch.second), batch.disparity))}

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Say the median disparity of each pair, and its error where it is known."""
        assert isinstance(batch, StereoPairs)
        found = run(batch.first, batch.second).float().cpu()
        answers = []
        for own, true in zip(found, batch.disparity.cpu(), strict=True):
            known = true > 0
            error = float((own[0] - true)[known].abs().mean()) if known.any() else None
            said = {"median": round(float(own[0].median()), 4), "epe": None if error is None else round(error, 4)}
            answers.append(Answer(said, own))
        return answers

    def open(self, path: Path) -> DrawnPair:
        """Read a file: two overlapping crops of its picture, the same ones every time; nobody knows their disparity."""
        return DrawnPair(self.data.one_of(path), None, seeds.numpy_generator(0, seeds.SPLIT))

    def cells(self, answer: Answer) -> Mapping[str, str]:
        error = answer.said["epe"]
        return {
            "median disparity, pixels": f"{answer.said['median']:.2f}",
            "end-point error, pixels": "-" if error is None else f"{error:.2f}",
        }

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw both views, the disparity that was found and, where it is known, the true one: near is bright."""
        true, found = sample.pair.disparity.numpy(), answer.seen[0].numpy()
        maps = [found] + ([true] if true.any() else [])
        least, most = (float(pick(np.concatenate([m[m != 0] for m in maps]))) for pick in (np.min, np.max))
        grey = [((m - least) / max(most - least, 1e-6) * 255).clip(0, 255).astype(np.uint8) for m in maps]
        views = [sample.pair.first.numpy(), sample.pair.second.numpy()]
        row = side_by_side([enlarged(one) for one in (*views, *(m[None] for m in grey))])
        error = "" if answer.said["epe"] is None else f"; found, true: off by {answer.said['epe']:.2f} pixels"
        return png(captioned(row, f"{least:.1f} (dark) to {most:.1f} pixels{error}"))

    def pictures_by_default(self) -> bool:
        return True


class _Scorer(Scorer):
    """Adds up errors over pixels, and counts disparities, from which follows what the best constant is off by."""

    def __init__(self, task: Disparity) -> None:
        self._sums = np.zeros(3)  # with the right view, with a wrong one, pixels
        self._bins = np.zeros(task.data.preprocess.image_size * BINS, dtype=np.int64)

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, StereoPairs)
        assert batch.wrong is not None
        found = [run(batch.first, other)[:, 0].float().cpu() for other in (batch.second, batch.wrong)]
        own = []
        for right, wrong, true in zip(*found, batch.disparity.cpu(), strict=True):
            known = true > 0
            errors = [float((one - true)[known].abs().double().sum()) for one in (right, wrong)]
            self._sums += [*errors, int(known.sum())]
            places = (true[known].numpy() * BINS).astype(np.int64).clip(0, len(self._bins) - 1)
            np.add.at(self._bins, places, 1)
            own.append(-errors[0] / max(1, int(known.sum())))
        return own

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        return self._sums, self._bins

    def scores(self, states: Sequence[tuple[np.ndarray, np.ndarray]]) -> Scores:
        """Return means over all pixels. Raises InputError where no pixel has a known disparity."""
        right, wrong, count = sum((sums for sums, _ in states), np.zeros(3))
        if not count:
            raise InputError("no pair to score on has a pixel of known disparity: score on a stereo scene")
        constant = best_constant_error(np.sum([bins for _, bins in states], 0))
        numbers = {"epe": right / count, "constant_epe": constant, "wrong_view_epe": wrong / count}
        return Scores({name: float(value) for name, value in numbers.items()})


def best_constant_error(bins: Int64[np.ndarray, " N"]) -> float:
    """Return the mean distance of disparities from their median, in pixels, each taken as the middle of its bin."""
    middles = (np.arange(len(bins)) + 0.5) / BINS
    median = middles[np.searchsorted(np.cumsum(bins), bins.sum() / 2)]
    return float((bins * np.abs(middles - median)).sum() / bins.sum())
