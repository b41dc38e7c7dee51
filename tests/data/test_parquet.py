from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from synchromesh.data.images import Preprocess
from synchromesh.data.parquet import Groups, ParquetFiles
from synchromesh.errors import InputError, UnreadableError
from synchromesh.tasks.classification import LabelledImages
from synchromesh.testing.packed import CLASSES, encoded, parquet_of, write_parquet
from synchromesh.training.loader import EpochPlace, Loading, train_batches

SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
PICTURES = encoded(24)
BYTES = [content for _, content, _ in PICTURES]
LABELS = [CLASSES[label] for *_, label in PICTURES]


def test_what_hugging_face_writes_is_what_it_reads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"id": datasets.Value("int64"), "photo": datasets.Image(), "kind": datasets.ClassLabel(names=["light", "dark"])}
    )
    rows = {
        "id": list(range(24)),
        "photo": [{"bytes": content, "path": None} for content in BYTES],
        "kind": [1 - label for *_, label in PICTURES],
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "photos.parquet", batch_size=5)
    found = ParquetFiles(tmp_path / "photos.parquet").load_all(Preprocess(40, 3, 1.0, (0.5,) * 3, (0.5,) * 3), CLASSES)
    assert found.labels.tolist() == [label for *_, label in PICTURES]
    for number in range(24):
        whole = np.asarray(data[number]["photo"].convert("RGB"))[:, 6:46]
        assert torch.equal(found.read(number), torch.from_numpy(whole.copy()).permute(2, 0, 1))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The groups of rows that are read, as they are."""
    seen: list[int] = []
    original: Callable[..., Any] = Groups._read
    monkeypatch.setattr(Groups, "_read", lambda self, group: (seen.append(group), original(self, group))[1])
    return seen


@pytest.mark.parametrize("held", [1, 2, 16])
def test_an_epoch_reads_each_group_of_rows_once_and_holds_few(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("synchromesh.data.parquet.MOST_GROUPS", held)
    found = ParquetFiles(parquet_of(tmp_path / "x.parquet", PICTURES, rows=3)).load_all(SIZE, CLASSES)
    split = LabelledImages(found)
    # One reader: of two, the slower one may find its group gone, and reads it again.
    batches = train_batches(split, 2, place=EpochPlace(0, 0), loading=Loading(workers=1, ahead=1))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(24))
    assert sorted(reads) == list(range(8))
    assert len(found.store._groups._latest) <= 2 * held


def test_large_groups_are_not_mixed_with_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synchromesh.data.parquet.HELD", 3 * sum(map(len, BYTES[:6])))
    found = ParquetFiles(parquet_of(tmp_path / "x.parquet", PICTURES, rows=6)).load_all(SIZE, CLASSES)
    runs = found.runs()
    assert runs is not None
    assert runs.sizes.tolist() == [6] * 4
    assert runs.together in (2, 3)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({"image": BYTES}, {}, "no one column of classes, but none among image"),
        ({"label": LABELS}, {}, "no one column of pictures, but none among label"),
        (
            {"a": BYTES, "b": BYTES, "label": LABELS},
            {},
            "pictures, but several: a, b: name it with --data.source.picture",
        ),
        ({"image": BYTES, "label": LABELS}, {"label": "kind"}, "no column 'kind': it has image, label"),
        ({"image": BYTES, "label": [0.5] * 24}, {}, "holds 0.5, wanted one number or name of a class"),
        ({"image": BYTES, "label": [["a"]] * 24}, {}, "wanted one number or name"),
    ],
)
def test_columns_that_say_no_class_or_no_picture_are_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], says: str
) -> None:
    path = write_parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(InputError, match=says):
        ParquetFiles(path, **options).load(SIZE)


def test_columns_may_be_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"a": BYTES, "b": BYTES[::-1], "label": LABELS, "kind": LABELS[::-1]})
    found = ParquetFiles(path, picture="b", label="kind").load_all(SIZE, CLASSES)
    other = ParquetFiles(path, picture="a").load_all(SIZE, CLASSES)
    assert torch.equal(found.read(0), other.read(23))
    assert found.labels.tolist() == other.labels.tolist()[::-1]


@pytest.mark.parametrize("metadata", [b"no json", b"[]", b'{"info": {"features": [1]}}', b'{"info": 3}'])
def test_what_is_said_of_columns_may_be_anything(tmp_path: Path, metadata: bytes) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"image": BYTES, "label": LABELS}, metadata=metadata)
    assert len(ParquetFiles(path).load_all(SIZE, CLASSES)) == 24


def test_a_number_that_no_class_has_is_refused(tmp_path: Path) -> None:
    names = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a"]}}}}'
    path = write_parquet(tmp_path / "x.parquet", {"image": BYTES, "label": [1] * 24}, metadata=names)
    with pytest.raises(InputError, match="the class 1 is none of the 1 that it names"):
        ParquetFiles(path).load(SIZE)


def test_files_with_other_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"image": BYTES, "label": LABELS})
    write_parquet(tmp_path / "b.parquet", {"picture": BYTES, "label": LABELS})
    with pytest.raises(InputError, match=r"b\.parquet has other columns than .*a\.parquet: 'picture'"):
        ParquetFiles(tmp_path).load(SIZE)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = parquet_of(tmp_path / "x.parquet", PICTURES)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-100], "garbage": b"no parquet", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"x\.parquet is no whole parquet file"):
        ParquetFiles(path).load(SIZE)


def test_rows_without_a_picture_and_damaged_groups_are_unreadable_and_not_more(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"no picture", "path": None}]
    rows += [{"bytes": content, "path": None} for content in BYTES[2:]]
    path = write_parquet(tmp_path / "x.parquet", {"image": rows, "label": LABELS})
    found = ParquetFiles(path).load_all(SIZE, CLASSES)
    with pytest.raises(UnreadableError, match=r"x\.parquet/0: the row holds no bytes"):
        found.read(0)
    with pytest.raises(UnreadableError, match=r"x\.parquet/1: it is of no kind that Pillow knows"):
        found.read(1)
    assert found.read(2).shape == (3, 16, 16)


def test_a_damaged_group_of_rows_is_unreadable_and_the_others_are_read(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "x.parquet", PICTURES)
    pictures = pq.ParquetFile(path).metadata.row_group(4).column(0)
    start = min(offset for offset in (pictures.dictionary_page_offset, pictures.data_page_offset) if offset)
    content = bytearray(path.read_bytes())
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(bytes(content))
    found = ParquetFiles(path).load_all(SIZE, CLASSES)
    assert all(found.read(number).shape == (3, 16, 16) for number in range(20))
    for number in range(20, 24):
        with pytest.raises(UnreadableError, match=r"x\.parquet: its group of rows 4 is damaged: [^\n]*$"):
            found.read(number)
