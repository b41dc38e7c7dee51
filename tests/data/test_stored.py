"""Pictures in parquet files, tar files and lists are those of plain files, in an order that is as exact."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data import stored
from synchromesh.data.files import Encoded
from synchromesh.data.images import EncodedImages, Preprocess, decode_image
from synchromesh.data.sources import OwnData, own_data
from synchromesh.data.stored import StoredFiles
from synchromesh.errors import InputError
from synchromesh.tasks.classification import LabelledImages
from synchromesh.testing.packed import CLASSES, encoded, index_of, parquet_of, tar_of, write_parquet
from synchromesh.training.loader import EpochPlace, Loaded, Loading, Part, eval_batches, train_batches

SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
PICTURES = encoded(30)
Write = Callable[[Path, list[tuple[str, bytes, int]]], Path]


def two_tars(folder: Path, pictures: list[tuple[str, bytes, int]]) -> Path:
    half = len(pictures) // 2
    tar_of(folder / "shard-0.tar", pictures[:half])
    tar_of(folder / "shard-1.tar", pictures[half:])
    return folder / "shard-{0..1}.tar"


def two_parquets(folder: Path, pictures: list[tuple[str, bytes, int]]) -> Path:
    parquet_of(folder / "a.parquet", pictures[:13])
    parquet_of(folder / "b.parquet", pictures[13:])
    return folder


def a_list(folder: Path, pictures: list[tuple[str, bytes, int]]) -> Path:
    return index_of(folder / "all.tsv", pictures)


WRITE = {"parquet": two_parquets, "tar": two_tars, "list": a_list}
kinds = pytest.mark.parametrize("kind", WRITE)


@pytest.fixture
def source(kind: str, tmp_path: Path) -> OwnData:
    return own_data(WRITE[kind](tmp_path / "data", PICTURES))


def whole(source: OwnData) -> EncodedImages:
    found = source.load_all(SIZE, CLASSES)
    assert isinstance(found, EncodedImages)
    return found


@kinds
def test_pixels_and_labels_are_those_of_plain_files(source: OwnData, tmp_path: Path) -> None:
    found = whole(source)
    assert found.labels.tolist() == [label for *_, label in PICTURES]
    for number, (ending, content, _) in enumerate(PICTURES):
        (tmp_path / f"plain.{ending}").write_bytes(content)
        assert torch.equal(found.read(number), decode_image(tmp_path / f"plain.{ending}", SIZE))


@kinds
def test_the_parts_are_of_one_mind_and_share_no_picture(source: OwnData) -> None:
    one, two = source.load(SIZE), source.load(SIZE)
    assert isinstance(one.train, EncodedImages)
    assert isinstance(one.test, EncodedImages)
    assert (len(one.train), one.test.labels.bincount().tolist()) == (26, [2, 2])
    pixels = [{images.read(i).numpy().tobytes() for i in range(len(images))} for images in (one.train, one.test)]
    assert len(pixels[0] | pixels[1]) == 30
    assert [int(label) for label in one.test.labels] == [int(label) for label in two.test.labels]
    assert pixels[1] == {two.test.read(i).numpy().tobytes() for i in range(len(two.test))}
    assert one.train.classes == CLASSES
    assert ": dark 13 + 2, light 13 + 2" in one.notes[0]


def indices(found: list[Loaded]) -> list[int]:
    return [index for batch in found for index in batch.indices]


def batches(split: LabelledImages, *, first: int = 0, part: Part = Part()) -> list[Loaded]:  # noqa: B008
    return list(train_batches(split, 4, place=EpochPlace(3, 1, first), loading=Loading(workers=2), part=part))


@kinds
def test_order_resuming_and_parts_of_ranks_are_as_exact_as_with_files(source: OwnData) -> None:
    split = LabelledImages(whole(source))
    found = batches(split)
    assert indices(found) == indices(batches(split))
    assert len(set(indices(found))) == 28
    rest = batches(split, first=3)
    assert indices(rest) == indices(found)[12:]
    assert all(
        torch.equal(a, b)
        for x, y in zip(rest, found[3:], strict=True)
        for (a, _), (b, _) in zip(x.samples, y.samples, strict=True)
    )
    ranks = [batches(split, part=Part(rank, 3)) for rank in range(3)]
    for step, batch in enumerate(found):
        assert [index for rank in ranks for index in rank[step].indices] == batch.indices
    scored = [indices(list(eval_batches(split, 4, loading=Loading(), part=Part(rank, 3)))) for rank in range(3)]
    assert sorted(index for own in scored for index in own) == list(range(30))


@kinds
def test_a_set_goes_to_other_processes_without_its_pictures(source: OwnData) -> None:
    found = whole(source)
    before = found.read(7)
    sent = pickle.dumps(found)
    assert len(sent) < 6_000
    assert torch.equal(pickle.loads(sent).read(7), before)


@kinds
def test_subsets_know_their_pictures(source: OwnData) -> None:
    found = whole(source)
    chosen = found.subset([11, 2, 29])
    assert chosen.labels.tolist() == [found.labels[i] for i in (11, 2, 29)]
    assert torch.equal(chosen.read(2), found.read(29))
    runs = chosen.runs()
    assert runs is None or runs.sizes.sum() == 3


@kinds
def test_named_parts_are_taken_and_a_class_that_only_val_has_is_refused(kind: str, tmp_path: Path) -> None:
    write: dict[str, Write] = {"parquet": parquet_of, "tar": tar_of, "list": index_of}
    ending = {"parquet": ".parquet", "tar": ".tar", "list": ".tsv"}[kind]
    write[kind](tmp_path / f"train{ending}", PICTURES[:10])
    write[kind](tmp_path / f"val{ending}", PICTURES[:3])
    given = tmp_path / (f"train{ending}" if kind == "list" else "")
    splits = own_data(given).load(SIZE)
    assert (len(splits.train), len(splits.test)) == (10, 3)
    assert f"scored on: val{ending}" in splits.notes
    assert len(own_data(given).load_all(SIZE, CLASSES)) == 3
    with pytest.raises(InputError, match="classes that are not learnt: light"):
        own_data(given).load_all(SIZE, ("dark", "emu"))
    write[kind](tmp_path / f"train{ending}", PICTURES[::2])
    with pytest.raises(InputError, match=r"train\..* has one class only, dark, so there is nothing to tell apart"):
        own_data(given).load(SIZE)


def test_what_nothing_is_learnt_of_and_what_has_no_class_are_said(tmp_path: Path) -> None:
    images = [content for _, content, _ in PICTURES[:9]]
    names = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["b", "none", "a"]}}}}'
    path = write_parquet(
        tmp_path / "x.parquet", {"image": images, "label": [0, 2, -1, 0, 2, None, 0, 2, 2]}, metadata=names
    )
    splits = own_data(path).load(SIZE)
    assert splits.train.classes == ("a", "b")
    assert "without pictures, and so no classes: none" in splits.notes
    assert "left out, as they have no class: 2 pictures" in splits.notes
    assert splits.train.labels.bincount().tolist() == [3, 2]
    write_parquet(tmp_path / "train.parquet", {"image": images[:4], "label": ["a", "b", "a", "b"]})
    write_parquet(tmp_path / "val.parquet", {"image": images[:1], "label": ["a"]})
    path.unlink()
    assert "learnt and never scored: b" in own_data(tmp_path).load(SIZE).notes
    write_parquet(tmp_path / "val.parquet", {"image": images[:1], "label": ["c"]})
    with pytest.raises(InputError, match=r"val\.parquet has classes that are not learnt: c; known are a, b"):
        own_data(tmp_path).load(SIZE)


def test_a_class_with_one_picture_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class light has 1 image, too few"):
        own_data(parquet_of(tmp_path / "x.parquet", PICTURES[:3])).load(SIZE)


def test_numbers_of_classes_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    labels = [int(n) for n in np.tile([10, 9, 2], 3)]
    path = write_parquet(tmp_path / "x.parquet", {"image": [c for _, c, _ in PICTURES[:9]], "label": labels})
    assert own_data(path).load(SIZE).train.classes == ("2", "9", "10")


@kinds
def test_a_glance_at_all_tells_what_loading_tells(source: OwnData) -> None:
    assert isinstance(source, StoredFiles)
    glance = source.glance(SIZE)
    assert glance.count == len(source.load(SIZE).train) == 26
    assert glance.images.labels.tolist() == whole(source).labels.tolist()


@kinds
def test_a_glance_lists_some_pictures_and_estimates_how_many_there_are(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "LOOKED_AT", 16)
    source = own_data(WRITE[kind](tmp_path / "data", [PICTURES[number % 6] for number in range(60)]))
    assert isinstance(source, StoredFiles)
    glance = source.glance(SIZE)
    assert 16 <= len(glance.images) <= 20
    assert abs(glance.count - 54) <= 8
    assert glance.images.read(len(glance.images) - 1).shape == (3, 16, 16)


def test_a_glance_looks_at_some_of_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "FILES_LOOKED_AT", 2)
    for number in range(6):
        tar_of(tmp_path / f"{number}.tar", PICTURES[:12])
    source = own_data(tmp_path)
    assert isinstance(source, StoredFiles)
    glance = source.glance(SIZE)
    looked_at = [glance.images.file(index) for index in range(len(glance.images))]
    assert {one.path.parent.name for one in looked_at if isinstance(one, Encoded)} == {"0.tar", "3.tar"}
    assert (len(glance.images), glance.count) == (24, 66)


@kinds
def test_what_a_glance_cannot_tell_is_asked_of_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "LOOKED_AT", 2)
    monkeypatch.setattr(stored, "FILES_LOOKED_AT", 1)
    source = own_data(WRITE[kind](tmp_path / "data", PICTURES))
    assert isinstance(source, StoredFiles)
    known = source.glance(SIZE)
    assert (known.count, len(known.images)) == (26, 26) if kind != "parquet" else known.count > 0
    one = own_data(index_of(tmp_path / "one.tsv", [(ending, content, 0) for ending, content, _ in PICTURES[:1]]))
    assert isinstance(one, StoredFiles)
    with pytest.raises(InputError, match="one class only"):
        one.glance(SIZE)
