"""Panoptic: each pixel is of one segment, a thing that can be counted or stuff."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn

from synchromesh.compat.huggingface.heads.masks import MaskFormer, PanopticMasks
from synchromesh.data.annotated import Annotated
from synchromesh.data.annotated_split import AnnotatedSplit, PanopticScenes
from synchromesh.data.instances import Instances
from synchromesh.data.map_scenes import PanopticScene
from synchromesh.data.moves import Move, Size
from synchromesh.data.overlays import legend, outlined, overlaid, segment_colors
from synchromesh.data.panoptic import PanopticPicture, SegmentMap
from synchromesh.data.pictures import enlarged, png, side_by_side
from synchromesh.data.pixel_sources import AnnotatedFiles
from synchromesh.data.scene_maps import SceneSegments
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.panoptic import PanopticScores, Quality, Segments
from synchromesh.data.value_files import ids_png
from synchromesh.errors import InputError
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads import panoptic as heads
from synchromesh.models.heads.objects import Objects
from synchromesh.models.heads.panoptic import PanopticHead
from synchromesh.tasks.category_ids import CATEGORY_IDS, CLASSES, category_ids_of
from synchromesh.tasks.pixels import (
    UNKNOWN,
    PixelData,
    check_kind,
    large_map,
    opened,
    original,
    padded,
    sizes_beside,
)
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

WANTED = "a map of the segments of each picture"


@dataclass(frozen=True)
class SegmentedBatch(Batch):
    """Pictures of one size, smaller ones padded at the right and at the bottom, and their segments.

    Attributes:
        images: normalised.
        labels: class of each pixel; `UNKNOWN` in void, crowds and padding.
        boxes: of the things of each picture, in pixels.
        classes: of these things.
        masks: their pixels, with padding.
        things: whether each class is of things; the same for all pictures.
        sizes: height and width of each picture without its padding.
        moves: from each picture as it was.
        wholes: the segments of each picture as it was, to score on; None where nobody knows, or while one learns.
    """

    images: Float[Tensor, "B C H W"]
    labels: Int[Tensor, "B H W"]
    boxes: tuple[Float[Tensor, "_ 4"], ...]
    classes: tuple[Int[Tensor, " _"], ...]
    masks: tuple[Bool[Tensor, "_ _ _"], ...]
    things: Bool[Tensor, "B N"]
    sizes: tuple[Size, ...]
    moves: tuple[Move | None, ...]
    wholes: tuple[SegmentMap | None, ...]

    def objects(self) -> Objects:
        """Return the things of all pictures."""
        device, size = self.images.device, self.images.shape[2:]
        counts = torch.tensor([len(own) for own in self.classes], device=device, dtype=torch.int64)
        return Objects(
            torch.arange(len(self), device=device).repeat_interleave(counts),
            torch.cat([torch.zeros(0, 4, device=device), *self.boxes]),
            torch.cat([torch.zeros(0, device=device, dtype=torch.int64), *self.classes]),
            torch.cat([torch.zeros(0, *size, device=device, dtype=torch.bool), *self.masks]),
        )


@final
@dataclass(frozen=True)
class Panoptic(Task):
    """Give each pixel a segment. A sample is a `PanopticScene`.

    Attributes:
        data: which pictures.
        head: finds segments by the maps of the backbone.
    """

    data: PixelData = field(default_factory=PixelData)
    head: PanopticHead = field(default_factory=lambda: PanopticMasks(MaskFormer()))

    unit = "pictures"
    pipeline = "image-segmentation"
    values_folder = "panoptic_predictions"  # beside a json file of this name, as COCO's tools look for it
    numbers = (
        Number("PQ", "PQ", "{:.3f}"),
        Number("SQ", "SQ", "{:.3f}"),
        Number("RQ", "RQ", "{:.3f}"),
        Number("PQ_things", "PQ of things", "{:.3f}"),
        Number("PQ_stuff", "PQ of stuff", "{:.3f}"),
    )

    def splits(self, *, seed: int) -> Splits:
        source = self.data.source
        if isinstance(source, ComposedScenes):
            train, test = (SceneSegments(own) for own in source.load(self.data.preprocess))
            return Splits(train, test, {"classes": list(train.classes), "things": list(train.things)})
        train, test = self.data.parts(PanopticPicture, WANTED)
        learnt, scored = (AnnotatedSplit(part, PanopticScenes(), self.data.reading()) for part in (train, test))
        return Splits(learnt, scored, _facts(train), (*train.notes(), *test.notes()))

    def reading(self, folder: Path) -> Panoptic:
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
        return self.head.build(backbone.build(), facts["things"])

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> SegmentedBatch:
        """Put pictures together; in training all at one of the sizes of crops, which is drawn."""
        size, things = self.data.size_of_batch(rng), torch.tensor(facts["things"], dtype=torch.bool, device=device)
        scenes: Sequence[PanopticScene] = self.data.at_size(samples, size)
        found = padded(scenes, self.data.preprocess, device, size)
        known = [None if one.truth is None else one.truth.labels(UNKNOWN) for one in scenes]
        seen = [Instances.none() if one.truth is None else one.truth.instances(facts["things"]) for one in scenes]
        moves, wholes = (tuple(getattr(one, name) for one in scenes) for name in ("move", "whole"))
        return SegmentedBatch(
            found.images,
            found.maps(known, UNKNOWN, torch.int64),
            tuple(one.boxes.to(device) for one in seen),
            tuple(one.labels.to(device) for one in seen),
            tuple(_padded_masks(one, found.images) for one in seen),
            things.expand(len(scenes), -1),
            found.sizes,
            moves,
            wholes,
        )

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, SegmentedBatch)
        if not len(batch):
            return dict.fromkeys(self.head.weights(), 0)
        return self.head.counts(batch.objects(), batch.labels, batch.things[0].tolist(), ignore=UNKNOWN)

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the losses of the head, each a sum over what `counts` says."""
        assert isinstance(batch, SegmentedBatch)
        sizes, weights = sizes_beside(batch.images, batch.sizes), self.head.weights()
        sums = run(batch.images, sizes, batch.objects(), batch.labels, ignore=UNKNOWN)
        return {name: Term(total, weights[name]) for name, total in sums.items()}

    def scorer(self, facts: Facts) -> Scorer:
        return _Scorer(self, facts)

    def found(self, run: Run, batch: Batch) -> list[heads.Segments]:
        """Run the model and return the segments of each picture, at the size that it had."""
        assert isinstance(batch, SegmentedBatch)
        # Without a picture it runs too: other ranks wait for its part in their exchanges.
        found = run(batch.images, sizes_beside(batch.images, batch.sizes))
        return [one if move is None else as_it_was(one, move) for one, move in zip(found, batch.moves, strict=True)]

    def open(self, path: Path) -> PanopticScene:
        """Read a picture of any size, scaled as those that are scored on."""
        return opened(PanopticScene, path, self.data)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        """Say the segments of each picture, the likeliest first."""
        classes = tuple(facts["classes"])
        return [Answer(_said(one, classes, ask), (one, classes)) for one in self.found(run, batch)]

    def cells(self, answer: Answer) -> Mapping[str, str]:
        names = [f"{one['class']} {one['probability']:.0%}" for one in answer.said["segments"]]
        return {"segments": str(len(names)), "what": ", ".join(names) or "-"}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw the picture at its own size with the segments that were found; beside it, where known, the true ones."""
        found, classes = answer.seen
        maps = [(found.ids.numpy() - 1, found.labels.tolist())]
        if sample.whole is not None:
            maps.append((sample.whole.numbers, [one.label for one in sample.whole.segments]))
        picture = enlarged(original(sample, self.data.preprocess.channels))
        parts = []
        for numbers, labels in maps:
            ids = large_map(numbers)
            parts.append(outlined(overlaid(picture, ids, segment_colors(labels, len(classes))), ids))
        shown, there = side_by_side(parts), sorted({label for _, labels in maps for label in labels})
        names = legend([classes[label] for label in there], segment_colors(there, len(classes)), shown.shape[1])
        return png(np.concatenate([shown, names]))

    def values(self, answer: Answer, facts: Facts) -> bytes:
        """Return the ids of the segments that are told, as COCO writes them; 0 for no segment."""
        return ids_png(_told_ids(answer))

    def records(self, answer: Answer, facts: Facts) -> Sequence[Mapping[str, Any]]:
        """Return the segments that are told as COCO's panoptic files have them, by the data's category ids."""
        ids, (found, _), categories = _told_ids(answer), answer.seen, category_ids_of(facts)
        segments = [
            {
                "id": place,
                "category_id": categories[label],
                "score": round(score, 4),
                "iscrowd": 0,
                **_extent(ids == place),
            }
            for place, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True), 1)
            if (ids == place).any()
        ]
        return [{"height": ids.shape[0], "width": ids.shape[1], "segments_info": segments}]

    def records_head(self, facts: Facts) -> Mapping[str, Any]:
        named = zip(category_ids_of(facts), facts[CLASSES], facts["things"], strict=True)
        return {"categories": [{"id": one, "name": name, "isthing": int(thing)} for one, name, thing in named]}

    def pictures_by_default(self) -> bool:
        return True

    def about(self, facts: Facts) -> str:
        return f"{sum(facts['things'])} classes of things, {len(facts['things']) - sum(facts['things'])} of stuff"

    def panels(self, scores: Scores) -> Sequence[Panel]:
        """Show the numbers of things, of stuff, and of each class, the worst first."""
        classes = scores.details["classes"]
        worst = sorted(classes, key=lambda name: (classes[name] is None, (classes[name] or {"PQ": 0.0})["PQ"]))
        parts = [(name, *_cells(scores.details[name])) for name in ("all", "things", "stuff")]
        return (
            Sheet("Panoptic quality, means over classes", ("classes", "PQ", "SQ", "RQ"), tuple(parts)),
            Sheet(
                "Classes, the worst first",
                ("class", "PQ", "SQ", "RQ"),
                tuple((name, *_cells(classes[name])) for name in worst),
            ),
        )


class _Scorer(Scorer):
    """Matches segments at each picture's own size."""

    def __init__(self, task: Panoptic, facts: Facts) -> None:
        things = [label for label, thing in enumerate(facts["things"]) if thing]
        self._task, self._scores = task, PanopticScores(facts["classes"], things)

    def add(self, run: Run, batch: Batch) -> Sequence[float]:
        assert isinstance(batch, SegmentedBatch)
        own = []
        for found, whole in zip(self._task.found(run, batch), batch.wholes, strict=True):
            assert whole is not None
            own.append(self._scores.add(_true(whole), Segments(found.ids.long().cpu() - 1, found.labels.cpu())))
        return own

    def state(self) -> Any:
        return self._scores.state()

    def scores(self, states: Sequence[Any]) -> Scores:
        found = self._scores.numbers(states)
        means = {"all": found.all, "things": found.things, "stuff": found.stuff}
        details: dict[str, Any] = {name: _plain(own) for name, own in means.items()}
        details["classes"] = {name: _plain(own) for name, own in found.by_class.items()}
        whole, none = details["all"] or {}, {}
        numbers = {name: whole.get(name, 0.0) for name in ("PQ", "SQ", "RQ")}
        parts = {f"PQ_{name}": (details[name] or none).get("PQ", 0.0) for name in ("things", "stuff")}
        return Scores({**numbers, **parts}, details)


def as_it_was(found: heads.Segments, move: Move) -> heads.Segments:
    """Return segments of an image at the size that its picture has, by their nearest pixels, on the CPU."""
    ids = torch.from_numpy(move.inverse().labels(found.ids.cpu().numpy(), 0))
    return heads.Segments(ids, found.labels.cpu(), found.scores.cpu())


def _facts(annotated: Annotated[Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {CLASSES: list(annotated.classes), "things": list(annotated.things)}
    return facts | ({CATEGORY_IDS: list(annotated.category_ids)} if annotated.category_ids else {})


def _told_ids(answer: Answer) -> Int32[np.ndarray, "H W"]:
    """Return the segment of each pixel, from 1; 0 where it is none of those that are told."""
    ids = answer.seen[0].ids.numpy()
    return np.where(np.isin(ids, [one["id"] for one in answer.said["segments"]]), ids, 0).astype(np.int32)


def _extent(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {"area": int(mask.sum()), "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]}


def _true(whole: SegmentMap) -> Segments:
    return Segments(
        torch.from_numpy(whole.numbers).long(),
        torch.tensor([one.label for one in whole.segments], dtype=torch.int64),
        torch.tensor([one.crowd for one in whole.segments], dtype=torch.bool),
    )


def _padded_masks(found: Instances, images: Float[Tensor, "B C H W"]) -> Bool[Tensor, "M H W"]:
    masks = torch.zeros(len(found), *images.shape[2:], dtype=torch.bool, device=images.device)
    if found.masks is not None:
        masks[:, : found.masks.shape[1], : found.masks.shape[2]] = found.masks.to(images.device)
    return masks


def _said(found: heads.Segments, classes: Sequence[str], ask: Ask) -> dict[str, Any]:
    pixels = found.ids.long().flatten().bincount(minlength=len(found) + 1)[1:].tolist()
    each = zip(found.labels.tolist(), found.scores.tolist(), pixels, strict=True)
    segments = [
        {"id": place, "class": classes[label], "probability": round(score, 4), "pixels": count}
        for place, (label, score, count) in enumerate(each, start=1)
        if score >= (ask.least or 0)
    ]
    segments.sort(key=lambda one: -one["probability"])
    return {"height": found.ids.shape[0], "width": found.ids.shape[1], "segments": segments[: ask.top]}


def _plain(quality: Quality | None) -> dict[str, float] | None:
    return None if quality is None else {"PQ": quality.pq, "SQ": quality.sq, "RQ": quality.rq}


def _cells(quality: Mapping[str, float] | None) -> tuple[str, ...]:
    return ("-", "-", "-") if quality is None else tuple(f"{quality[name]:.3f}" for name in ("PQ", "SQ", "RQ"))
