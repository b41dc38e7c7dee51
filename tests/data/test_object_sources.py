import dataclasses
import json
from pathlib import Path

import pytest

from synchromesh.data.coco_json import CocoJson
from synchromesh.data.object_sources import (
    ObjectFiles,
    ObjectReaders,
    check_classes,
    check_objects,
    check_regions,
    scored_pictures,
)
from synchromesh.errors import InputError
from synchromesh.testing.squares import write_squares


def test_a_json_of_training_is_scored_on_its_twin_and_one_alone_on_a_share(tmp_path: Path) -> None:
    write_squares(tmp_path, "train", 10)
    write_squares(tmp_path, "val", 4)
    alone = write_squares(tmp_path / "other", "all", 10)
    train, test = ObjectFiles(tmp_path / "instances_train.json").load(seed=0)
    assert (len(train), len(test)) == (10, 4)
    train, test = ObjectFiles(alone, test_share=0.3).load(seed=0)
    assert (len(train), len(test)) == (7, 3)
    numbers = [{picture.number for picture in own.pictures} for own in (train, test)]
    assert not numbers[0] & numbers[1]
    again = ObjectFiles(alone, test_share=0.3).load(seed=1)[1]
    assert [one.number for one in again.pictures] != [one.number for one in test.pictures]


def test_pictures_of_both_jsons_may_lie_in_one_folder_far_away(tmp_path: Path) -> None:
    for part in ("train", "val"):
        path = write_squares(tmp_path / "far", part, 4)
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train, test = ObjectFiles(tmp_path / "instances_train.json", tmp_path / "far" / "images").load(seed=0)
    assert (len(train), len(test)) == (4, 4)
    with pytest.raises(InputError, match="say where the pictures are"):
        ObjectFiles(tmp_path / "instances_train.json").load(seed=0)


def test_two_readers_must_know_the_same_classes(tmp_path: Path) -> None:
    paths = [write_squares(tmp_path, part, 4) for part in ("a", "b")]
    readers = [CocoJson(path, tmp_path / "images") for path in paths]
    train, test = ObjectReaders(*readers).load(seed=0)
    assert train.classes == test.classes == ("blue", "red")
    found = json.loads(paths[1].read_text())
    paths[1].write_text(json.dumps({**found, "categories": [*found["categories"], {"id": 9, "name": "green"}]}))
    with pytest.raises(InputError, match=r"different classes: green"):
        ObjectReaders(*readers).load(seed=0)


def test_what_is_scored_is_a_json_or_the_part_of_a_folder_that_is_for_it(tmp_path: Path) -> None:
    path = write_squares(tmp_path, "val", 3)
    assert len(scored_pictures(path, None)) == len(scored_pictures(tmp_path, None)) == 3
    path.rename(tmp_path / "instances_train.json")
    assert len(scored_pictures(tmp_path, None)) == 3


def test_another_kind_of_data_is_refused_by_its_name(tmp_path: Path, photo) -> None:
    photo(tmp_path / "cats" / "1.png")
    with pytest.raises(InputError, match="holds folders of classes, wanted objects with boxes"):
        ObjectFiles(tmp_path).load(seed=0)
    for name in ("images", "labels"):
        photo(tmp_path / "pair" / name / "1.png", mode="L")
    with pytest.raises(InputError, match="holds LabelFolders"):
        scored_pictures(tmp_path / "pair", None)


def test_objects_without_regions_are_counted_and_all_without_are_refused(tmp_path: Path) -> None:
    path = write_squares(tmp_path, "some", 6)
    annotated = CocoJson(path, tmp_path / "images").load()
    assert check_regions(annotated) == ()
    found = json.loads(path.read_text())
    found["annotations"][1]["segmentation"] = []
    path.write_text(json.dumps(found))
    (said,) = check_regions(CocoJson(path, tmp_path / "images").load())
    assert "1 objects without a region" in said
    assert "annotation 2 of some1.png" in said
    bare = CocoJson(write_squares(tmp_path, "bare", 3, regions=False), tmp_path / "images").load()
    with pytest.raises(InputError, match="give a head that says no masks"):
        check_regions(bare)


def test_pictures_without_an_object_to_learn_are_refused_and_without_one_to_find_are_told(tmp_path: Path) -> None:
    path = write_squares(tmp_path, "some", 4)
    some = CocoJson(path, tmp_path / "images").load()
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "annotations": [{**one, "iscrowd": 1} for one in found["annotations"]]}))
    crowds = CocoJson(path, tmp_path / "images").load()
    assert check_objects(some, some) == ()
    (said,) = check_objects(some, crowds)
    assert "not one object to find in 4 pictures" in said
    with pytest.raises(InputError, match="has 4 pictures and not one object to learn"):
        check_objects(crowds, some)


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    annotated = CocoJson(write_squares(tmp_path, "a", 2), tmp_path / "images").load()
    with pytest.raises(InputError, match="their order"):
        check_classes(annotated, ("red", "blue"), "the model")
    turned = dataclasses.replace(annotated, classes=("red", "blue"))
    check_classes(turned, ("red", "blue"), "the model")


def test_a_share_is_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test_share is 1"):
        ObjectFiles(tmp_path, test_share=1.0)
