"""Small pictures of coloured squares, annotated as COCO does: what a user's own files look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = ((40, 40, 230), (230, 40, 40))
CATEGORIES = ({"id": 3, "name": "blue"}, {"id": 7, "name": "red"})  # with gaps


def write_squares(folder: Path, part: str, count: int, *, regions: bool = True, seed: int = 0) -> Path:
    """Write `instances_PART.json` and its pictures, into `images/`; return the json file.

    Pictures have different sizes, 40 to 64 pixels a side, and one square each, every third one none.

    Args:
        folder: for both.
        part: name of the part.
        count: of the pictures.
        regions: whether the squares have outlines besides their boxes.
        seed: of all that is random.
    """
    rng = np.random.default_rng([seed, *part.encode()])
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        height, width = (int(side) for side in rng.integers(40, 65, 2))
        pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        if number % 3 != 2:
            annotation = _square(pixels, rng)
            image = {"id": len(annotations) + 1, "image_id": number + 10, "iscrowd": 0}
            annotations.append({**image, **(annotation if regions else {**annotation, "segmentation": []})})
        name = f"{part}{number}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": number + 10, "file_name": name, "height": height, "width": width})
    path = folder / f"instances_{part}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def _square(pixels: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Draw a square into a picture; return its annotation."""
    side, kind = int(rng.integers(12, 25)), int(rng.integers(2))
    top, left = int(rng.integers(pixels.shape[0] - side)), int(rng.integers(pixels.shape[1] - side))
    pixels[top : top + side, left : left + side] = COLOURS[kind]
    right, bottom = left + side, top + side
    return {
        "category_id": CATEGORIES[kind]["id"],
        "bbox": [left, top, side, side],
        "area": side * side,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    }
