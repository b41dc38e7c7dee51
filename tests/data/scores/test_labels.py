import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as matrix_of_sklearn
from torch import Tensor

from synchromesh.data.scores import labels
from synchromesh.data.scores.labels import Confusion, LabelNumbers, LabelScores, confusion_matrix
from synchromesh.torch_private import TorchDispatchMode

NAMES = ("sky", "road", "car", "dog")


def random_picture(seed: int, *, height: int = 9, width: int = 13, ignore: int = 255) -> tuple[Tensor, Tensor]:
    """True labels, some of which do not count, and found ones of which half are right."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 4, (height, width), generator=generator)
    other = torch.randint(0, 4, (height, width), generator=generator)
    found = torch.where(torch.rand(height, width, generator=generator) < 0.5, truth, other)
    truth[torch.rand(height, width, generator=generator) < 0.2] = ignore
    return truth, found


def scored(*pictures: tuple[Tensor, Tensor], ignore: int = 255) -> LabelNumbers:
    scores = LabelScores(NAMES, ignore=ignore)
    for truth, found in pictures:
        scores.add(truth, found)
    return scores.numbers([scores.state()])


@given(st.integers(0, 10_000), st.sampled_from([255, -1, 4]))
def test_the_matrix_is_that_of_sklearn_without_what_does_not_count(seed: int, ignore: int) -> None:
    truth, found = random_picture(seed, ignore=ignore)
    counted = truth != ignore
    wanted = matrix_of_sklearn(truth[counted], found[counted], labels=range(4))
    assert confusion_matrix(truth, found, 4, ignore=ignore).tolist() == wanted.tolist()


@given(st.integers(0, 10_000))
def test_the_numbers_are_their_definitions(seed: int) -> None:
    truth, found = random_picture(seed)
    truth[truth == 3], found[found == 3] = 2, 2
    got = scored((truth, found))
    pairs = [(t, f) for t, f in zip(truth.flatten().tolist(), found.flatten().tolist(), strict=True) if t != 255]
    ious, accuracies = [], []
    for label, name in enumerate(NAMES):
        both = sum(t == f == label for t, f in pairs)
        either, own = sum(label in pair for pair in pairs), sum(t == label for t, _ in pairs)
        assert got.iou[name] == (both / either if either else None)
        assert got.accuracy[name] == (both / own if own else None)
        assert got.pixels[name] == own
        ious += [both / either] if either else []
        accuracies += [both / own] if own else []
    assert got.iou["dog"] is None
    assert got.miou == pytest.approx(sum(ious) / 3)
    assert got.mean_accuracy == pytest.approx(sum(accuracies) / 3)
    assert got.pixel_accuracy == pytest.approx(sum(t == f for t, f in pairs) / len(pairs))


def test_a_class_that_was_only_found_scores_zero_and_has_no_accuracy() -> None:
    got = scored((torch.tensor([[0, 0, 1]]), torch.tensor([[0, 2, 1]])))
    assert got.iou == {"sky": 0.5, "road": 1, "car": 0, "dog": None}
    assert got.accuracy == {"sky": 0.5, "road": 1, "car": None, "dog": None}
    assert got.miou == pytest.approx(0.5)


def test_the_numbers_of_ranks_are_those_of_all_pictures_and_not_means_of_pictures() -> None:
    pictures = [random_picture(seed, height=5 + 3 * seed) for seed in range(5)]
    wanted = scored(*pictures)
    for parts in ((pictures[:2], pictures[2:]), ([], pictures[3:], pictures[:3])):
        ranks = [LabelScores(NAMES) for _ in parts]
        merits = [rank.add(*one) for rank, own in zip(ranks, parts, strict=True) for one in own]
        assert ranks[0].numbers([rank.state() for rank in ranks]) == wanted
        assert sum(merits) / len(merits) != pytest.approx(wanted.miou, abs=1e-4)


def test_the_merit_of_a_picture_is_its_own_mean_iou() -> None:
    one = random_picture(3)
    assert LabelScores(NAMES).add(*one) == scored(one).miou
    scores = LabelScores(NAMES)
    scores.add(*random_picture(4))
    assert scores.add(*one) == scored(one).miou
    assert scores.add(torch.full((2, 2), 255), torch.zeros(2, 2, dtype=torch.int64)) == 1


def test_nothing_that_counts_is_no_number() -> None:
    got = scored((torch.full((2, 2), 255), torch.ones(2, 2, dtype=torch.int64)))
    assert (got.miou, got.mean_accuracy, got.pixel_accuracy, got.confused) == (None, None, None, ())
    assert set(got.iou.values()) == {None}


def test_the_most_confused_pairs_come_first_with_their_share_of_the_true_class() -> None:
    truth = torch.tensor([[0] * 4 + [1] * 10 + [2] * 2])
    found = torch.tensor([[0, 1, 1, 2] + [1] * 7 + [2] * 3 + [2, 2]])
    scores = LabelScores(NAMES)
    scores.add(truth, found)
    pairs = (
        Confusion("road", "car", 3, 0.3),
        Confusion("sky", "road", 2, 0.5),
        Confusion("sky", "car", 1, 0.25),
    )
    assert scores.numbers([scores.state()]).confused == pairs
    assert scores.numbers([scores.state()], most=2).confused == pairs[:2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_type_are_counted(dtype: torch.dtype) -> None:
    truth, found = random_picture(1)
    assert torch.equal(
        confusion_matrix(truth.to(dtype), found.to(dtype), 4, ignore=255),
        confusion_matrix(truth, found, 4, ignore=255),
    )
    assert not confusion_matrix(torch.zeros(3, 3, dtype=dtype), found[:3, :3].to(dtype), 4, ignore=-1)[1:].any()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and func is not torch.ops.aten.view.default:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def test_a_large_picture_is_counted_in_pieces_that_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = random_picture(2, height=20, width=31)
    wanted = confusion_matrix(truth, found, 4, ignore=255)
    monkeypatch.setattr(labels, "PIECE", 64)
    with Largest() as largest:
        got = confusion_matrix(truth.to(torch.uint8), found.to(torch.uint8), 4, ignore=255)
    assert torch.equal(got, wanted)
    assert largest.bytes <= truth.numel()  # its own bytes; int64 labels of all of it would be eight times as many


def test_labels_without_a_class_or_of_another_size_are_named() -> None:
    scores, good = LabelScores(NAMES), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"true labels are \[-1, 7\], wanted 0 to 3, or 255 for what does not count"):
        scores.add(torch.tensor([[7, -1], [7, 255]]), good)
    with pytest.raises(ValueError, match=r"labels that were found are \[4\], wanted 0 to 3"):
        scores.add(good, torch.tensor([[0, 4], [1, 1]]))
    with pytest.raises(ValueError, match=r"found of \[1, 4\] pixels, wanted the picture's \[2, 2\]"):
        scores.add(good, good.view(1, 4))
    assert not scores.state().any()
    assert math.isclose(scores.add(good, good), 1)
