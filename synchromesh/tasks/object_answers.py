"""What a model finds in scenes, on its way back to whole pictures: masks as run lengths, words, a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from synchromesh.data.instances import Instances
from synchromesh.data.moves import Move
from synchromesh.data.pictures import COLORS, TRUTH, Box, enlarged, factor_of, png, with_boxes
from synchromesh.data.regions import RunLengths
from synchromesh.data.scene import Scene, returned
from synchromesh.data.scores.results import coco_results
from synchromesh.data.scores.rle import Rle, encoded

AT_ONCE = 8  # masks of a whole picture in memory at a time
SHOWN_SHARE = 0.45  # of an object's colour in its pixels


@dataclass(frozen=True)
class Told:
    """What was found in a picture, in its own pixels, the likeliest first.

    Attributes:
        found: boxes, labels and scores.
        rles: masks of these; None from a model that says none.
    """

    found: Instances
    rles: tuple[Rle, ...] | None = None

    def first(self, count: int | None) -> Told:
        """Return the likeliest ones; all for None."""
        found, rles = self.found, self.rles
        assert found.scores is not None
        cut = Instances(found.boxes[:count], found.labels[:count], found.scores[:count])
        return Told(cut, None if rles is None else rles[:count])

    def said(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return it as plain JSON values."""
        found = self.found
        assert found.scores is not None
        each = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
        objects: list[dict[str, Any]] = [
            {"class": classes[label], "probability": round(score, 4), "box": [round(side, 2) for side in box]}
            for box, label, score in each
        ]
        if self.rles is not None:
            objects = [{**one, "mask": rle} for one, rle in zip(objects, self.rles, strict=True)]
        return {"objects": objects}

    def results(self, category_ids: Sequence[int]) -> list[dict[str, Any]]:
        """Return it as COCO's result files have it, without the number of the picture."""
        records = coco_results(self.found, 0, category_ids, rles=self.rles)
        return [{name: value for name, value in one.items() if name != "image_id"} for one in records]


def told(found: Instances, scale: tuple[float, float], move: Move | None, *, whole: bool) -> Told:
    """Return what was found in a scene in pixels of its picture.

    Args:
        found: in pixels of the scene, without its padding.
        scale: of the scene.
        move: from the picture; None where both are the same but for the scale.
        whole: whether the move says where boxes lie too, which are then cut at the picture's border.
    """
    plain = dataclasses.replace(found, masks=None)
    boxes = returned(plain, move) if whole and move is not None else plain.scaled(1 / scale[0], 1 / scale[1])
    if found.masks is None:
        return Told(boxes)
    return Told(boxes, tuple(_run_lengths(found, move)))


def drawn(sample: Scene, objects: Sequence[dict[str, Any]]) -> bytes:
    """Return a PNG of what was found in colour, masks as a tint, and of the true boxes, where known, in white."""
    known, move = sample.truth, sample.move
    names = sorted({one["class"] for one in objects})
    colors = [COLORS[names.index(one["class"]) % len(COLORS)] for one in objects]
    image = _tinted(sample, objects, colors)
    times = factor_of(image.shape[1], image.shape[2])
    boxes = [] if known is None else [Box(_times(box, times), color=TRUTH) for box in known.boxes.tolist()]
    for one, color in zip(objects, colors, strict=True):
        corners = _in_scene(one["box"], sample.scale, move if sample.picture is not None else None)
        boxes.append(Box(_times(corners, times), f"{one['class']} {one['probability']:.0%}", color))
    return png(with_boxes(enlarged(image), boxes))


def _run_lengths(found: Instances, move: Move | None) -> list[Rle]:
    """Return masks of the picture, a few of them decoded at a time."""
    assert found.masks is not None
    if move is None:
        return encoded(found.masks)
    rles: list[Rle] = []
    for start in range(0, len(found), AT_ONCE):
        few = slice(start, start + AT_ONCE)
        part = returned(Instances(found.boxes[few], found.labels[few], masks=found.masks[few]), move)
        assert part.masks is not None
        rles += encoded(part.masks)
    return rles


def _in_scene(box: Sequence[float], scale: tuple[float, float], move: Move | None) -> list[float]:
    if move is not None:
        return move.boxes(torch.tensor([list(box)]))[0].tolist()
    left, top, right, bottom = box
    return [left * scale[0], top * scale[1], right * scale[0], bottom * scale[1]]


def _tinted(
    sample: Scene, objects: Sequence[dict[str, Any]], colors: Sequence[tuple[int, int, int]]
) -> UInt8[np.ndarray, "C H W"]:
    image = sample.image.numpy()
    if not any("mask" in one for one in objects):
        return image
    canvas = np.broadcast_to(image, (3, *image.shape[1:])).astype(np.float32)
    for one, color in zip(objects, colors, strict=True):
        region = RunLengths.parsed(one["mask"]["counts"], *one["mask"]["size"])
        move = sample.move or Move.none(*one["mask"]["size"])
        tint = np.array(color, dtype=np.float32)[:, None]
        here = region.moved(move)
        canvas[:, here] = canvas[:, here] * (1 - SHOWN_SHARE) + tint * SHOWN_SHARE
    return canvas.round().astype(np.uint8)


def _times(box: Sequence[float], factor: int) -> tuple[float, float, float, float]:
    left, top, right, bottom = (side * factor for side in box)
    return left, top, right, bottom
