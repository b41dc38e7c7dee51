import multiprocessing
import resource
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.runs import Runs
from synchromesh.errors import InputError, UnreadableError
from synchromesh.training.loader import EpochPlace, Loaded, Loading, eval_batches, steps_per_epoch, train_batches
from synchromesh.training.task import Draw, Split

COUNT = 50


@dataclass(frozen=True)
class Watched:
    """Samples that are their own numbers; notes how many were read, and fails at some."""

    broken: frozenset[int] = frozenset()
    read_so_far: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int, draw: Draw | None = None) -> int:
        self.read_so_far.append(index)
        if index in self.broken:
            raise InputError(f"cannot read the image {index}.png")
        return index


def watched(broken: Sequence[int] = ()) -> Watched:
    return Watched(frozenset(broken))


def batches(split: Split, size: int = 8, *, loading: Loading | None = None, **place: int) -> list[Loaded]:
    where = EpochPlace(seed=place.get("seed", 0), epoch=place.get("epoch", 0), first=place.get("first", 0))
    return list(train_batches(split, size, place=where, loading=loading or Loading()))


def indices(found: list[Loaded]) -> list[int]:
    return [sample for batch in found for sample in batch.samples]


def test_an_epoch_holds_full_batches_of_different_images() -> None:
    found = batches(watched())
    assert [len(batch.samples) for batch in found] == [8] * 6
    assert len(set(indices(found))) == 48


def test_numbers_stay_with_their_samples() -> None:
    assert all(batch.samples == batch.indices for batch in batches(watched([7]), loading=Loading(skip_bad_images=True)))


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
    reader = train_batches(images, 8, place=EpochPlace(0, 0), loading=Loading(workers=4, ahead=2))
    next(reader)
    reader.close()
    assert len(images.read_so_far) <= 24


def test_a_reader_left_early_leaves_no_thread_behind() -> None:
    others = set(threading.enumerate())
    reader = train_batches(watched(), 8, place=EpochPlace(0, 0), loading=Loading())
    next(reader)
    reader.close()
    assert set(threading.enumerate()) <= others


def test_evaluation_sees_every_image_once_and_not_class_by_class() -> None:
    found = list(eval_batches(watched(), 8, loading=Loading()))
    assert sorted(indices(found)) == list(range(COUNT))
    assert indices(found) != list(range(COUNT))


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    assert steps_per_epoch(watched(), 64) == 1
    assert [len(batch.samples) for batch in batches(watched(), 64)] == [COUNT]


def test_a_bad_image_stops_and_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot read the image 7\.png; --on-bad-image skip"):
        batches(watched(broken=[7]), COUNT)


def test_skipped_images_are_left_out_and_named() -> None:
    (batch,) = batches(watched(broken=[7, 9]), COUNT, loading=Loading(skip_bad_images=True))
    assert sorted(indices([batch])) == [i for i in range(COUNT) if i not in (7, 9)]
    assert sorted(batch.bad) == ["cannot read the image 7.png", "cannot read the image 9.png"]


def test_the_file_and_the_reason_of_what_is_left_out_stay_apart(tmp_path) -> None:
    class Unreadable(Watched):
        def read(self, index: int, draw: Draw | None = None) -> int:
            if index == 7:
                raise UnreadableError(tmp_path / "7.png", "no picture")
            return super().read(index, draw)

    (batch,) = batches(Unreadable(frozenset([9])), COUNT, loading=Loading(skip_bad_images=True))
    found = sorted((one.path, one.reason) for one in batch.left_out)
    assert found == [("", "cannot read the image 9.png"), (str(tmp_path / "7.png"), "no picture")]
    assert f"cannot read the image {tmp_path / '7.png'}: no picture" in batch.bad


def test_a_batch_of_bad_images_alone_is_empty() -> None:
    (batch,) = batches(watched(broken=range(COUNT)), COUNT, loading=Loading(skip_bad_images=True))
    assert batch.samples == []
    assert len(batch.bad) == COUNT


@dataclass(frozen=True)
class Drawn:
    """Samples that are drawn at random."""

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int, draw: Draw | None = None) -> float:
        return 0.0 if draw is None else float(draw().random())


def test_what_is_drawn_for_a_sample_does_not_depend_on_its_place_in_the_batches() -> None:
    by_index = [
        {i: s for batch in batches(Drawn(), size) for i, s in zip(batch.indices, batch.samples, strict=True)}
        for size in (5, 10)
    ]
    assert by_index[0] == by_index[1]
    assert len(set(by_index[0].values())) == COUNT
    again = [s for batch in batches(Drawn(), 5, epoch=1) for s in batch.samples]
    assert not set(again) & set(by_index[0].values())


def test_nothing_is_drawn_in_evaluation() -> None:
    assert {s for batch in eval_batches(Drawn(), 8, loading=Loading()) for s in batch.samples} == {0.0}


@dataclass(frozen=True)
class Pictures:
    """Samples as tasks have them: tensors of several kinds, arrays, and plain values, drawn at random."""

    broken: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int, draw: Draw | None = None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, str]:
        if index in self.broken:
            raise UnreadableError(Path(f"{index}.png"), "no picture")
        rng = np.random.default_rng(index) if draw is None else draw()
        pixels = torch.from_numpy(rng.integers(0, 256, (3, 5, 4), dtype=np.uint8)).permute(1, 0, 2)
        return pixels, torch.full((), index, dtype=torch.bfloat16), rng.random(2), f"sample {index}"


def told(found: list[Loaded]) -> list[object]:
    return [
        (pixels.tolist(), pixels.dtype, number.item(), number.dtype, values.tolist(), name, index)
        for batch in found
        for (pixels, number, values, name), index in zip(batch.samples, batch.indices, strict=True)
    ]


def test_processes_read_what_threads_read_in_the_same_order_bit_for_bit() -> None:
    split, by_processes = Pictures(), Loading(workers=2, processes=True)
    whole = batches(split)
    before = torch.get_rng_state()
    assert told(batches(split, loading=by_processes)) == told(whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert told(batches(split, loading=by_processes, first=4)) == told(whole)[32:]
    scored = list(eval_batches(split, 8, loading=by_processes))
    assert told(scored) == told(list(eval_batches(split, 8, loading=Loading())))


def test_what_processes_cannot_read_is_named_or_left_out() -> None:
    split = Pictures(broken=frozenset([7, 9]))
    (batch,) = batches(split, COUNT, loading=Loading(workers=2, processes=True, skip_bad_images=True))
    assert sorted((one.path, one.reason) for one in batch.left_out) == [
        ("7.png", "no picture"),
        ("9.png", "no picture"),
    ]
    assert sorted(batch.indices) == [i for i in range(COUNT) if i not in (7, 9)]
    with pytest.raises(InputError, match=r"cannot read the image [79]\.png: no picture; --on-bad-image skip"):
        batches(split, COUNT, loading=Loading(workers=2, processes=True))


def test_a_reader_left_early_leaves_no_process_behind() -> None:
    reader = train_batches(Pictures(), 8, place=EpochPlace(0, 0), loading=Loading(workers=2, processes=True))
    next(reader)
    assert multiprocessing.active_children()
    reader.close()
    assert not multiprocessing.active_children()


def test_more_samples_than_a_process_may_open_files_come_through() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        found = batches(Many(400), 400, loading=Loading(workers=2, processes=True))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(found[0].samples) == 400


@dataclass(frozen=True)
class Many:
    """Small tensors."""

    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, index: int, draw: Draw | None = None) -> torch.Tensor:
        return torch.tensor([index])


@dataclass(frozen=True)
class Lying:
    """Samples that lie in runs of five."""

    def __len__(self) -> int:
        return COUNT

    def read(self, index: int, draw: Draw | None = None) -> int:
        return index

    def runs(self) -> Runs:
        return Runs(np.full(10, 5), 2)


def test_what_lies_in_runs_is_read_run_by_run_and_as_exactly() -> None:
    found = indices(batches(Lying(), 5))
    assert sorted(found) == list(range(COUNT))
    assert all(len({number // 5 for number in found[start : start + 10]}) == 2 for start in range(0, COUNT, 10))
    assert found == indices(batches(Lying(), 5, loading=Loading(workers=1, ahead=5)))
    assert found != indices(batches(Lying(), 5, epoch=1))
    assert indices(batches(Lying(), 5, first=4)) == found[20:]
    scored = indices(list(eval_batches(Lying(), 8, loading=Loading())))
    assert sorted(scored) == list(range(COUNT))
    assert len({number // 5 for number in scored[:10]}) == 2
