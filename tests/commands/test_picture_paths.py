"""Which pictures a command is given."""

from collections.abc import Callable
from pathlib import Path

import pytest

from synchromesh.commands.picture_paths import is_pattern, pictures_of
from synchromesh.errors import InputError


def found(*given: str, stdin: bytes = b"") -> list[str]:
    return [path.name for path in pictures_of([Path(name) for name in given], lambda: stdin)]


@pytest.fixture
def folder(tmp_path: Path, photo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.png", "a.tif", "deep/c.JPG", "odd[1].png"):
        photo(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_are_taken_as_given_and_folders_by_name(folder: Path) -> None:
    assert found("in/notes.txt", "missing.png") == ["notes.txt", "missing.png"]  # to be refused by their content
    assert found("in") == ["a.tif", "b.png", "c.JPG", "odd[1].png"]


def test_patterns_take_pictures_alone_and_a_file_that_looks_like_one_is_a_file(folder: Path) -> None:
    assert found("in/*") == ["a.tif", "b.png", "odd[1].png"]
    assert found("in/**/*") == ["a.tif", "b.png", "c.JPG", "odd[1].png"]
    assert found("in/odd[1].png") == ["odd[1].png"]
    assert is_pattern(Path("in/odd[2].png"))


def test_names_on_stdin_may_have_any_ending_of_lines_or_none_and_lead_to_folders(folder: Path) -> None:
    assert found("-", "in/b.png", stdin=b"in/a.tif\r\n\nin/deep\n") == ["a.tif", "c.JPG", "b.png"]
    assert found("-", stdin=b"in/b.png\0in/with\nline.png\0") == ["b.png", "with\nline.png"]
    assert found("-", stdin="in/é.png".encode("latin-1"))[0].encode(errors="surrogateescape") == b"\xe9.png"


@pytest.mark.parametrize(
    ("given", "stdin", "says"),
    [("-", b"\n", "which is empty"), ("-", b"-\n", "names -, itself"), ("in/*.bmp", b"", "no picture fits")],
)
def test_nothing_to_read_is_said(folder: Path, given: str, stdin: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        found(given, stdin=stdin)


def test_a_folder_without_pictures_is_said(folder: Path) -> None:
    (folder / "none").mkdir()
    with pytest.raises(InputError, match="none holds no picture"):
        found("none")
