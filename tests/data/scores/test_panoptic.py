from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.detection import PanopticQuality

from synchromesh.data.scores.panoptic import PanopticNumbers, PanopticScores, Quality, Segments

NAMES, THINGS = ("sky", "road", "car", "dog"), (2, 3)


def random_segments(generator: torch.Generator, *, void: bool, crowd: bool, near: Segments | None = None) -> Segments:
    """Rectangles on rectangles; those near others repeat each of their pixels with a chance of 0.8."""
    labels = [0, 1, *torch.randint(2, 4, (4,), generator=generator).tolist()]
    ids = torch.zeros(16, 20, dtype=torch.int64)
    for n in range(1, len(labels)):
        top, left, height, width = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(4))
        ids[top : top + height, left : left + width] = n
    if near is not None:
        labels = near.labels.tolist()
        labels = [labels[0], labels[1], *(5 - one if n == 3 else one for n, one in enumerate(labels[2:]))]
        kept = (torch.rand(16, 20, generator=generator) < 0.8) & (near.ids >= 0)
        ids = torch.where(kept, near.ids, ids)
    if void:
        top, left = torch.randint(0, 10, (2,), generator=generator).tolist()
        ids[top : top + 7, left : left + 9] = -1
    crowds = torch.rand(len(labels), generator=generator) < (0.3 if crowd else 0)
    return Segments(ids, torch.tensor(labels), crowds)


def random_pair(seed: int, *, crowd: bool = True, holes: bool = True) -> tuple[Segments, Segments]:
    generator = torch.Generator().manual_seed(seed)
    truth = random_segments(generator, void=True, crowd=crowd)
    return truth, random_segments(generator, void=holes, crowd=False, near=truth)


def scored(pairs: Sequence[tuple[Segments, Segments]]) -> PanopticNumbers:
    scores = PanopticScores(NAMES, THINGS)
    for truth, found in pairs:
        scores.add(truth, found)
    return scores.numbers([scores.state()])


def colored(segments: Segments) -> Tensor:
    """Class and id of each pixel; void is a class that nobody knows."""
    labels = torch.cat([segments.labels, torch.tensor([99])])
    return torch.stack([labels[segments.ids], segments.ids], dim=-1)[None]


@given(st.integers(0, 100_000))
@settings(max_examples=30)
def test_without_crowds_and_holes_in_what_was_found_it_is_torchmetrics_quality(seed: int) -> None:
    pairs = [random_pair(seed + n, crowd=False, holes=False) for n in range(3)]
    metric = PanopticQuality(
        things=set(THINGS), stuffs={0, 1}, allow_unknown_preds_category=True, return_sq_and_rq=True,
        return_per_class=True,
    )  # fmt: skip
    for truth, found in pairs:
        metric.update(colored(found), colored(truth))
    wanted = metric.compute()  # [class, (pq, sq, rq)], things first
    got = scored(pairs)
    for row, name in zip(wanted.tolist(), ("car", "dog", "sky", "road"), strict=True):
        own = got.by_class[name] or Quality(0.0, 0.0, 0.0)
        assert [own.pq, own.sq, own.rq] == pytest.approx(row)


def quality_by_loops(pairs: Sequence[tuple[Segments, Segments]], label: int) -> Quality | None:
    """The rules of panopticapi, on sets of pixels."""

    def pixels(ids: Tensor, which: int) -> set[tuple[int, int]]:
        return {(y, x) for y, row in enumerate(ids.tolist()) for x, own in enumerate(row) if own == which}

    total, right, wrong, missed = 0.0, 0, 0, 0
    for truth, found in pairs:
        void = pixels(truth.ids, -1)
        true = {n: pixels(truth.ids, n) for n, own in enumerate(truth.labels.tolist()) if own == label}
        given_ = {n: pixels(found.ids, n) for n, own in enumerate(found.labels.tolist()) if own == label}
        crowds = [true[n] for n in true if truth.crowd[n]]
        hit, used = set(), set()
        for n, own in true.items():
            for m, other in given_.items():
                union = (own | other) - (void & other)
                if not truth.crowd[n] and union and len(own & other) / len(union) > 0.5:
                    total, right = total + len(own & other) / len(union), right + 1
                    hit.add(n)
                    used.add(m)
        missed += sum(bool(own) and n not in hit and not truth.crowd[n] for n, own in true.items())
        for m, other in given_.items():
            free = len(other & void) + sum(len(other & crowd) for crowd in crowds)
            wrong += bool(other) and m not in used and free / len(other) <= 0.5
    below = right + wrong / 2 + missed / 2
    return Quality(total / below, total / right if right else 0.0, right / below) if below else None


def as_tuple(quality: Quality | None) -> tuple[float, ...] | None:
    return None if quality is None else (quality.pq, quality.sq, quality.rq)


@given(st.integers(0, 100_000))
@settings(max_examples=20)
def test_the_quality_of_a_class_is_its_definition_with_crowds_and_void(seed: int) -> None:
    pairs = [random_pair(seed + n) for n in range(2)]
    got = scored(pairs)
    each = [quality_by_loops(pairs, label) for label in range(4)]
    for name, wanted in zip(NAMES, each, strict=True):
        assert as_tuple(got.by_class[name]) == (None if wanted is None else pytest.approx(as_tuple(wanted)))
    for own, labels in ((got.all, range(4)), (got.things, (2, 3)), (got.stuff, (0, 1))):
        there = [as_tuple(one) for label in labels if (one := each[label]) is not None]
        means = [sum(values) / len(there) for values in zip(*there, strict=True)]
        assert as_tuple(own) == (pytest.approx(means) if there else None)


def row(*ids: int) -> Tensor:
    return torch.tensor([ids])


def of(ids: Tensor, *labels: int, crowd: tuple[bool, ...] | None = None) -> Segments:
    return Segments(ids, torch.tensor(labels, dtype=torch.int64), None if crowd is None else torch.tensor(crowd))


def counts(truth: Segments, found: Segments) -> list[list[int]]:
    """TP, FP and FN of the class dog."""
    scores = PanopticScores(NAMES, THINGS)
    scores.add(truth, found)
    return scores.state()[1][:, 3].tolist()


def test_one_half_is_no_match_and_more_is_one() -> None:
    assert counts(of(row(0, 0, -1, -1), 3), of(row(0, 0, -1, -1), 3)) == [1, 0, 0]
    assert counts(of(row(0, 0, 0, 1), 3, 2), of(row(-1, 0, 0, 0), 3)) == [0, 1, 1]
    assert counts(of(row(0, 0, 0, 0, 1), 3, 2), of(row(-1, 0, 0, 0, 0), 3)) == [1, 0, 0]
    assert counts(of(row(0, 0), 3), of(row(0, 0), 2)) == [0, 0, 1]


def test_void_of_the_truth_counts_for_nothing_and_void_of_what_was_found_is_missed() -> None:
    assert counts(of(row(0, 0, 0, -1, -1, -1), 3), of(row(0, 0, 0, 0, 0, 0), 3)) == [1, 0, 0]
    assert counts(of(row(1, 1, -1, -1, -1), 3, 2), of(row(-1, 0, 0, 0, 0), 3)) == [0, 0, 0]
    assert counts(of(row(1, 1, -1, -1), 3, 2), of(row(0, 0, 0, 0), 3)) == [0, 1, 0]
    assert counts(of(row(0, 0, 0, 0), 3), of(row(-1, -1, 0, 0), 3)) == [0, 1, 1]


def test_crowds_are_not_missed_and_excuse_what_is_found_in_those_of_its_class() -> None:
    crowd = of(row(0, 0, 0, 1), 3, 2, crowd=(True, False))
    assert counts(crowd, of(row(-1, -1, -1, 0), 2)) == [0, 0, 0]
    assert counts(crowd, of(row(0, 0, 0, -1), 3)) == [0, 0, 0]
    assert counts(crowd, of(row(0, 1, 2, 3), 3, 3, 3, 2)) == [0, 0, 0]
    other = of(row(0, 0, 0, 1), 2, 3, crowd=(True, False))
    assert counts(other, of(row(0, 0, 0, -1), 3)) == [0, 1, 1]
    two = of(row(0, 0, 1, 1, 2, 2, 2), 3, 3, 2, crowd=(True, True, False))
    assert counts(two, of(row(0, 0, 0, 0, 0, 0, 0), 3)) == [0, 0, 0]


def test_segments_without_a_pixel_are_none() -> None:
    assert counts(of(row(0, 0), 3, 3), of(row(0, 0), 3, 3)) == [1, 0, 0]
    assert counts(of(row(-1, -1)), of(row(-1, -1))) == [0, 0, 0]


def test_the_numbers_of_ranks_are_those_of_all_pictures() -> None:
    pairs = [random_pair(seed) for seed in range(7)]
    wanted = scored(pairs)
    for parts in ((pairs[:3], pairs[3:]), ([], pairs[5:], pairs[:5])):
        ranks = [PanopticScores(NAMES, THINGS) for _ in parts]
        for rank, own in zip(ranks, parts, strict=True):
            for truth, found in own:
                rank.add(truth, found)
        got = ranks[0].numbers([rank.state() for rank in ranks])
        assert as_tuple(got.all) == pytest.approx(as_tuple(wanted.all))
        assert got.by_class.keys() == wanted.by_class.keys()
    assert wanted.all is not None
    assert 0.1 < wanted.all.pq < 0.9


def test_classes_that_nowhere_are_have_no_number_and_a_perfect_picture_has_merit_one() -> None:
    scores, one = PanopticScores(NAMES, THINGS), of(row(0, 0, 1, 1), 0, 3)
    assert scores.add(one, one) == 1
    got = scores.numbers([scores.state()])
    perfect = Quality(1.0, 1.0, 1.0)
    assert got == PanopticNumbers(
        perfect, perfect, perfect, {"sky": perfect, "road": None, "car": None, "dog": perfect}
    )
    assert scores.add(of(row(-1, -1)), of(row(-1, -1))) == 1
    assert scores.add(one, of(row(0, 0, -1, -1), 0)) == pytest.approx(1 / 1.5)
    empty = PanopticScores(NAMES, THINGS)
    assert empty.numbers([empty.state()]) == PanopticNumbers(None, None, None, dict.fromkeys(NAMES))


def test_segments_may_have_the_ids_of_a_file() -> None:
    ids = torch.tensor([[0, 70_000], [70_000, 5]], dtype=torch.int32)
    got = Segments.of(ids, {5: 2, 70_000: 3, 9: 1}, crowd=[70_000])
    assert got.labels.tolist() == [2, 3, 1]
    assert got.ids.tolist() == [[-1, 1], [1, 0]]
    assert got.crowd is not None
    assert got.crowd.tolist() == [False, True, False]
    assert Segments.of(ids - 6, {-1: 2, 69_994: 3}, void=-6).ids.tolist() == [[-1, 1], [1, 0]]
    with pytest.raises(ValueError, match=r"pixels have the segments \[5\], wanted one of \[70000\], or 0"):
        Segments.of(ids, {70_000: 3})


def test_segments_without_a_class_or_of_another_size_are_refused() -> None:
    scores, good = PanopticScores(NAMES, THINGS), of(row(0, 0), 3)
    with pytest.raises(ValueError, match=r"segments have the classes \[4\], wanted 0 to 3"):
        scores.add(good, of(row(0, 0), 4))
    with pytest.raises(ValueError, match="pixels have segments from 0 to 1, wanted -1 to 0"):
        scores.add(of(row(0, 1), 3), good)
    with pytest.raises(ValueError, match=r"found of \[1, 3\] pixels, wanted the picture's \[1, 2\]"):
        scores.add(good, of(row(0, 0, 0), 3))
