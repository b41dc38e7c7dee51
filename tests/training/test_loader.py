import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from synchromesh.data.images import Batch, Images, MemoryImages, Preprocess, RandomCrop
from synchromesh.errors import InputError
from synchromesh.training.loader import EpochPlace, Loading, eval_batches, steps_per_epoch, train_batches

COUNT = 50


@dataclass(frozen=True)
class Watched(Images):
    """Images whose pixels are their index; notes how many were read, and fails at some."""

    read_so_far: list[int]
    broken: frozenset[int] = frozenset()

    def read(self, index: int, crop: tuple[RandomCrop, np.random.Generator] | None = None) -> Tensor:
        self.read_so_far.append(index)
        if index in self.broken:
            raise InputError(f"cannot read the image {index}.png")
        return torch.full((1, 4, 4), index, dtype=torch.uint8)

    def subset(self, indices: Sequence[int]) -> Images:
        raise NotImplementedError  # the loader never asks for a part of a set


def watched(broken: Sequence[int] = ()) -> Watched:
    return Watched(torch.arange(COUNT) % 3, ("a", "b", "c"), Preprocess(image_size=4), [], frozenset(broken))


def batches(images: Images, size: int = 8, *, loading: Loading | None = None, **place: int) -> list[Batch]:
    where = EpochPlace(seed=place.get("seed", 0), epoch=place.get("epoch", 0), first=place.get("first", 0))
    return list(train_batches(images, size, place=where, crop=None, loading=loading or Loading()))


def indices(found: list[Batch]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in found for image in batch.images]


def test_an_epoch_holds_full_batches_of_different_images() -> None:
    found = batches(watched())
    assert [len(batch.labels) for batch in found] == [8] * 6
    assert len(set(indices(found))) == 48


def test_labels_stay_with_their_images() -> None:
    for batch in batches(watched()):
        assert torch.equal(batch.images[:, 0, 0, 0].long() % 3, batch.labels)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert indices(batches(watched(), epoch=2)) == indices(
        batches(watched(), epoch=2, loading=Loading(workers=1, ahead=5))
    )
    assert indices(batches(watched(), epoch=2)) != indices(batches(watched(), epoch=3))
    assert indices(batches(watched(), epoch=2)) != indices(batches(watched(), epoch=2, seed=1))


def test_a_resumed_epoch_is_the_rest_of_the_whole_one() -> None:
    images = watched()
    assert indices(batches(images, first=4)) == indices(batches(watched()))[32:]
    assert len(images.read_so_far) == 16  # what came before is not decoded again


def test_no_more_than_the_wanted_batches_are_read_ahead() -> None:
    images = watched()
    reader = train_batches(images, 8, place=EpochPlace(0, 0), crop=None, loading=Loading(workers=4, ahead=2))
    next(reader)
    reader.close()
    assert len(images.read_so_far) <= 24


def test_a_reader_left_early_leaves_no_thread_behind() -> None:
    reader = train_batches(watched(), 8, place=EpochPlace(0, 0), crop=None, loading=Loading())
    next(reader)
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_evaluation_sees_every_image_once_and_not_class_by_class() -> None:
    found = list(eval_batches(watched(), 8, loading=Loading()))
    assert sorted(indices(found)) == list(range(COUNT))
    assert indices(found) != list(range(COUNT))


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert steps_per_epoch(watched(), 64) == 1
    assert [len(batch.labels) for batch in batches(watched(), 64)] == [COUNT]


def test_a_bad_image_stops_and_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot read the image 7\.png; --on-bad-image skip"):
        batches(watched(broken=[7]), COUNT)


def test_skipped_images_are_left_out_and_named() -> None:
    (batch,) = batches(watched(broken=[7, 9]), COUNT, loading=Loading(skip_bad_images=True))
    assert sorted(indices([batch])) == [i for i in range(COUNT) if i not in (7, 9)]
    assert sorted(batch.bad) == ["cannot read the image 7.png", "cannot read the image 9.png"]


def test_a_batch_of_bad_images_alone_is_empty() -> None:
    (batch,) = batches(watched(broken=range(COUNT)), COUNT, loading=Loading(skip_bad_images=True))
    assert batch.images.shape == (0, 1, 4, 4)
    assert len(batch.bad) == COUNT


def test_an_images_crop_does_not_depend_on_its_place_in_the_batches() -> None:
    pixels = torch.randint(0, 256, (COUNT, 1, 16, 16), dtype=torch.uint8)
    images = MemoryImages(torch.arange(COUNT), tuple(map(str, range(COUNT))), Preprocess(image_size=8), pixels)
    by_index = []
    for size in (5, 10):
        found = train_batches(images, size, place=EpochPlace(0, 0), crop=RandomCrop(), loading=Loading())
        by_index.append(
            {int(label): image for batch in found for label, image in zip(batch.labels, batch.images, strict=True)}
        )
    assert all(torch.equal(by_index[0][i], by_index[1][i]) for i in range(COUNT))
