"""MultiTask: several dense tasks at once, of one picture and one backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from synchromesh.data.annotated_split import AnnotatedSplit, PanopticScenes
from synchromesh.data.dense_targets import UNKNOWN, DenseTargets, dense_targets
from synchromesh.data.map_scenes import PanopticScene
from synchromesh.data.moves import Move, Size
from synchromesh.data.overlays import class_colors, overlaid
from synchromesh.data.panoptic import PanopticPicture, SegmentMap
from synchromesh.data.pictures import captioned, enlarged, png, side_by_side
from synchromesh.data.pixel_sources import AnnotatedFiles
from synchromesh.data.scene_maps import SceneSegments
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.multi_task import mean_relative_change
from synchromesh.errors import InputError
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.multi_task import MultiTaskModel
from synchromesh.tasks.dense_kinds import PIXELS, WORKS, DenseKind
from synchromesh.tasks.pixels import PixelData, as_given, check_kind, large_map, opened, original, padded
from synchromesh.training.panels import Panel, Sheet
from synchromesh.training.task import (
    Answer,
    Ask,
    Batch,
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

WANTED = "a map of the segments of each picture, which classes, saliency, edges and centres follow from"
ALL = (DenseKind.SEMANTIC, DenseKind.SALIENCY, DenseKind.EDGES, DenseKind.OFFSETS)
CHANGE = Number("mean_change", "mean change against single tasks", "{:+.4f}")


@dataclass(frozen=True)
class DenseBatch(Batch):
    """Pictures of one size, smaller ones padded at the right and at the bottom, and what is true of their pixels.

    Attributes:
        images: normalised.
        labels: classes; `UNKNOWN` where nobody knows, and in padding, here and below.
        salient: 1 on objects, else 0.
        edges: 1 beside another segment, else 0.
        offsets: rows and columns to the middle of the object, pixels; then 1 on objects, else `UNKNOWN`.
        sizes: height and width of each picture without its padding.
        moves: from each picture as it was.
        wholes: the segments of each picture as it was, to score on; None where nobody knows, or while one learns.
    """

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, "B H W"]
    salient: Int[Tensor, "B H W"]
    edges: Int[Tensor, "B H W"]
    offsets: Float[Tensor, "B 3 H W"]
    sizes: tuple[Size, ...]
    moves: tuple[Move | None, ...]
    wholes: tuple[SegmentMap | None, ...]


@final
@dataclass(frozen=True)
class MultiTask(Task):
    """Do several dense tasks at once. A sample is a `PanopticScene`, whose segments say what all of them want.

    Attributes:
        data: which pictures.
        tasks: which tasks; a backbone that was adapted for these names sees each picture for each of them.
        weights: of the tasks' losses, in their order; none for 1 each.
        width: of the pyramid of each task's head.
        single: what models trained for each task alone scored, in the same order; none where that is not known. With
            it, the headline is the mean relative change against them.
    """

    data: PixelData = field(default_factory=PixelData)
    tasks: tuple[DenseKind, ...] = ALL
    weights: tuple[float, ...] = ()
    width: int = 64
    single: tuple[float, ...] = ()

    unit = "pictures"

    def __post_init__(self) -> None:
        without = [kind.value for kind in self.tasks if kind not in WORKS]
        if without:
            raise ValueError(
                f"the task {without[0]!r} has no data: segments of pixels say nothing of it; wanted some of "
                f"{[kind.value for kind in WORKS]}"
            )
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"got the tasks {[kind.value for kind in self.tasks]}, wanted one or more, each once")
        for name in ("weights", "single"):
            if len(getattr(self, name)) not in (0, len(self.tasks)):
                raise ValueError(
                    f"got {len(getattr(self, name))} numbers in {name}, wanted one for each of {len(self.tasks)} tasks"
                )

    @property
    def numbers(self) -> tuple[Number, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]  # of these tasks
        own = tuple(WORKS[kind].number for kind in self.tasks)
        return (CHANGE, *own) if self.single else own

    def splits(self, *, seed: int) -> Splits:
        source = self.data.source
        if isinstance(source, ComposedScenes):
            train, test = (SceneSegments(own) for own in source.load(self.data.preprocess))
            return Splits(train, test, {"classes": list(train.classes), "things": list(train.things)})
        train, test = self.data.parts(PanopticPicture, WANTED)
        learnt, scored = (AnnotatedSplit(part, PanopticScenes(), self.data.reading()) for part in (train, test))
        facts = {"classes": list(train.classes), "things": list(train.things)}
        return Splits(learnt, scored, facts, (*train.notes(), *test.notes()))

    def reading(self, folder: Path) -> MultiTask:
        """Return this task on a panoptic json of COCO, or a folder with one (`data.layouts`)."""
        return dataclasses.replace(self, data=self.data.of_files(folder))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        found = AnnotatedFiles(folder).all_to_score(tuple(facts["classes"]))
        check_kind(found, PanopticPicture, WANTED)
        if list(found.things) != facts["things"]:
            raise InputError(f"{found.origin} has other classes of things than the model was trained on")
        return AnnotatedSplit(found, PanopticScenes(), self.data.reading())

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        channels = {kind.value: WORKS[kind].channels(len(facts["classes"])) for kind in self.tasks}
        return MultiTaskModel(backbone.build(), channels, width=self.width)

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> DenseBatch:
        """Put pictures together; in training all at one of the sizes of crops, which is drawn."""
        size = self.data.size_of_batch(rng)
        scenes: Sequence[PanopticScene] = self.data.at_size(samples, size)
        found = padded(scenes, self.data.preprocess, device, size)
        truths = [None if one.truth is None else dense_targets(one.truth, facts["things"]) for one in scenes]
        beside = {work.beside: _beside(found.images, truths, work.truth) for work in WORKS.values()}
        moves, wholes = (tuple(getattr(one, name) for one in scenes) for name in ("move", "whole"))
        return DenseBatch(found.images, **beside, sizes=found.sizes, moves=moves, wholes=wholes)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {kind.value: WORKS[kind].count(getattr(batch, WORKS[kind].beside)) for kind in self.tasks}

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the loss of each task, a sum over what `counts` says."""
        assert isinstance(batch, DenseBatch)
        said, weights = run(batch.images), self.weights or (1.0,) * len(self.tasks)
        terms = {}
        for kind, weight in zip(self.tasks, weights, strict=True):
            total = WORKS[kind].loss(said[kind.value], getattr(batch, WORKS[kind].beside))
            terms[kind.value] = Term(total, weight)
        return terms

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self, facts)

    def found(self, run: Run, batch: Batch) -> list[dict[DenseKind, Float[Tensor, "_ H W"]]]:
        """Run the model and return the map of each task of each picture, at the size that it had; offsets in pixels."""
        assert isinstance(batch, DenseBatch)
        # Without a picture it runs too: other ranks wait for its part in their exchanges.
        said = dict(zip(self.tasks, _in_order(run(batch.images), self.tasks), strict=True))
        found = []
        for row, (size, move) in enumerate(zip(batch.sizes, batch.moves, strict=True)):
            own = {
                kind: as_given(x[row], size, move or Move.none(*size)).float().detach().cpu()
                for kind, x in said.items()
            }
            if DenseKind.OFFSETS in own and move is not None:
                longer = torch.tensor([was / now for was, now in zip(move.source, size, strict=True)])
                own[DenseKind.OFFSETS] = own[DenseKind.OFFSETS] * longer[:, None, None]
            found.append(own)
        return found

    def open(self, path: Path) -> PanopticScene:
        """Read a picture of any size, scaled as those that are scored on."""
        return opened(PanopticScene, path, self.data)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Say of each picture the classes, the largest first, and which shares are salient and edges."""
        return [Answer(_said(one, facts, ask), (one, facts)) for one in self.found(run, batch)]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        return {name: _cell(value) for name, value in answer.said.items() if name not in ("height", "width")}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw the picture with what each task found, and below it, where known, what is true."""
        found, facts = answer.seen
        picture = enlarged(original(sample, self.data.preprocess.channels))
        rows = [[_drawn(kind, x, picture) for kind, x in found.items()]]
        if sample.whole is not None:
            targets = dense_targets(sample.whole, facts["things"])
            true = {kind: _as_said(kind, WORKS[kind].truth(targets), len(facts["classes"])) for kind in found}
            rows.append([_drawn(kind, x, picture) for kind, x in true.items()])
        said = ", ".join(kind.value for kind in found) + ("; below: true" if len(rows) > 1 else "")
        return png(captioned(np.concatenate([side_by_side(row) for row in rows]), said))

    def pictures_by_default(self) -> bool:
        return True

    def about(self, facts: Facts) -> str:
        return f"{len(self.tasks)} tasks, {len(facts['classes']):,} classes"

    def panels(self, scores: Scores) -> Sequence[Panel]:
        """Show each task beside a model trained for it alone."""
        rows = [
            (task, title, f"{value:.4f}", "-" if alone is None else f"{alone:.4f}")
            for task, (title, value, alone) in scores.details["tasks"].items()
        ]
        return (Sheet("Tasks", ("task", "number", "here", "trained alone"), tuple(rows)),)


class _Scorer(Scorer):
    """Adds up what each task's score is made of, at each picture's own size."""

    def __init__(self, task: MultiTask, facts: Facts) -> None:
        self._task, self._things, self._classes = task, facts["things"], len(facts["classes"])
        self._sums: dict[str, Tensor] = {}

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, DenseBatch)
        own = []
        for found, whole in zip(self._task.found(run, batch), batch.wholes, strict=True):
            assert whole is not None
            targets, good = dense_targets(whole, self._things), []
            for kind, said in found.items():
                work = WORKS[kind]
                counted = work.scored(said, work.truth(targets), self._classes)
                self._sums[kind.value] = self._sums.get(kind.value, torch.zeros_like(counted)) + counted
                good.append(work.score(counted) if work.number.more_is_better else -work.score(counted) / PIXELS)
            own.append(sum(good) / len(good))
        return own

    def state(self) -> dict[str, Tensor]:
        return self._sums

    def scores(self, states: Sequence[Mapping[str, Tensor]]) -> Scores:
        task = self._task
        found = {}
        for kind in task.tasks:
            own = [state[kind.value] for state in states if kind.value in state]
            found[kind] = WORKS[kind].score(torch.stack(own).sum(0)) if own else 0.0
        numbers = {WORKS[kind].number.name: value for kind, value in found.items()}
        if task.single:
            better = [WORKS[kind].number.more_is_better for kind in task.tasks]
            numbers[CHANGE.name] = mean_relative_change(list(found.values()), task.single, better)
        alone = task.single or (None,) * len(task.tasks)
        told = {
            kind.value: [WORKS[kind].number.heading, found[kind], single]
            for kind, single in zip(task.tasks, alone, strict=True)
        }
        return Scores(numbers, {"tasks": told})


def _in_order(said: Mapping[str, Tensor], kinds: Sequence[DenseKind]) -> list[Tensor]:
    """Return maps by tasks, with offsets in pixels."""
    return [said[kind.value] * (PIXELS if kind is DenseKind.OFFSETS else 1.0) for kind in kinds]


def _beside(images: Tensor, truths: Sequence[DenseTargets | None], truth: Any) -> Tensor:
    """Return what is true, in the size of the images, `UNKNOWN` in padding and where nobody knows."""
    like = truth(_NOTHING)
    found = torch.full((len(truths), *like.shape[:-2], *images.shape[2:]), UNKNOWN, dtype=like.dtype)
    for row, targets in zip(found, truths, strict=True):
        if targets is not None:
            own = truth(targets)
            row[..., : own.shape[-2], : own.shape[-1]] = own
    return found.to(images.device)


_NOTHING = dense_targets(SegmentMap(np.zeros((0, 0), dtype=np.int32), ()), ())


def _said(found: Mapping[DenseKind, Tensor], facts: Facts, ask: Ask) -> dict[str, Any]:
    height, width = next(iter(found.values())).shape[1:]
    said: dict[str, Any] = {"height": height, "width": width}
    for kind, x in found.items():
        if kind is DenseKind.SEMANTIC:
            shares = x.argmax(0).flatten().bincount(minlength=len(x)).double() / x[0].numel()
            order = [label for label in shares.argsort(descending=True, stable=True).tolist() if shares[label] > 0]
            said[kind.value] = {facts["classes"][label]: round(float(shares[label]), 6) for label in order[: ask.top]}
        elif kind is DenseKind.OFFSETS:
            said[kind.value] = round(float(torch.linalg.vector_norm(x, dim=0).mean()), 3)
        else:
            said[kind.value] = round(float((x[0] > 0).double().mean()), 6)
    return said


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {share:.1%}" for name, share in value.items()) or "-"
    return str(value)


def _as_said(kind: DenseKind, truth: Tensor, classes: int) -> Tensor:
    """Return what is true in the form of what a model says; what nobody knows as no."""
    if kind is DenseKind.SEMANTIC:
        return F.one_hot(truth.clamp(min=0), classes).permute(2, 0, 1).float()
    return truth[:2] * (truth[2:] > 0) if kind is DenseKind.OFFSETS else (truth[None] > 0).float() * 100 - 50


def _drawn(kind: DenseKind, said: Tensor, picture: UInt8[np.ndarray, "_ _ 3"]) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draw classes over the picture; probabilities, and lengths of offsets, the longer the brighter."""
    if kind is DenseKind.SEMANTIC:
        return overlaid(picture, large_map(said.argmax(0).numpy()), class_colors(len(said)))
    if kind is DenseKind.OFFSETS:
        shade = (torch.linalg.vector_norm(said, dim=0) / (2 * PIXELS)).clamp(max=1)
    else:
        shade = said[0].sigmoid()
    grey = large_map((shade * 255).round().to(torch.uint8).numpy())
    return np.repeat(grey[:, :, None], 3, axis=2)
