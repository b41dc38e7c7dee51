"""Scene: a picture with its objects, as a model learns from it, and the way back to the picture as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from synchromesh.data.annotation import AnnotatedPicture, Annotation
from synchromesh.data.instances import Instances
from synchromesh.data.moves import Move, Size
from synchromesh.models.boxes import area


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: its pixels.
        truth: the objects; None where nobody knows.
        scale: pixels of the image for one of the picture as it was, along width and height.
        picture: the annotations of the whole picture, in its own pixels; None where it is composed.
        move: from the picture to the image; None where it is composed.
    """

    image: UInt8[Tensor, "C H W"]
    truth: Instances | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    picture: AnnotatedPicture | None = None
    move: Move | None = None

    def moved(self, move: Move, least_visible: float = 0.0) -> Scene:
        """Return the scene moved once more; objects that it hides too much of are left out of the truth."""
        truth = None if self.truth is None else moved_instances(self.truth, move, least_visible)
        scale = self.scale[0] * move.scale[0], self.scale[1] * move.scale[1]
        whole = None if self.move is None else self.move.then(move)
        return Scene(move.pixels(as_picture(self.image)), truth, scale, self.picture, whole)

    def resized(self, factor: float) -> Scene:
        """Return the scene with so many times its pixels along each side, for a batch of another size."""
        move = resizing(self.image, factor)
        return self if move.size == move.source else self.moved(move)


def resizing(image: UInt8[Tensor, "C H W"], factor: float) -> Move:
    """Return the move to an image of so many times as many pixels along each side, one at least."""
    _, height, width = image.shape
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return Move((height, width), size, (size[1] / width, size[0] / height))


def as_picture(image: UInt8[Tensor, "C H W"]) -> Image.Image:
    """Return an image as Pillow has it."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def instances(
    objects: Sequence[Annotation], move: Move, *, masks: bool = False, least_visible: float = 0.0
) -> Instances:
    """Return the objects of a picture that a crop shows and that are learnt from.

    Left out are what is ignored, what the crop shows too little of, and with masks what has no region. With masks, an
    object that the crop cuts gets the tightest box around the rest of its pixels.

    Args:
        objects: of the picture.
        move: to the crop.
        masks: whether to make them.
        least_visible: share of an object's box that has to be seen.

    Raises:
        ValueError: a region makes no sense; the message names the annotation.
    """
    learnt = [one for one in objects if not one.ignored and (one.region is not None or not masks)]
    whole = move.boxes(torch.tensor([one.box for one in learnt], dtype=torch.float64).reshape(-1, 4))
    boxes, seen = _seen(whole, move.size, least_visible)
    labels = torch.tensor([one.label for one in learnt], dtype=torch.int64)
    if not masks:
        return Instances(boxes[seen].float(), labels[seen])
    drawn = [_drawn(one, move) for one, shown in zip(learnt, seen.tolist(), strict=True) if shown]
    pixels = torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *move.size, dtype=torch.bool)
    found = Instances(boxes[seen].float(), labels[seen], masks=pixels)
    return _with_pixels(found, cut=(boxes != whole)[seen].any(dim=1))


def moved_instances(found: Instances, move: Move, least_visible: float = 0.0) -> Instances:
    """Return objects as a crop has them, without what it shows too little of; masks by their nearest pixels."""
    whole = move.boxes(found.boxes)
    boxes, seen = _seen(whole, move.size, least_visible)
    masks = None if found.masks is None else _moved_masks(found.masks[seen], move)
    scores = None if found.scores is None else found.scores[seen]
    kept = Instances(boxes[seen], found.labels[seen], scores, masks)
    return kept if masks is None else _with_pixels(kept, cut=(boxes != whole)[seen].any(dim=1))


def returned(found: Instances, move: Move) -> Instances:
    """Return what was found in a crop in pixels of the picture; all of it, in the same order."""
    back = move.inverse()
    boxes, _ = _seen(back.boxes(found.boxes), back.size, 0.0)
    masks = None if found.masks is None else _moved_masks(found.masks, back)
    return dataclasses.replace(found, boxes=boxes, masks=masks)


def _seen(
    boxes: Float[Tensor, "M 4"], size: Size, least_visible: float
) -> tuple[Float[Tensor, "M 4"], Bool[Tensor, " M"]]:
    """Return boxes cut at the border of a crop, and which of them it shows enough of."""
    height, width = size
    cut = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    return cut, (area(cut) > 0) & (area(cut) >= least_visible * area(boxes))


def _drawn(one: Annotation, move: Move) -> Bool[np.ndarray, "H W"]:
    assert one.region is not None
    try:
        return one.region.moved(move)
    except ValueError as error:
        raise ValueError(f"annotation {one.number}: {error}") from error


def _moved_masks(masks: Bool[Tensor, "M _ _"], move: Move) -> Bool[Tensor, "M H W"]:
    rows, columns = (torch.from_numpy(side) for side in move.read_at())
    found = masks[:, rows.clamp(min=0)][:, :, columns.clamp(min=0)]
    return found & (rows >= 0)[:, None] & (columns >= 0)


def _with_pixels(found: Instances, cut: Bool[Tensor, " M"]) -> Instances:
    """Return the objects that have pixels; those that were cut with the tightest boxes around them."""
    assert found.masks is not None
    there = found.masks.flatten(1).any(dim=1)
    masks = found.masks[there]
    boxes = torch.where(cut[there][:, None], _hulls(masks).to(found.boxes), found.boxes[there])
    scores = None if found.scores is None else found.scores[there]
    return Instances(boxes, found.labels[there], scores, masks)


def _hulls(masks: Bool[Tensor, "M H W"]) -> Float[Tensor, "M 4"]:
    """Return the tightest box around the pixels of each, which has some."""
    columns, rows = masks.any(dim=1).float(), masks.any(dim=2).float()
    first = [side.argmax(dim=1) for side in (columns, rows)]
    last = [side.shape[1] - side.flip(1).argmax(dim=1) for side in (columns, rows)]
    return torch.stack([*first, *last], dim=1).float()
