"""Small files as users have them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Write a grey picture of a height and a width, perhaps turned by EXIF; bright where a box says."""

    def write(name: str, height: int, width: int, *, orientation: int = 1, bright: Any = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((height, width), 40, dtype=np.uint8)
        if bright is not None:
            left, top, right, bottom = bright
            pixels[top:bottom, left:right] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(path, exif=exif)
        return path

    return write


@pytest.fixture
def coco(tmp_path: Path, picture: Callable[..., Path]) -> Callable[..., Path]:
    """Write instances.json, and its pictures of 20 x 30 pixels where their files are not written yet.

    `images` and `annotations` are partial objects of COCO's; what they do not say is filled in.
    """

    def write(annotations: list[Any], *, images: list[Any] | None = None, **members: Any) -> Path:
        shown = [{"id": 1}] if images is None else images
        for number, one in enumerate(shown):
            if isinstance(one, dict):
                one.setdefault("file_name", f"{number}.png")
                one.setdefault("height", 20)
                one.setdefault("width", 30)
                missing = one.pop("missing", False)
                inside = ".." not in str(one["file_name"]) and not str(one["file_name"]).startswith("/")
                if inside and not missing and not (tmp_path / "images" / one["file_name"]).exists():
                    picture(f"images/{one['file_name']}", one["height"], one["width"])
        for number, one in enumerate(annotations):
            if isinstance(one, dict):
                filled = {"id": number + 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8]}
                for name, value in filled.items():
                    one.setdefault(name, value)
                for name in [name for name, value in one.items() if value == "absent"]:
                    del one[name]
        whole = {"images": shown, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}], **members}
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({name: value for name, value in whole.items() if value != "absent"}))
        return path

    return write


@pytest.fixture
def label_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a file of labels: of a mode of Pillow's, where "P" gives each index an unlike colour."""

    def write(name: str, values: Any, *, mode: str = "L") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.array(values)
        if mode == "P":
            image = Image.fromarray(array.astype(np.uint8)).convert("P")
            image.frombytes(array.astype(np.uint8).tobytes())
            image.putpalette([(37 * index + 11 * channel) % 256 for index in range(256) for channel in range(3)])
        elif mode == "I;16":
            image = Image.fromarray(array.astype(np.uint16))
        elif mode == "F":
            image = Image.fromarray(array.astype(np.float32))
        else:
            image = Image.fromarray(array.astype(np.uint8))
        image.save(path)
        return path

    return write
