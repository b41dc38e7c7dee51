"""Where the answers of `predict` go: one place for each image, and never onto an image."""

from pathlib import Path

import pytest

from synchromesh.commands.predict import Request, _names
from synchromesh.errors import InputError


def names(images, draw, *, pictures=False, values=""):
    paths = tuple(map(Path, images))
    return _names(Request(images=paths, draw=draw), Path("runs/one"), paths, pictures=pictures, values=values)


def test_images_of_one_name_get_answers_of_their_own(tmp_path):
    found = names(["a/1.png", "b/1.png", "b/1.jpg", "b/2.png"], tmp_path)
    assert [name.name for name in found.values()] == ["1", "1-2", "1-3", "2"]
    assert len(set(found.values())) == 4


def test_a_name_that_looks_like_a_number_is_no_clash(tmp_path):
    found = names(["a/1.png", "b/1.png", "c/1-2.png"], tmp_path)
    assert [name.name for name in found.values()] == ["1", "1-2", "1-2-2"]


def test_names_with_dots_keep_all_of_them(tmp_path):
    (name,) = names(["a/photo.2024.05.png"], tmp_path).values()
    assert name.name == "photo.2024.05"


def test_an_image_given_twice_has_one_answer(tmp_path):
    assert len(names(["a/1.png", "a/1.png"], tmp_path)) == 1


@pytest.mark.parametrize("images", [["{}/a.png"], ["{}/../photos/a.png"], ["other/a.jpg", "{}/a.png"]])
def test_an_answer_never_overwrites_an_image(tmp_path, images):
    folder = tmp_path / "photos"
    with pytest.raises(InputError, match=r"overwrite .*a\.png, wanted a folder without"):
        names([image.format(folder) for image in images], folder)
    assert names([str(folder / "a.jpg")], folder)  # whose answer is another file


def test_pictures_go_into_the_run_where_nobody_names_a_folder():
    assert names(["a.png"], None) == {}
    assert names(["a.png"], None, pictures=True) == {Path("a.png"): Path("runs/one/predictions/a")}


def test_files_of_values_never_overwrite_an_image_and_no_answer_takes_the_name_of_their_json(tmp_path):
    inside = str(tmp_path / "values" / "a.png")
    with pytest.raises(InputError, match=r"overwrite .*values/a\.png"):
        names([inside], tmp_path, values="values")
    assert names([inside], tmp_path, values="others")
    (name,) = names(["photos/values.jpg"], tmp_path, values="values").values()
    assert name.name == "values-2"
