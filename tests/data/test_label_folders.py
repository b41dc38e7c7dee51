import dataclasses
import json

import numpy as np
import pytest

from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.label_maps import LabelCoding
from synchromesh.errors import InputError, UnreadableError
from synchromesh.training.codec import decode, encode

VALUES = [[0, 1, 2, 2], [1, 1, 255, 0]]


@pytest.fixture
def pair(tmp_path, picture, label_file):
    """Write a picture and its label file, and return the reader of the two folders."""

    def write(pixels=VALUES, *, name: str = "a", mode: str = "L", size=None, **settings) -> LabelFolders:
        height, width = size or np.array(pixels).shape[:2]
        picture(f"images/{name}.png", height, width)
        label_file(f"labels/{name}.png", pixels, mode=mode)
        return LabelFolders(tmp_path / "images", tmp_path / "labels", **settings)

    return write


def read(reader: LabelFolders, place: int = 0) -> list[list[int]]:
    return reader.load().pictures[place].opened(1)[1].values.tolist()


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_a_value_is_its_class_and_255_is_ignored(pair, mode) -> None:
    reader = pair(mode=mode)
    assert read(reader) == VALUES
    annotated = reader.load()
    assert annotated.classes == ("0", "1", "2")
    assert annotated.ignore == 255
    assert annotated.notes() == ()


def test_zero_is_reduced_where_the_files_say_so_and_nowhere_else(pair) -> None:
    reader = pair(reduce_zero=True)
    assert read(reader) == [[255, 0, 1, 1], [0, 0, 255, 255]]
    assert reader.load().classes == ("1", "2")
    assert read(pair(reduce_zero=True, classes=("tree", "sky"))) == [[255, 0, 1, 1], [0, 0, 255, 255]]


def test_values_that_are_no_class_are_ignored_named_and_counted(pair) -> None:
    pair([[0, 9], [9, 1]], name="b")
    annotated = pair(classes=("tree", "sky")).load()
    fault = annotated.faults["label files with values that are none of 2 classes, which are ignored"]
    assert fault.count == 2
    assert fault.examples == ("a.png has 2 in 2 of 8 pixels", "b.png has 9 in 2 of 4 pixels")
    assert annotated.pictures[0].opened(1)[1].values.tolist() == [[0, 1, 255, 255], [1, 1, 255, 0]]
    assert "b.png has 9" in annotated.notes()[0]


def test_another_value_may_be_ignored(pair) -> None:
    assert read(pair([[0, 7], [1, 0]], ignore=7)) == [[0, 7], [1, 0]]
    assert pair([[0, 7], [1, 0]], ignore=7).load().classes == ("0", "1")
    with pytest.raises(InputError, match="1 stands for pixels to be ignored and for one of 2 classes"):
        pair(classes=("a", "b"), ignore=1).load()


def test_a_value_to_be_ignored_that_is_a_class_names_the_file_and_the_settings(pair, label_file, picture) -> None:
    picture("images/b.png", 1, 2)
    label_file("labels/b.png", [[0, 300]], mode="I;16")
    reader = pair([[0, 0], [0, 0]])
    says = (
        r"labels: 255 stands for pixels to be ignored and for one of 301 classes, as .*b\.png has the value 300; .* "
        r"values=\(0, 300\), or a value to be ignored that is no class, ignore=-1"
    )
    with pytest.raises(InputError, match=says):
        reader.load()
    as_values = dataclasses.replace(reader, values=(0, 300)).load()
    assert as_values.pictures[1].opened(1)[1].values.tolist() == [[0, 1]]
    other = dataclasses.replace(reader, ignore=-1).load()
    assert (other.pictures[1].opened(1)[1].values.tolist(), len(other.classes)) == ([[0, 300]], 301)
    with pytest.raises(
        InputError, match=r"labels: 255 stands .* of 300 classes, as there are 300 classes; .*ignore=-1"
    ):
        dataclasses.replace(reader, classes=tuple(map(str, range(300)))).load()


def test_classes_that_mostly_never_occur_are_told(pair) -> None:
    (note,) = pair([[0, 1], [200, 255]]).load().notes()
    assert "3 of 201 classes occur, as a.png has the value 200" in note
    assert "values=(0, 1, 200)" in note
    (note,) = pair([[0, 1], [200, 255]], reduce_zero=True).load().notes()
    assert "2 of 200 classes occur" in note
    assert "values=(1, 200)" in note
    assert pair([[0, 3], [255, 0]]).load().notes() == ()  # half of them do
    assert pair([[0, 1], [200, 255]], classes=tuple(map(str, range(201)))).load().notes() == ()
    assert pair([[255, 255]]).load().notes() == ()


def test_label_files_of_other_kinds_are_refused_with_the_kinds_that_were_expected(pair, picture, tmp_path) -> None:
    for name in ("a", "b", "c"):
        picture(f"images/{name}.png", 2, 4)
        picture(f"labels/{name}.JPG", 2, 4)
    (tmp_path / "labels/classes.txt").write_text("tree\nsky\n")
    reader = LabelFolders(tmp_path / "images", tmp_path / "labels")
    says = r"labels has no file .*: wanted \.png, \.tif, \.tiff, \.bmp, got 3 \.jpg, 1 \.txt; JPEG changes values"
    with pytest.raises(InputError, match=says):
        reader.load()
    for name in ("a", "b", "c"):
        (tmp_path / f"labels/{name}.JPG").unlink()
    with pytest.raises(InputError, match=r"got 1 \.txt$"):
        reader.load()


def test_masks_of_black_and_white_ask_for_what_white_means(pair) -> None:
    white = [[0, 255], [255, 0]]
    with pytest.raises(InputError, match=r"give values=\(0, 255\)"):
        pair(white).load()
    assert read(pair(white, values=(0, 255), classes=("ground", "tree"))) == [[0, 1], [1, 0]]
    assert pair(white, values=(0, 255)).load().classes == ("0", "255")


RED, BLUE, OTHER = [255, 0, 0], [0, 0, 255], [1, 2, 3]


def test_colours_are_refused_without_a_palette_and_read_with_one(pair) -> None:
    colours = [[RED, BLUE], [OTHER, RED]]
    with pytest.raises(InputError, match=r"a\.png: it has the colours of mode RGB.*`palette`"):
        pair(colours, size=(2, 2), classes=("a", "b")).load()
    reader = pair(colours, size=(2, 2), classes=("red", "blue"), palette=(tuple(RED), tuple(BLUE)))
    annotated = reader.load()
    assert annotated.pictures[0].opened(1)[1].values.tolist() == [[0, 1], [255, 0]]
    assert "#010203 in 1 of 4 pixels" in annotated.notes()[0]


def test_names_come_from_a_file_of_classes(pair, tmp_path) -> None:
    (tmp_path / "classes.txt").write_text("tree\nsky\n\nroad\n")
    assert pair().load().classes == ("tree", "sky", "road")
    (tmp_path / "labels/classes.txt").write_text("tree\ntree\n")
    with pytest.raises(InputError, match=r"classes\.txt names tree, tree"):
        pair().load()


def test_files_of_another_size_are_refused_by_name(pair) -> None:
    pair(name="b")
    annotated = pair(size=(3, 4)).load()
    assert annotated.faults["pictures whose labels cannot be used"].count == 1
    assert "a.png: it has 3 x 4 pixels, its annotations say 2 x 4" in annotated.notes()[0]
    with pytest.raises(UnreadableError, match=r"a\.png: it has 3 x 4 pixels, its annotations say 2 x 4"):
        annotated.pictures[0].opened(1)
    assert annotated.pictures[1].opened(1)[1].values.tolist() == VALUES


def test_a_picture_that_exif_turns_goes_with_the_labels_that_fit(pair, picture) -> None:
    reader = pair(np.zeros((4, 2)))
    picture("images/a.png", 2, 4, orientation=6)  # upright it has 4 x 2 pixels
    assert reader.load().pictures[0].opened(1)[0].size == (2, 4)
    reader = pair(np.zeros((2, 4)))
    picture("images/a.png", 2, 4, orientation=6)  # the labels are those of the file as it lies
    assert reader.load().pictures[0].opened(1)[0].size == (4, 2)


def test_what_has_no_partner_is_left_out_named_and_counted(pair, picture, label_file) -> None:
    picture("images/alone.jpg", 2, 2)
    label_file("labels/deep/odd.png", [[0]])
    picture("images/deep/er.jpg", 2, 4)
    label_file("labels/deep/er.png", VALUES)
    annotated = pair().load()
    assert [one.path.name for one in annotated.pictures] == ["a.png", "er.jpg"]
    assert annotated.faults["pictures without labels, left out"].examples == ("alone.jpg",)
    assert annotated.faults["labels without a picture, left out"].examples == ("odd.png",)


def test_folders_that_do_not_belong_together_are_refused(pair, picture, label_file, tmp_path) -> None:
    picture("images/a.png", 2, 2)
    label_file("labels/b.png", [[0]])
    reader = LabelFolders(tmp_path / "images", tmp_path / "labels")
    with pytest.raises(InputError, match=r"no picture has labels: 1 pictures \(a\), 1 label files \(b\)"):
        reader.load()
    picture("images/a.jpg", 2, 2)
    with pytest.raises(InputError, match=r"has a\.jpg and a\.png: which"):
        reader.load()
    with pytest.raises(InputError, match="none does not exist"):
        LabelFolders(tmp_path / "none", tmp_path / "labels").load()


def test_ids_of_objects_are_no_classes(pair) -> None:
    with pytest.raises(InputError, match="values up to 26001: ids of objects"):
        pair([[26001, 7]], mode="I;16").load()


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": (0, 1), "reduce_zero": True},
        {"values": (0, 0)},
        {"values": (0, 1, 2), "classes": ("a", "b")},
        {"palette": ((0, 0, 0),) * 2},
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, wrong) -> None:
    with pytest.raises(ValueError, match="wanted one of"):
        LabelFolders(tmp_path, tmp_path, **wrong)


def test_settings_go_to_disk_and_back(tmp_path) -> None:
    reader = LabelFolders(tmp_path, tmp_path, ("a", "b"), palette=((1, 2, 3), (4, 5, 6)))
    assert decode(LabelFolders, json.loads(json.dumps(encode(reader)))) == reader


def test_a_coding_is_its_table_also_beyond_what_a_table_holds() -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(100_000)[:50]
    labels = rng.integers(0, 40, 50)
    meaning = dict(zip(values.tolist(), labels.tolist(), strict=True))
    asked = np.concatenate([values, rng.integers(-5, 100_000, 200)])
    for known in (meaning, {value: label for value, label in meaning.items() if value < 60_000}):
        coding = LabelCoding.of(known, 40)
        assert coding.coded(asked).tolist() == [known.get(value, 255) for value in asked.tolist()]
        assert coding.means(asked).tolist() == [value in known or value == 255 for value in asked.tolist()]
