"""A dataset of Hugging Face's is read by number: its pictures and its order are exact, and resume."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synchromesh.data.files import Encoded
from synchromesh.data.images import Images, Preprocess, decode_image
from synchromesh.data.saved_dataset import SavedDataset, store_of
from synchromesh.data.sources import own_data
from synchromesh.errors import InputError, UnreadableError
from synchromesh.tasks.classification import LabelledImages
from synchromesh.testing.packed import encoded
from synchromesh.training.loader import EpochPlace, Loading, Part, train_batches

datasets = pytest.importorskip("datasets")
SIZE = Preprocess(16, 3, 1.0, (0.5,) * 3, (0.5,) * 3)
PICTURES = encoded(24)


def made(count: int = 24, names: tuple[str, ...] = ("light", "dark")) -> Any:
    features = datasets.Features(
        {"id": datasets.Value("int64"), "photo": datasets.Image(), "kind": datasets.ClassLabel(names=list(names))}
    )
    rows = {
        "id": list(range(count)),
        "photo": [{"bytes": content, "path": None} for _, content, _ in PICTURES[:count]],
        "kind": [1 - label for *_, label in PICTURES[:count]],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def images(dataset: Any) -> Images:
    store = store_of(dataset)
    return store.images(store.known(), SIZE)


def indices(split: LabelledImages, *, first: int = 0, part: Part = Part(), processes: bool = False) -> list[list[int]]:  # noqa: B008
    loading = Loading(workers=2, processes=processes)
    return [one.indices for one in train_batches(split, 4, place=EpochPlace(3, 1, first), loading=loading, part=part)]


def test_pixels_and_classes_are_those_of_the_rows() -> None:
    found = images(made())
    assert found.classes == ("dark", "light")
    assert found.labels.tolist() == [label for *_, label in PICTURES]
    for number, (_, content, _) in enumerate(PICTURES):
        assert torch.equal(found.read(number), decode_image(Encoded(Path("x"), content), SIZE))


def test_chosen_and_shuffled_rows_are_read_in_their_order() -> None:
    chosen = made().shuffle(seed=1).select(range(7))
    found, numbers = images(chosen), chosen["id"]
    assert found.labels.tolist() == [PICTURES[number][2] for number in numbers]
    for place, number in enumerate(numbers):
        assert torch.equal(found.read(place), decode_image(Encoded(Path("x"), PICTURES[number][1]), SIZE))


@pytest.mark.parametrize("processes", [False, True])
def test_order_resuming_and_parts_of_ranks_are_exact(processes: bool) -> None:
    split = LabelledImages(images(made()))
    found = indices(split, processes=processes)
    assert sorted(number for batch in found for number in batch) == list(range(24))
    assert found == indices(split)
    assert indices(split, first=2, processes=processes) == found[2:]
    ranks = [indices(split, part=Part(rank, 2)) for rank in range(2)]
    assert [one + two for one, two in zip(*ranks, strict=True)] == found


def test_a_folder_of_parts_is_learnt_from_and_scored_on_by_their_names(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": made(), "validation": made(6), "extra": made(4)}).save_to_disk(str(tmp_path / "d"))
    source = own_data(tmp_path / "d")
    assert source == SavedDataset(tmp_path / "d")
    found = source.load(SIZE)
    assert (len(found.train), len(found.test)) == (24, 6)
    assert "other parts are not read: extra" in found.notes
    assert len(source.load_all(SIZE, ("dark", "light"))) == 6


def test_one_dataset_is_divided_and_a_glance_knows_how_many_there_are(tmp_path: Path) -> None:
    made().save_to_disk(str(tmp_path / "d"), num_shards=2)
    source = SavedDataset(tmp_path / "d")
    found = source.load(SIZE)
    assert (len(found.train), found.test.labels.bincount().tolist()) == (22, [1, 1])
    assert (source.glance(SIZE).count, len(source.read([tmp_path / "d"], 10).labels)) == (22, 10)
    assert source.read([tmp_path / "d"], 12).share == 0.5


def test_pictures_that_lie_beside_it_and_names_of_classes_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[0][1])
    rows = {"image": [str(tmp_path / "a.png"), None], "label": ["cat", None]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    store = store_of(datasets.Dataset.from_dict(rows, features=features))
    assert (store.classes, store.labels.tolist()) == (("cat",), [0, -1])
    assert store.store.file(0) == tmp_path / "a.png"
    with pytest.raises(UnreadableError, match="holds no picture"):
        store.store.file(1)


def test_numbers_of_classes_without_names_are_in_order() -> None:
    data = made(6).remove_columns("kind").add_column("label", [10, 9, 2, 10, 9, 2])
    store = store_of(data)
    assert store.classes == ("2", "9", "10")
    assert np.array_equal(store.labels, [2, 1, 0, 2, 1, 0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: made().to_iterable_dataset(), "got a IterableDataset, whose rows have no numbers"),
        (lambda: made().remove_columns("kind"), "no one column of classes among id, photo: name it"),
        (lambda: made().remove_columns("photo"), "no one column of pictures among id, kind: name it"),
    ],
)
def test_what_cannot_be_read_by_number_is_refused(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        store_of(make())


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    made().save_to_disk(str(tmp_path / "d"))
    for path in (tmp_path / "d").glob("*.arrow"):
        path.write_bytes(b"no arrow")
    with pytest.raises(InputError, match="no whole saved dataset"):
        SavedDataset(tmp_path / "d").load(SIZE)
    with pytest.raises(InputError, match="is no folder that"):
        SavedDataset(tmp_path).load(SIZE)
