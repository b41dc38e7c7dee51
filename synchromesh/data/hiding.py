"""Hiding parts of a picture: which cells, and simple ways to fill them that a model must do better than."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def random_cells(
    height: int, width: int, *, cell: int, ratio: float, rng: np.random.Generator
) -> Bool[np.ndarray, "H W"]:
    """Return which pixels are hidden: a share of the square cells that cover a picture, drawn without replacement.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.
        cell: side of a cell, pixels; cells at the border may be cut off.
        ratio: share of the cells, rounded up (SimMIM, arXiv 2111.09886).
        rng: draws them.
    """
    rows, columns = -(-height // cell), -(-width // cell)
    count = int(np.ceil(rows * columns * ratio))
    chosen = np.zeros(rows * columns, dtype=bool)
    chosen[rng.permutation(rows * columns)[:count]] = True
    whole = chosen.reshape(rows, columns).repeat(cell, 0).repeat(cell, 1)
    return whole[:height, :width]


def filled_with_mean(image: Float[np.ndarray, "C H W"], hidden: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "C H W"]:
    """Return the image with its hidden pixels in the mean colour of the others; zeros where all are hidden."""
    mean = image[:, ~hidden].mean(1) if not hidden.all() else np.zeros(len(image), image.dtype)
    return np.where(hidden, mean[:, None, None], image)


def filled_bilinearly(image: Float[np.ndarray, "C H W"], hidden: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "C H W"]:
    """Return the image with each hidden pixel between the nearest visible ones of its row and of its column.

    Colours are interpolated linearly along the row and along the column; the two results are averaged, each weighted
    by how near its visible pixel is. A line without a visible pixel has no weight; where both have none, the mean
    colour of the visible pixels is taken.
    """
    across, near_across = _along_rows(image, hidden)
    down, near_down = _along_rows(image.transpose(0, 2, 1), hidden.T)
    down, near_down = down.transpose(0, 2, 1), near_down.T
    weight = near_across + near_down
    between = (across * near_across + down * near_down) / np.where(weight > 0, weight, 1)
    plain = filled_with_mean(image, hidden)
    return np.where(hidden, np.where(weight > 0, between, plain), image).astype(image.dtype)


def _along_rows(image: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the colours along rows and their weights: 1 / (1 + pixels to the nearest visible one), 0 without any."""
    filled, near = np.zeros_like(image), np.zeros(hidden.shape)
    places = np.arange(hidden.shape[1])
    for row, own in enumerate(hidden):
        known = places[~own]
        if not len(known):
            continue
        for channel in range(len(image)):
            filled[channel, row] = np.interp(places, known, image[channel, row, known])
        near[row] = 1 / (1 + np.abs(places[:, None] - known[None]).min(1))
    return filled, near
