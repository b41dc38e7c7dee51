"""Masks as COCO's compressed run lengths: some hundred bytes for a mask, so that they can be kept and sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from synchromesh.errors import InputError


class Rle(TypedDict):
    """A mask as COCO's files have it.

    Attributes:
        size: height and width of the picture.
        counts: the runs, compressed into text.
    """

    size: list[int]
    counts: str


def encoded(masks: Bool[Tensor, "M H W"]) -> list[Rle]:
    """Return each mask as run lengths.

    >>> encoded(torch.eye(2, dtype=torch.bool)[None])
    [{'size': [2, 2], 'counts': '0120'}]

    Raises:
        InputError: faster-coco-eval is not installed.
    """
    return [encoded_array(mask) for mask in masks.cpu().numpy()]


def encoded_array(mask: Bool[np.ndarray, "H W"]) -> Rle:
    """Return one mask as run lengths. Raises as `encoded`."""
    found = _codec().encode(np.asfortranarray(mask).view(np.uint8))
    return {"size": list(mask.shape), "counts": found["counts"].decode("ascii")}


def decoded(rles: Sequence[Rle], height: int, width: int) -> Bool[Tensor, "M H W"]:
    """Return the masks of a picture of this size.

    Raises:
        ValueError: a mask is of another size.
        InputError: faster-coco-eval is not installed.
    """
    masks = torch.zeros(len(rles), height, width, dtype=torch.bool)
    for mask, rle in zip(masks, rles, strict=True):
        mask.copy_(torch.from_numpy(_codec().decode(dict(of_size(rle, height, width)))))
    return masks


def area_of(rle: Rle) -> int:
    """Return how many pixels a mask has. Raises InputError as `encoded`."""
    return int(_codec().area(dict(rle)))


def of_size(rle: Rle, height: int, width: int) -> Rle:
    """Return what it is given. Raises ValueError where it is the mask of a picture of another size."""
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"a mask has the size {list(rle['size'])}, wanted that of its picture, {[height, width]}")
    return rle


def _codec() -> Any:
    try:
        from faster_coco_eval import mask
    except ImportError as error:
        raise InputError("masks need the package faster-coco-eval: pip install 'synchromesh[vision]'") from error
    return mask
