from pathlib import Path

import pytest

from synchromesh.data.parts import Parts, expanded, files_at
from synchromesh.errors import InputError


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a-{8..10}.tar", ["a-8.tar", "a-9.tar", "a-10.tar"]),
        ("a-{01..00}.tar", ["a-01.tar", "a-00.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{odd}.tar", ["{odd}.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces_stand_for_what_a_shell_makes_of_them(pattern: str, names: list[str]) -> None:
    assert expanded(pattern) == names


@pytest.mark.parametrize("pattern", ["{0..99999999}", "{0..9999}{0..9999}"])
def test_too_many_files_are_refused_before_they_are_named(pattern: str) -> None:
    with pytest.raises(InputError, match=r"stands for .* files, wanted 1,000,000 at most"):
        expanded(pattern)


def test_a_file_a_folder_and_a_pattern_mean_the_same_files(tmp_path: Path) -> None:
    for name in ("s-0.tar", "s-1.tar", "deep/s-2.tar", "s-0.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    one, two, three = (tmp_path / name for name in ("s-0.tar", "s-1.tar", "deep/s-2.tar"))
    assert files_at(one, ".tar") == [one]
    assert files_at(tmp_path, ".tar") == [three, one, two]
    assert files_at(tmp_path / "s-{0..1}.tar", ".tar") == [one, two]
    assert files_at(tmp_path / "**" / "*.tar", ".tar") == [three, one, two]
    for name, says in (("s-{0..2}.tar", r"s-2\.tar does not exist"), ("x*.tar", r"does not exist, or holds no \.tar")):
        with pytest.raises(InputError, match=says):
            files_at(tmp_path / name, ".tar")


@pytest.mark.parametrize(
    ("names", "train", "val", "others"),
    [
        (["a.tar", "b.tar"], ["a.tar", "b.tar"], [], []),
        (
            ["train-0.x", "train-1.x", "validation-0.x", "test-0.x"],
            ["train-0.x", "train-1.x"],
            ["validation-0.x"],
            ["test-0.x"],
        ),
        (["train/0.x", "val/0.x"], ["train/0.x"], ["val/0.x"], []),
        (["imagenet-train2012-00.x", "imagenet-test-00.x"], ["imagenet-train2012-00.x"], ["imagenet-test-00.x"], []),
        (["val-0.x"], ["val-0.x"], [], []),
        (["trainer.x", "invalid.x"], ["trainer.x", "invalid.x"], [], []),
    ],
)
def test_names_tell_the_parts(names: list[str], train: list[str], val: list[str], others: list[str]) -> None:
    found = Parts.of([Path(name) for name in names])
    assert [[str(path) for path in own] for own in (found.train, found.val, found.others)] == [train, val, others]


def test_a_file_that_is_named_train_has_its_twin_beside_it(tmp_path: Path) -> None:
    for name in ("train.tsv", "valid.tsv", "other.tsv"):
        (tmp_path / name).write_text("")
    assert Parts.at(tmp_path / "train.tsv", ".*").val == (tmp_path / "valid.tsv",)
    assert Parts.at(tmp_path / "other.tsv", ".*").val == ()
