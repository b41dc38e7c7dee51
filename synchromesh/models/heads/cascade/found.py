"""What a cascade finds: of the last stage's boxes those that are likely and overlap little."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from synchromesh.models.boxes import nms
from synchromesh.models.heads.cascade.region_proposals import Regions
from synchromesh.models.heads.objects import Found


def found_boxes(
    regions: Regions,
    scores: Sequence[Float[Tensor, "R N1"]],
    images: int,
    *,
    least: float,
    overlap: float,
    most: int,
    of_class: Float[Tensor, "R N 4"] | None = None,
) -> list[Found]:
    """Return what is found in each image, without masks.

    A region is found as every class whose probability, the mean over the stages, is `least` or more. Of the boxes of a
    class that overlap by more than `overlap` (IoU) the likeliest stays; of an image the `most` likeliest.

    Args:
        regions: as the last stage sees them.
        scores: probabilities of each stage, of the classes and of nothing at the end.
        images: of the batch.
        least: lowest probability.
        overlap: IoU.
        most: boxes of an image.
        of_class: the box of each class; None where all classes have the region's own.
    """
    probability = torch.stack(list(scores)).mean(0)[:, :-1]
    of_class = regions.boxes[:, None].expand(-1, probability.shape[1], -1) if of_class is None else of_class
    likely = (probability >= least) & (of_class[:, :, 2:] > of_class[:, :, :2]).all(2)
    found = []
    for image in range(images):
        region, label = (likely & (regions.image == image)[:, None]).nonzero(as_tuple=True)
        boxes, own = of_class[region, label], probability[region, label]
        kept = nms(boxes, own, label, most=overlap)[:most]
        found.append(Found(boxes[kept], own[kept], label[kept]))
    return found
