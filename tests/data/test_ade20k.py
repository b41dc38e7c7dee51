import pytest

from synchromesh.data.ade20k import Ade20k
from synchromesh.errors import InputError


def test_unlabelled_is_ignored_and_classes_count_from_zero(tmp_path, picture, label_file) -> None:
    picture("images/training/ADE_train_1.jpg", 2, 3)
    label_file("annotations/training/ADE_train_1.png", [[0, 1, 150], [2, 2, 0]])
    annotated = Ade20k(tmp_path).load()
    assert annotated.pictures[0].opened(3)[1].values.tolist() == [[255, 0, 149], [1, 1, 255]]
    assert len(annotated.classes) == 150
    assert annotated.notes() == ()


def test_names_are_those_of_the_file(tmp_path, picture, label_file) -> None:
    picture("images/validation/a.jpg", 1, 1)
    label_file("annotations/validation/a.png", [[1]])
    rows = "".join(f"{n}\t0.1\t5\t5\tname {n}, other\n" for n in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    assert Ade20k(tmp_path, "validation").load().classes[:2] == ("name 1", "name 2")


def test_values_above_150_are_named(tmp_path, picture, label_file) -> None:
    picture("images/training/a.jpg", 1, 2)
    label_file("annotations/training/a.png", [[1, 151]])
    assert "a.png has 151 in 1 of 2 pixels" in Ade20k(tmp_path).load().notes()[0]


def test_a_missing_split_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="images/training does not exist"):
        Ade20k(tmp_path).load()


def test_labels_saved_as_jpeg_are_refused_by_their_kind(tmp_path, picture) -> None:
    picture("images/training/a.jpg", 1, 2)
    picture("annotations/training/a.jpg", 1, 2)
    with pytest.raises(InputError, match=r"wanted \.png, .*, got 1 \.jpg; JPEG changes values"):
        Ade20k(tmp_path).load()
