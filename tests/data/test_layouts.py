import json

import numpy as np
import pytest

from synchromesh.data.ade20k import Ade20k
from synchromesh.data.cityscapes import Cityscapes, CityscapesPanoptic
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.coco_panoptic import CocoPanoptic
from synchromesh.data.depth_maps import DepthFolders
from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.layouts import Reader, found_in, train_and_test
from synchromesh.data.stereo_pair import StereoPair
from synchromesh.data.voc import VocFolder, VocSegmentation
from synchromesh.errors import InputError
from synchromesh.training.codec import decode, encode


def coco_text(pictures: int = 2, *, panoptic: bool = False, name: str = "cat") -> str:
    images = [{"id": n, "file_name": f"{n}.png", "height": 20, "width": 30} for n in range(pictures)]
    one = {"file_name": "0.png", "segments_info": []} if panoptic else {"bbox": [1, 1, 5, 5], "category_id": 1}
    annotations = [{"id": 1, "image_id": 0, **one}]
    return json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": name}]})


@pytest.fixture
def write(tmp_path, picture):
    """Write files by name: texts, and pictures where there is no text."""

    def all_of(*names: str, **texts: str):
        for name in names:
            picture(name, 20, 30)
        for name, text in texts.items():
            path = tmp_path / name.replace("__", "/").replace("--", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return all_of


@pytest.mark.parametrize(
    "folder", ["images", "train2017", "../train2017", "../images/train2017", "../images", "."], ids=str
)
def test_the_pictures_of_a_json_are_looked_for_near_it(tmp_path, write, folder) -> None:
    path = tmp_path / "annotations/instances_train2017.json"
    write(annotations__x="")
    path.write_text(coco_text())
    for number in range(2):
        write(str((path.parent / folder / f"{number}.png").resolve().relative_to(tmp_path)))
    found = found_in(path)
    assert isinstance(found, CocoJson)
    assert found.images.resolve() == (path.parent / folder).resolve()
    assert len(found.load()) == 2


def test_pictures_that_lie_elsewhere_are_asked_for_and_can_be_given(tmp_path, write) -> None:
    root = write("far/0.png", "far/1.png", **{"a--json": coco_text()})
    with pytest.raises(InputError, match=r"names 0\.png, which is in none of .*images.*say where the pictures are"):
        found_in(root / "a.json")
    assert found_in(root / "a.json", images=root / "far") == CocoJson(root / "a.json", root / "far")


def test_a_panoptic_json_is_known_by_what_it_holds(write) -> None:
    root = write("images/0.png", "panoptic_train/0.png", **{"panoptic_train--json": coco_text(panoptic=True)})
    wanted = CocoPanoptic(root / "panoptic_train.json", root / "panoptic_train", root / "images")
    assert found_in(root / "panoptic_train.json") == wanted
    assert found_in(root) == wanted


def test_the_root_of_coco_has_parts(write) -> None:
    texts = {
        f"annotations__{kind}_{part}2017--json": coco_text()
        for part in ("train", "val")
        for kind in ("captions", "instances")
    }
    root = write("train2017/0.png", "val2017/0.png", **texts)
    assert found_in(root) == CocoJson(root / "annotations/instances_train2017.json", root / "train2017")
    assert found_in(root, split="val") == CocoJson(root / "annotations/instances_val2017.json", root / "val2017")


def test_a_json_beside_the_pictures_of_its_part_is_found(write) -> None:
    texts = {f"{part}___annotations--coco--json": coco_text() for part in ("train", "valid")}
    root = write("train/0.png", "valid/0.png", **texts)
    assert found_in(root) == CocoJson(root / "train/_annotations.coco.json", root / "train")
    assert found_in(root, split="val").images == root / "valid"


def test_of_several_json_files_none_is_guessed(write) -> None:
    root = write("images/0.png", **{"a--json": coco_text(), "b--json": coco_text()})
    with pytest.raises(InputError, match=r"several json files: a\.json, b\.json"):
        found_in(root)


def voc(root) -> None:
    (root / "Annotations").mkdir()
    for stem, part in (("1", "train"), ("2", "val")):
        text = "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        (root / f"Annotations/{stem}.xml").write_text(f"{text}</bndbox></object></annotation>")
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Main/{part}.txt").write_text(stem)


def test_voc_is_known_by_its_folders(write) -> None:
    root = write("JPEGImages/1.png", "JPEGImages/2.png")
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("1")
    assert found_in(root) == VocSegmentation(root, "train")
    voc(root)
    assert found_in(root) == VocFolder(root, "train")
    assert found_in(root, split="val") == VocFolder(root, "val")
    with pytest.raises(InputError, match="no part named minival"):
        found_in(root, split="minival")


def test_cityscapes_and_ade20k_are_known_by_their_folders(write) -> None:
    root = write("leftImg8bit/train/a/a_leftImg8bit.png", "gtFine/train/a/a_gtFine_labelIds.png")
    assert found_in(root) == Cityscapes(root, "train")
    with pytest.raises(InputError, match="no part named val or validation"):
        found_in(root, split="val")


def test_ade20k_is_known_by_its_folders(write) -> None:
    root = write(*(f"{kind}/{part}/a.png" for kind in ("images", "annotations") for part in ("training", "validation")))
    assert found_in(root) == Ade20k(root, "training")
    assert found_in(root, split="val") == Ade20k(root, "validation")


@pytest.mark.parametrize("labels", ["labels", "masks", "annotations"])
def test_any_pair_of_folders_is_read_with_and_without_parts(write, labels) -> None:
    root = write("images/a.png", f"{labels}/a.png")
    assert found_in(root) == LabelFolders(root / "images", root / labels)
    with pytest.raises(InputError, match="no part named val"):
        found_in(root, split="val")
    write("images/val/b.png", f"{labels}/val/b.png", "images/train/a.png", f"{labels}/train/a.png")
    assert found_in(root, split="val") == LabelFolders(root / "images/val", root / f"{labels}/val")


def test_a_folder_named_depth_holds_distances(write, label_file) -> None:
    root = write("images/a.png")
    label_file("depth/a.png", np.full((20, 30), 700), mode="I;16")
    assert found_in(root) == DepthFolders(root / "images", root / "depth")


def test_labels_as_text_are_refused_with_what_is_read_instead(write) -> None:
    root = write("images/a.png", **{"labels__a--txt": "0 0.5 0.5 0.1 0.1"})
    with pytest.raises(InputError, match="text files, as of YOLO, are not read: give a COCO json"):
        found_in(root)


def test_class_folders_have_no_annotations(write) -> None:
    assert found_in(write("cat/a.png", "dog/b.png", **{"about--json": '{"made": "in May"}'})) is None


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("none", "none does not exist"),
        ("empty", "it has nothing. Looked for: a COCO json"),
        ("odd", r"it has a\.png, notes, 1 pictures without a class: give each class a folder"),
        ("a.txt", "is no json file"),
        ("b.json", "is no json file of COCO's: wanted pictures in 'images', got x"),
        ("c.json", "Expecting"),
    ],
)
def test_what_is_of_no_layout_is_told_what_was_looked_for(write, path, says) -> None:
    root = write(
        "odd/a.png", **{"odd__notes__a--md": "", "a--txt": "", "b--json": '{"x": 1}', "c--json": '{"images": [}'}
    )
    (root / "empty").mkdir()
    with pytest.raises(InputError, match=says):
        found_in(root / path)
    with pytest.raises(InputError, match="is a folder"):
        found_in(root / "empty", images=root)


def test_the_part_to_score_on_is_its_own_or_else_a_share(write) -> None:
    root = write("images/0.png", "images/1.png", **{"train--json": coco_text(), "alone--json": coco_text()})
    train, test = train_and_test(root / "alone.json", seed=3)
    assert sorted([train.pictures[0].number, test.pictures[0].number]) == [0, 1]
    write(**{"val--json": coco_text()})
    train, test = train_and_test(root / "train.json")
    assert (len(train), len(test), test.origin) == (2, 2, str(root / "val.json"))
    write(**{"val--json": coco_text(name="dog")})
    with pytest.raises(InputError, match=r"train\.json and .*val\.json have different classes: cat, dog"):
        train_and_test(root / "train.json")
    write("classes/cat/a.png")
    assert train_and_test(root / "classes") is None


def test_the_folder_of_a_layout_is_divided_as_it_says(write) -> None:
    root = write("JPEGImages/1.png", "JPEGImages/2.png")
    voc(root)
    train, test = train_and_test(root)
    assert [picture.path.name for part in (train, test) for picture in part.pictures] == ["1.png", "2.png"]


def test_label_files_of_both_parts_have_the_classes_of_those_to_learn_from(write, label_file) -> None:
    root = write("images/train/a.png", "images/val/b.png")
    label_file("labels/train/a.png", np.array([[0, 1, 2]] * 20).repeat(10, axis=1))
    label_file("labels/val/b.png", np.zeros((20, 30)))
    train, test = train_and_test(root)
    assert train.classes == test.classes == ("0", "1", "2")


def test_every_reader_goes_to_disk_and_back(tmp_path) -> None:
    made = (
        *(CocoJson(tmp_path, tmp_path), CocoPanoptic(tmp_path, tmp_path, tmp_path), VocFolder(tmp_path)),
        *(VocSegmentation(tmp_path), LabelFolders(tmp_path, tmp_path), Ade20k(tmp_path), Cityscapes(tmp_path)),
        *(CityscapesPanoptic(tmp_path), DepthFolders(tmp_path, tmp_path), StereoPair()),
    )
    assert {type(one) for one in made} == set(Reader.__args__)
    for one in made:
        assert decode(Reader, json.loads(json.dumps(encode(one)))) == one
