import tracemalloc
from pathlib import Path

import pytest

from synchromesh.data.images import Preprocess
from synchromesh.data.index_file import IndexFile
from synchromesh.errors import InputError, UnreadableError
from synchromesh.testing.packed import encoded, index_of

SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    "lines",
    [
        "a b.png\tred cat\nc.png\tdog\n",
        "a b.png,red cat\r\nc.png,dog",
        "\n  a b.png \t red cat \n\n\nc.png\tdog\n\n",
    ],
)
def test_lines_may_end_and_be_parted_in_any_usual_way(tmp_path: Path, lines: str) -> None:
    (tmp_path / "x.csv").write_bytes(lines.encode())
    found = IndexFile(tmp_path / "x.csv").load_all(SIZE, ("dog", "red cat"))
    assert found.labels.tolist() == [1, 0]
    assert [found.file(i) for i in (0, 1)] == [tmp_path / "a b.png", tmp_path / "c.png"]


def test_a_list_as_imagenet_has_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("n01/a.JPEG 10\nn02/b.JPEG 2\n/else/c.png 10\n")
    found = IndexFile(tmp_path / "x.txt").load_all(SIZE, ("2", "10"))
    assert found.labels.tolist() == [1, 0, 1]
    assert found.file(2) == Path("/else/c.png")


@pytest.mark.parametrize("line", ["alone", '"a.png","b"', "a.png\t", "\ta", "a\0.png\tb", "x" * 70_000 + "\ta"])
def test_a_line_that_says_no_picture_and_class_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.tsv").write_text(f"a.png\tcat\nb.png\tdog\n{line}\n")
    with pytest.raises(InputError, match=r"x\.tsv has no picture and class in line 3, "):
        IndexFile(tmp_path / "x.tsv").load(SIZE)


def test_an_empty_list_has_nothing_to_tell_apart(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("\n")
    with pytest.raises(InputError, match="one class only, none at all"):
        IndexFile(tmp_path / "x.tsv").load(SIZE)


def test_a_picture_that_is_not_there_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = index_of(tmp_path / "x.tsv", encoded(6))
    found = IndexFile(path).load_all(SIZE, ("dark", "light"))
    (tmp_path / "0.png").unlink()
    with pytest.raises(UnreadableError, match=r"0\.png"):
        found.read(0)
    path.unlink()
    with pytest.raises(UnreadableError, match=r"x\.tsv"):
        found.read(1)


def test_of_a_long_list_a_few_bytes_a_line_are_held(tmp_path: Path) -> None:
    """14 million lines then take 14e6 * 64 bytes, 0.9 GB, at the worst moment, and 14e6 * 20 afterwards."""
    count = 50_000
    with (tmp_path / "x.tsv").open("w") as file:
        for number in range(count):
            file.write(f"photographs/of/a/class/n{number % 100:08d}/picture_{number:08d}.jpeg\tn{number % 100:08d}\n")
    tracemalloc.start()
    try:
        found = IndexFile(tmp_path / "x.tsv").load_all(SIZE, tuple(f"n{n:08d}" for n in range(100)))
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert held < 24 * count
    assert most < 64 * count
    assert found.file(count - 1).name == f"picture_{count - 1:08d}.jpeg"
