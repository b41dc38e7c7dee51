"""A glance tells what loading all of a json file tells, of a part of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from synchromesh.data import coco_glance
from synchromesh.data.coco_glance import Glance
from synchromesh.data.coco_json import CocoJson
from synchromesh.errors import InputError
from synchromesh.testing.squares import write_squares


def glance(path: Path) -> Glance:
    return Glance.at(path, path.parent / "images")


@pytest.mark.parametrize("order", [("images", "annotations"), ("annotations", "images")])
@pytest.mark.parametrize("regions", [True, False])
def test_a_glance_tells_what_loading_tells(tmp_path: Path, order: tuple[str, str], regions: bool) -> None:
    path = write_squares(tmp_path, "train", 9, regions=regions)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: whole[name] for name in (*order, "categories")}))
    found = CocoJson(path, tmp_path / "images").load()
    sizes = tuple((one.height, one.width) for one in found.pictures)
    assert glance(path) == Glance(len(found), sizes, regions)


@pytest.mark.parametrize(("order", "read"), [(("images", "annotations"), 4), (("annotations", "images"), 20)])
def test_annotations_behind_the_pictures_are_not_read_to_their_end(
    tmp_path: Path, order: tuple[str, str], read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_squares(tmp_path, "train", 30)
    whole = json.loads(path.read_text())
    assert len(whole["annotations"]) == 20
    path.write_text(json.dumps({name: whole[name] for name in order}))
    monkeypatch.setattr(coco_glance, "ANNOTATIONS", 3)
    monkeypatch.setattr(coco_glance, "PICTURES", 5)
    handed: list[int] = []
    annotation = coco_glance._Seen.annotation

    def counted(seen: Any, place: int, found: Any) -> None:
        handed.append(place)
        annotation(seen, place, found)

    monkeypatch.setattr(coco_glance._Seen, "annotation", counted)
    found = glance(path)
    assert (found.count, len(found.sizes)) == (30, 5)
    assert len(handed) == read


@pytest.mark.parametrize(("share", "masks"), [(1, True), (3, True), (8, False)])
def test_most_objects_decide_whether_masks_are_learnt_and_not_a_single_one(
    tmp_path: Path, share: int, masks: bool
) -> None:
    path = write_squares(tmp_path, "train", 9)
    whole = json.loads(path.read_text())
    for one in whole["annotations"][: len(whole["annotations"]) * share // 10]:
        one["segmentation"] = []
    path.write_text(json.dumps(whole))
    assert glance(path).regions is masks


def test_what_is_missing_or_broken_is_left_to_whoever_loads_the_file(tmp_path: Path) -> None:
    path = write_squares(tmp_path, "train", 3)
    whole = json.loads(path.read_text())
    (tmp_path / "images" / whole["images"][0]["file_name"]).unlink()
    flat = {"id": 90, "image_id": 10, "category_id": 3, "bbox": [1, 1, 0, 5]}
    path.write_text(json.dumps({**whole, "annotations": [flat, *whole["annotations"]]}))
    found = glance(path)
    assert (found.count, len(found.sizes), found.regions) == (3, 2, True)
    path.write_text(json.dumps({**whole, "annotations": []}))
    assert not glance(path).regions
    assert Glance.at(path, tmp_path).sizes == ()
    path.write_text(path.read_text()[:-40])
    with pytest.raises(InputError, match="is no JSON"):
        glance(path)
