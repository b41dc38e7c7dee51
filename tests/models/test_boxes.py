import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.models.boxes import area, giou, iou, nms, suppressed


def random_boxes(count: int, seed: int) -> torch.Tensor:
    """Boxes with whole corners in 20 x 20 pixels, some of them empty."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (count, 2), generator=generator)
    return torch.cat([corners, corners + torch.randint(0, 9, (count, 2), generator=generator)], dim=1).float()


def pixels(box: torch.Tensor) -> torch.Tensor:
    canvas = torch.zeros(20, 20, dtype=torch.bool)
    left, top, right, bottom = box.int().tolist()
    canvas[top:bottom, left:right] = True
    return canvas


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_iou_is_that_of_the_pixels_that_boxes_cover(seed: int) -> None:
    one, other = random_boxes(5, seed), random_boxes(4, seed + 1)
    found = iou(one, other)
    for i, a in enumerate(map(pixels, one)):
        assert area(one)[i] == a.sum()
        for j, b in enumerate(map(pixels, other)):
            assert found[i, j] == pytest.approx(float((a & b).sum() / (a | b).sum().clamp(min=1)))


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_giou_takes_off_what_the_hull_holds_besides(seed: int) -> None:
    one, other = random_boxes(6, seed), random_boxes(6, seed + 1)
    for got, a, b in zip(giou(one, other), one, other, strict=True):
        hull = pixels(torch.cat([torch.minimum(a[:2], b[:2]), torch.maximum(a[2:], b[2:])])).sum()
        union, both = (pixels(a) | pixels(b)).sum(), (pixels(a) & pixels(b)).sum()
        assert got == pytest.approx(float(both / union.clamp(min=1) - (hull - union) / hull.clamp(min=1)), abs=1e-6)


def test_giou_pulls_boxes_together_that_do_not_touch_and_is_one_only_for_equal_ones() -> None:
    box = torch.tensor([[10.0, 10, 14, 14]], requires_grad=True)
    giou(box, torch.tensor([[0.0, 0, 4, 4]])).sum().backward()
    assert box.grad is not None
    assert (box.grad[0, :2] < 0).all(), "its near corner moves towards the other box"
    assert giou(box, box).item() == pytest.approx(1)


def test_giou_of_large_half_precision_boxes_does_not_overflow() -> None:
    box = torch.tensor([[0.0, 0, 500, 500]], dtype=torch.float16)
    assert giou(box, box).item() == pytest.approx(1)


def greedy(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, most: float) -> list[bool]:
    """The rule as everyone writes it: the best first, each sweeps away what it covers."""
    gone = [False] * len(boxes)
    order = sorted(range(len(boxes)), key=lambda i: (-scores[i], i))
    for place, i in enumerate(order):
        for j in order[place + 1 :]:
            if not gone[i] and labels[i] == labels[j] and iou(boxes[i : i + 1], boxes[j : j + 1]) > most:
                gone[j] = True
    return gone


@given(st.integers(0, 10_000), st.integers(0, 25), st.sampled_from([0.0, 0.3, 0.6]))
@settings(max_examples=60, deadline=None)
def test_suppression_is_the_greedy_rule_also_for_chains_and_equal_scores(seed: int, count: int, most: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = random_boxes(count, seed), torch.randint(0, 2, (count,), generator=generator)
    scores = torch.randint(0, 6, (count,), generator=generator) / 6
    assert suppressed(boxes, scores, labels, most=most).tolist() == greedy(boxes, scores, labels, most)


@given(st.integers(0, 10_000), st.integers(0, 40), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([1, 3, 7, 64]))
@settings(max_examples=80, deadline=None)
def test_suppression_piece_by_piece_keeps_what_the_greedy_rule_keeps_the_best_first(
    seed: int, count: int, most: float, at_once: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    boxes, groups = random_boxes(count, seed), torch.randint(0, 3, (count,), generator=generator)
    scores = torch.randint(0, 6, (count,), generator=generator) / 6
    gone = greedy(boxes, scores, groups, most)
    expected = sorted((i for i in range(count) if not gone[i]), key=lambda i: (-scores[i], i))
    assert nms(boxes, scores, groups, most=most, at_once=at_once).tolist() == expected


def test_suppression_has_the_overlaps_of_a_piece_in_memory_and_not_those_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = []

    def counted(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        pairs.append(len(one) * len(other))
        return iou(one, other)

    monkeypatch.setattr("synchromesh.models.boxes.iou", counted)
    corners = torch.rand(700, 2) * 400
    boxes = torch.cat([corners, corners + 20], dim=1)
    nms(boxes, torch.rand(700), torch.zeros(700, dtype=torch.int64), most=0.5, at_once=100)
    assert 0 < max(pairs) <= 100**2


def test_overlaps_of_boxes_in_a_large_picture_are_exact_enough_to_be_compared() -> None:
    box = torch.tensor([[9_000.0, 9_000, 9_999, 9_990]])
    moved = box + torch.tensor([[1.0, 0, 1, 0]])
    assert iou(box, moved).item() == pytest.approx(998 / 1000, abs=1e-6)
