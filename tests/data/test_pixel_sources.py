import numpy as np
import pytest

from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.pixel_sources import AnnotatedFiles, ReaderPair
from synchromesh.errors import InputError
from synchromesh.training.codec import decode, encode


@pytest.fixture
def pairs(tmp_path, picture, label_file):
    """Write pictures and label files of a part, whose pixels have the values from 0."""

    def write(part: str, count: int, values: int = 2) -> None:
        for number in range(count):
            picture(f"images/{part}/{number}.png", 4, 6)
            pixels = np.arange(24).reshape(4, 6) % values
            label_file(f"labels/{part}/{number}.png", pixels)

    return write


def test_parts_of_a_layout_are_taken_and_the_second_one_is_scored(pairs, tmp_path) -> None:
    pairs("train", 5)
    pairs("val", 2)
    train, test = AnnotatedFiles(tmp_path).load()
    assert (len(train), len(test)) == (5, 2)
    assert len(AnnotatedFiles(tmp_path).all_to_score(("0", "1"))) == 2


def test_without_parts_a_share_is_held_out_and_all_is_scored_for_another_model(pairs, tmp_path) -> None:
    pairs("", 10)
    train, test = AnnotatedFiles(tmp_path, test_share=0.3).load()
    assert (len(train), len(test)) == (7, 3)
    other = AnnotatedFiles(tmp_path, test_share=0.3, split_seed=1).load()[1]
    assert [one.path for one in other.pictures] != [one.path for one in test.pictures]
    assert len(AnnotatedFiles(tmp_path).all_to_score(("0", "1"))) == 10


def test_files_that_show_fewer_classes_than_the_model_knows_are_scored_and_more_are_refused(pairs, tmp_path) -> None:
    pairs("", 3)
    assert AnnotatedFiles(tmp_path).all_to_score(("0", "1", "2")).classes == ("0", "1", "2")
    with pytest.raises(InputError, match=r"has the classes \['0', '1'\], and the model was trained on \['0'\]"):
        AnnotatedFiles(tmp_path).all_to_score(("0",))


def test_class_folders_are_refused_since_they_say_nothing_of_pixels(tmp_path, picture) -> None:
    picture("cats/a.png", 4, 6)
    picture("dogs/a.png", 4, 6)
    for read in (AnnotatedFiles(tmp_path).load, lambda: AnnotatedFiles(tmp_path).all_to_score(())):
        with pytest.raises(InputError, match="a folder for each class, wanted a second file"):
            read()


def test_two_readers_of_different_classes_are_refused(pairs, tmp_path) -> None:
    pairs("train", 2)
    pairs("val", 2, values=3)
    train, test = (LabelFolders(tmp_path / "images" / part, tmp_path / "labels" / part) for part in ("train", "val"))
    with pytest.raises(InputError, match=r"\['0', '1'\].*\['0', '1', '2'\].*the same ones"):
        ReaderPair(train, test).load()
    assert [len(part) for part in ReaderPair(train, train).load()] == [2, 2]
    assert decode(ReaderPair, encode(ReaderPair(train, test))) == ReaderPair(train, test)
