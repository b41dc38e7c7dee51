"""Files of values that programs read back exactly: classes, segments and distances as PNG, which keeps every value."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float, Integer, Shaped
from PIL import Image

from synchromesh.data.label_files import ID_PLACES

MOST_OF_8, MOST_OF_16 = 255, 65_535
UNKNOWN = 0  # distance


def indices_png(values: Integer[np.ndarray, "H W"], count: int) -> bytes:
    """Return a grey PNG file of numbers below a count: of 8 bits where that is enough for all of them, else of 16.

    Raises:
        ValueError: the count is larger than 65,536.
    """
    if count > MOST_OF_16 + 1:
        raise ValueError(f"a PNG file holds values up to {MOST_OF_16:,}, got {count:,} classes")
    return _png(values.astype(np.uint8 if count <= MOST_OF_8 + 1 else np.uint16))


def ids_png(ids: Integer[np.ndarray, "H W"]) -> bytes:
    """Return a PNG file of COCO's panoptic ids, red + 256 green + 65,536 blue, which `label_files.read_ids` reads."""
    return _png((ids[..., None] // ID_PLACES % 256).astype(np.uint8))


def depth_png(metres: Float[np.ndarray, "H W"], scale: float) -> bytes:
    """Return a PNG file of distances in whole units of 16 bits, at least 1; 0 where a distance is unknown.

    Args:
        metres: not above 0, or not finite, where they are unknown; further away than 65,535 units is told as unknown.
        scale: metres of one unit.
    """
    with np.errstate(invalid="ignore"):
        units = np.round(metres.astype(np.float64) / scale)
        known = np.isfinite(units) & (metres > 0) & (units <= MOST_OF_16)
    return _png(np.where(known, np.maximum(np.where(known, units, 1), 1), UNKNOWN).astype(np.uint16))


def _png(values: Shaped[np.ndarray, "H W *c"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()
