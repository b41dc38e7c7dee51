from pathlib import Path

import numpy as np
import pytest

from synchromesh.data.moves import Move
from synchromesh.data.voc import VocFolder, VocSegmentation
from synchromesh.errors import InputError

BOX = {"xmin": 3, "ymin": 4, "xmax": 12, "ymax": 11}


def thing(name: str = "cat", *, difficult: int | None = None, box: dict | None = None) -> str:
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in (box or BOX).items())
    hard = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{hard}<bndbox>{corners}</bndbox></object>"


@pytest.fixture
def voc(tmp_path, picture):
    """Write an XML file and its picture of 20 x 30 pixels, and put it on the list "train"."""

    def write(*objects: str, name: str = "2008_1", head: str = "", size: str | None = None, listed: str = "") -> Path:
        said = "<size><width>30</width><height>20</height></size>" if size is None else size
        path = tmp_path / f"Annotations/{name}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{head}<annotation>{said}{''.join(objects)}</annotation>")
        picture(f"JPEGImages/{name}.jpg", 20, 30)
        lists = tmp_path / "ImageSets/Main/train.txt"
        lists.parent.mkdir(parents=True, exist_ok=True)
        with lists.open("a") as file:
            file.write(f"{listed or name}\n")
        return tmp_path

    return write


def test_boxes_count_from_one_and_include_their_last_pixel(voc) -> None:
    (picture,) = VocFolder(voc(thing())).load().pictures
    assert [one.box for one in picture.objects] == [(2.0, 3.0, 12.0, 11.0)]
    assert (picture.height, picture.width, picture.path.name) == (20, 30, "2008_1.jpg")
    (picture,) = VocFolder(picture.path.parents[1], one_based=False).load().pictures
    assert [one.box for one in picture.objects] == [(3.0, 4.0, 12.0, 11.0)]


def test_a_box_around_everything_is_the_picture(voc) -> None:
    whole = {"xmin": 1, "ymin": 1, "xmax": 30, "ymax": 20}
    annotated = VocFolder(voc(thing(box=whole))).load()
    assert annotated.pictures[0].objects[0].box == (0.0, 0.0, 30.0, 20.0)
    assert annotated.notes() == ()


def test_what_is_difficult_is_ignored(voc) -> None:
    (picture,) = VocFolder(voc(thing(difficult=1), thing(difficult=0), thing())).load().pictures
    assert [one.ignored for one in picture.objects] == [True, False, False]
    assert not any(one.crowd for one in picture.objects)


def test_classes_are_those_of_all_files_so_that_splits_agree(voc) -> None:
    voc(thing("dog"), thing("ant"), name="2008_2", listed=" ")
    annotated = VocFolder(voc(thing("cat"))).load()
    assert len(annotated) == 1
    assert annotated.classes == ("ant", "cat", "dog")
    assert [one.label for one in annotated.pictures[0].objects] == [1]


def test_pictures_without_objects_are_kept_and_lists_may_say_more(voc) -> None:
    voc(name="2008_2", listed="2008_2 -1")
    annotated = VocFolder(voc(thing(), listed="2008_1  1")).load()
    assert [len(picture.objects) for picture in annotated.pictures] == [0, 1]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (thing("unicorn"), "annotations of unknown classes, left out"),
        (
            thing(box={"xmin": 3, "ymin": 4, "xmax": "wide", "ymax": 11}),
            "annotations without a box of four finite numbers, left out",
        ),
        (thing(box={"xmin": 3, "ymin": 4, "xmax": 12}), "annotations without a box of four finite numbers, left out"),
        (thing(box={**BOX, "xmax": "nan"}), "annotations without a box of four finite numbers, left out"),
        (thing(box={**BOX, "xmax": 2}), "boxes without area, left out"),
        (thing(box={**BOX, "xmin": 31, "xmax": 40}), "boxes outside of their picture, left out"),
    ],
)
def test_an_object_that_cannot_be_used_is_left_out_counted_and_named(voc, wrong, what) -> None:
    annotated = VocFolder(voc(thing(), wrong), classes=("cat",)).load()
    assert len(annotated.pictures[0].objects) == 1
    assert annotated.faults[what].count == 1
    assert "annotation 2 of 2008_1.xml" in annotated.notes()[0]


def test_a_box_that_reaches_out_is_cut_and_counted(voc) -> None:
    annotated = VocFolder(voc(thing(box={**BOX, "xmax": 50}))).load()
    assert annotated.pictures[0].objects[0].box == (2.0, 3.0, 30.0, 11.0)
    assert annotated.faults["boxes that reach out of their picture, cut at its border"].count == 1


def test_a_size_that_the_file_does_not_say_is_read_from_the_picture(voc) -> None:
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        picture = VocFolder(voc(thing(), size=size)).load().pictures[0]
        assert (picture.height, picture.width) == (20, 30)


BOMB = '<!DOCTYPE a [<!ENTITY b "boom"><!ENTITY c "&b;&b;&b;&b;">]>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_before_they_grow(voc, encoding) -> None:
    root = voc(thing(), name="good")
    voc(thing("&c;"), name="bad", head=BOMB)
    path = root / "Annotations/bad.xml"
    path.write_bytes(path.read_text().encode(encoding))
    annotated = VocFolder(root).load()
    assert len(annotated) == 1
    fault = annotated.faults["XML files or pictures that cannot be read, left out"]
    assert fault.examples == ("bad.xml: it declares a document type (a), which annotations have no use for",)


def test_broken_and_missing_files_are_named_and_counted(voc) -> None:
    root = voc(thing())
    voc(thing(), name="cut")
    (root / "Annotations/cut.xml").write_text("<annotation><object>")
    voc(thing(), name="bare")
    (root / "JPEGImages/bare.jpg").unlink()
    voc(thing(), name="silent")
    (root / "Annotations/silent.xml").unlink()
    annotated = VocFolder(root).load()
    assert len(annotated) == 1
    named = {what: fault.examples[0] for what, fault in annotated.faults.items()}
    assert named["XML files or pictures that cannot be read, left out"].startswith("cut.xml: ")
    assert named["pictures of the list whose file is missing, left out"] == "bare"
    assert named["pictures of the list without an XML file, left out"] == "silent"


def test_a_list_that_is_not_there_or_empty_is_told_with_those_that_are(voc) -> None:
    root = voc(thing())
    with pytest.raises(InputError, match=r"has no list 'val'\.txt, but: train"):
        VocFolder(root, "val").load()
    with pytest.raises(InputError, match="no list"):
        VocFolder(root, "../Main/train").load()
    (root / "ImageSets/Main/val.txt").write_text("\n")
    with pytest.raises(InputError, match="names no picture"):
        VocFolder(root, "val").load()
    (root / "ImageSets/Main/val.txt").write_text("elsewhere\n../../secret\n")
    with pytest.raises(InputError, match="none of the 2 pictures"):
        VocFolder(root, "val").load()


@pytest.fixture
def segmented(tmp_path, voc, label_file):
    root = voc(thing(), thing("dog"))
    values = np.zeros((20, 30), dtype=int)
    values[3:11, 2:12] = 8
    values[2, 2:12] = 255
    label_file("SegmentationClass/2008_1.png", values, mode="P")
    objects = np.zeros((20, 30), dtype=int)
    objects[3:11, 2:12] = 1
    objects[15:18, 5:9] = 2
    label_file("SegmentationObject/2008_1.png", objects, mode="P")
    (root / "ImageSets/Segmentation").mkdir()
    (root / "ImageSets/Segmentation/train.txt").write_text("2008_1\n")
    return root


def test_the_palette_of_class_masks_is_not_looked_at(segmented) -> None:
    annotated = VocSegmentation(segmented).load()
    values = annotated.pictures[0].opened(3)[1].values
    assert (values[5, 5], values[0, 0], values[2, 5]) == (8, 0, 255)
    assert (len(annotated.classes), annotated.classes[8]) == (21, "cat")
    assert annotated.notes() == ()


def test_objects_have_the_pixels_of_their_number(segmented) -> None:
    picture = VocFolder(segmented, masks=True).load().pictures[0]
    cat, dog = picture.objects
    assert cat.region.mask(20, 30).sum() == 80
    assert dog.region.mask(20, 30)[15:18, 5:9].all()
    assert np.array_equal(cat.region.moved(Move.none(20, 30)), cat.region.mask(20, 30))
    with pytest.raises(ValueError, match=r"2008_1\.png has \(20, 30\) pixels"):
        cat.region.mask(30, 20)


def test_segmentation_names_what_lacks_a_file(segmented) -> None:
    (segmented / "ImageSets/Segmentation/train.txt").write_text("2008_1\n2008_9\n")
    annotated = VocSegmentation(segmented).load()
    assert annotated.faults["pictures of the list without picture or label file, left out"].examples == ("2008_9",)
    (segmented / "ImageSets/Segmentation/train.txt").write_text("2008_9\n")
    with pytest.raises(InputError, match="none of the 1 pictures of the list has both files"):
        VocSegmentation(segmented).load()
