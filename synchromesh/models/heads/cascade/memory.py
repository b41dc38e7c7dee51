"""How much memory a training step of a cascade takes, at most: a formula, which a test and a benchmark hold it to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from synchromesh.models.heads.cascade.box_stage import Norm
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN

NUMBER = 4  # bytes: float32
OF_ANCHOR = 18  # numbers of an anchor while forward runs: its box, logit and deltas, in their level and joined


def kept_bytes(
    head: CascadeMaskRCNN,
    *,
    widths: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    height: int,
    width: int,
    images: int = 1,
) -> Mapping[str, int]:
    """Return the bytes that forward keeps for backward in float32, by part of the head; the backbone's come on top.

    With P_i positions and D_i channels of map i, C channels of the pyramid, R regions of a stage, M masks of a stage:

        pyramid    sum over maps of P_i (D_i + 2 C): normalised, summed, smoothed
        proposals  sum over maps and the one above of P_i C
        boxes      stages R (C S^2 (1 + 2 convs) + 2 points S^2 + linears hidden); 1 + convs without norms
        masks      stages M (C s^2 (1 + convs) + 2 points s^2 + (2 s)^2 (C + 2))

    S and s are the sides of the squares for boxes and masks, points those of a RoIAlign's bin.

    Args:
        head: its settings.
        widths: of the backbone's maps.
        strides: of the backbone's maps.
        num_classes: N.
        height: of the padded images, pixels.
        width: of the padded images, pixels.
        images: of a batch on this rank.
    """
    channels, boxes = head.width, head.boxes
    places = [-(-height // stride) * -(-width // stride) for stride in (*strides, 2 * strides[-1])]
    regions = images * boxes.sampled
    masks = images * int(boxes.sampled * boxes.positive_share) if head.masks else 0
    layers = 1 + boxes.convs * (1 if boxes.norm is Norm.NONE else 2)
    grid = 2 * head.samples**2  # coordinates of a bin's points
    of_region = (channels * layers + grid) * boxes.side**2 + boxes.linears * boxes.hidden + num_classes + 1
    of_mask = (channels * (1 + head.mask_convs) + grid) * head.mask_side**2 + (2 * head.mask_side) ** 2 * (channels + 2)
    numbers = {
        "pyramid": images * sum(p * (own + 2 * channels) for p, own in zip(places[:-1], widths, strict=True)),
        "proposals": images * sum(places) * channels,
        "boxes": len(boxes) * regions * of_region,
        "masks": len(boxes) * masks * of_mask,
    }
    return {part: NUMBER * count for part, count in numbers.items()}


def working_bytes(
    head: CascadeMaskRCNN, *, strides: Sequence[int], num_classes: int, height: int, width: int, images: int = 1
) -> int:
    """Return the bytes that come and go beside those that are kept, at their highest: where backward begins.

    That is two gradients of the masks' last squares and two of their logits; without masks, the points of a stage's
    RoIAlign. The anchors of the images are there too.
    """
    places = sum(-(-height // stride) * -(-width // stride) for stride in (*strides, 2 * strides[-1]))
    boxes = head.boxes
    masks = (
        images * int(boxes.sampled * boxes.positive_share) * (2 * head.mask_side) ** 2 * 2 * (head.width + num_classes)
    )
    points = images * boxes.sampled * head.width * boxes.side**2 * (head.samples**2 + 1)
    anchors = images * places * len(head.proposals.ratios) * OF_ANCHOR
    return NUMBER * (max(points, masks if head.masks else 0) + anchors)
