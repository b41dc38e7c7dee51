import copy
import dataclasses
import itertools
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster, mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synchromesh.data.annotation import Annotation
from synchromesh.data.instances import Instances
from synchromesh.data.scores.boxes import ObjectNumbers, ObjectScores, annotations_of
from synchromesh.data.scores.coco import TWELVE
from synchromesh.data.scores.rle import encoded
from synchromesh.errors import InputError

CLASSES = ("cat", "dog", "owl", "elk")
BOX = (0.0, 0.0, 10.0, 10.0)
FAR = (20.0, 20.0, 30.0, 30.0)


def thing(label: int, box: tuple[float, ...], **more: Any) -> Annotation:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return Annotation(tuple(box), label, **{"area": area, **more})


def results(*found: tuple[int, tuple[float, ...], float]) -> Instances:
    boxes = torch.tensor([box for _, box, _ in found]).reshape(-1, 4)
    labels = torch.tensor([label for label, *_ in found], dtype=torch.int64)
    return Instances(boxes, labels, torch.tensor([score for *_, score in found]))


Picture = tuple[Sequence[Annotation], Instances]


def scored(*pictures: Picture) -> ObjectNumbers:
    scores = ObjectScores(CLASSES)
    for truth, found in pictures:
        scores.add(truth, found, height=64, width=64)
    return scores.numbers([scores.state()])


def first_three(numbers: ObjectNumbers) -> list[float | None]:
    return [numbers.boxes.twelve[name] for name in ("AP", "AP50", "AP75")]


def test_what_is_all_found_scores_one_and_classes_that_nowhere_are_score_nothing() -> None:
    small = (1.0, 1.0, 3.0, 3.0)
    got = scored(
        ([thing(0, BOX)], results((0, BOX, 0.9))),
        ([thing(1, FAR), thing(0, small)], results((0, small, 0.8), (1, FAR, 0.7))),
    )
    assert first_three(got) == [1, 1, 1]
    assert got.boxes.by_class == {"cat": 1, "dog": 1, "owl": None, "elk": None}
    assert got.objects == 3


def test_a_box_counts_at_the_thresholds_that_its_overlap_reaches() -> None:
    flat = (0.0, 0.0, 10.0, 7.2)  # IoU 0.72: right at 0.50, 0.55, 0.60, 0.65 and 0.70
    assert first_three(scored(([thing(0, BOX)], results((0, flat, 0.5))))) == [pytest.approx(0.5), 1, 0]


def test_a_wrong_box_that_is_surer_costs_precision() -> None:
    got = scored(([thing(0, BOX)], results((0, FAR, 0.9), (0, BOX, 0.5))))
    assert first_three(got)[0] == pytest.approx(0.5)


def test_the_right_box_of_the_wrong_class_or_picture_is_wrong() -> None:
    assert first_three(scored(([thing(0, BOX)], results((1, BOX, 1.0)))))[0] == 0
    swapped = scored(([thing(0, BOX)], results((0, FAR, 1.0))), ([thing(0, FAR)], results((0, BOX, 1.0))))
    assert first_three(swapped)[0] == 0


def test_nothing_found_is_zero_and_nothing_to_find_is_no_number() -> None:
    missed = scored(([thing(0, BOX)], results()))
    assert missed.boxes.by_class == {"cat": 0, "dog": None, "owl": None, "elk": None}
    assert [missed.boxes.twelve[name] for name in ("AP", "AR100", "APs", "APm")] == [0, 0, 0, None]
    assert missed.boxes.curves["IoU 0.50"][0] == (0.0, 0.0)
    for empty in (scored(([], results((0, BOX, 1.0)))), scored(), scored(([], results()))):
        assert set(empty.boxes.twelve.values()) == set(empty.boxes.by_class.values()) == {None}
        assert empty.boxes.curves == {}


def test_an_object_that_is_ignored_is_not_missed_and_takes_one_result() -> None:
    hard = thing(0, FAR, ignored=True)
    assert first_three(scored(([thing(0, BOX), hard], results((0, BOX, 0.5))))) == [1, 1, 1]
    assert first_three(scored(([thing(0, BOX), hard], results((0, BOX, 0.5), (0, FAR, 0.9))))) == [1, 1, 1]
    twice = scored(([thing(0, BOX), hard], results((0, BOX, 0.5), (0, FAR, 0.9), (0, FAR, 0.8))))
    assert first_three(twice)[0] == pytest.approx(0.5)
    assert scored(([hard], results((0, FAR, 0.9)))).boxes.by_class["cat"] is None
    assert twice.objects == 1


def test_a_crowd_is_not_missed_and_takes_all_results_that_lie_in_it() -> None:
    crowd = thing(0, FAR, crowd=True, ignored=True)
    inside = [(0, (20.0 + n, 20.0, 24.0 + n, 24.0), 0.9) for n in range(4)]
    assert first_three(scored(([thing(0, BOX), crowd], results((0, BOX, 0.5), *inside)))) == [1, 1, 1]
    outside = scored(([thing(0, BOX), crowd], results((0, BOX, 0.5), (0, (40.0, 40.0, 44.0, 44.0), 0.9))))
    assert first_three(outside)[0] == pytest.approx(0.5)
    flagged = thing(0, FAR, crowd=True)  # by a reader that leaves `ignored` to the difficult ones
    assert first_three(scored(([thing(0, BOX), flagged], results((0, BOX, 0.5), *inside)))) == [1, 1, 1]


def test_the_area_of_an_object_says_which_size_it_has() -> None:
    numbers = scored(([thing(0, BOX, area=40.0**2)], results((0, BOX, 0.5)))).boxes.twelve
    assert (numbers["APs"], numbers["APm"], numbers["APl"]) == (None, 1, None)


def test_objects_of_which_only_boxes_are_known_have_the_area_of_their_boxes() -> None:
    truth = Instances(torch.tensor([[1.0, 2.0, 41.0, 42.0]]), torch.tensor([2]))
    (one,) = annotations_of(truth)
    assert (one.box, one.label, one.area) == ((1, 2, 41, 42), 2, 1600)
    found = dataclasses.replace(truth, scores=torch.tensor([0.5]))
    assert scored(([one], found)).boxes.twelve["APm"] == 1


def directly(pictures: Sequence[Any], kind: str) -> tuple[list[float], list[float]]:
    """The twelve numbers, and AP by class, by faster-coco-eval alone, from files as COCO has them."""
    truth = {
        "images": [{"id": one.number, "height": one.height, "width": one.width} for one in pictures],
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES)],
        "annotations": [
            {
                "id": obj.number + 1, "image_id": one.number, "category_id": obj.label, "iscrowd": int(obj.crowd),
                "bbox": [*obj.box[:2], obj.box[2] - obj.box[0], obj.box[3] - obj.box[1]], "area": obj.area,
                "segmentation": mask.encode(np.asfortranarray(obj.region.mask(one.height, one.width), dtype=np.uint8)),
            }
            for one in pictures for obj in one.truth
        ],
    }  # fmt: skip
    found = [
        {"image_id": one.number, "category_id": label, "score": score,
         **({"bbox": [left, top, right - left, bottom - top]} if kind == "bbox" else {"segmentation": rle})}
        for one in pictures
        for label, score, (left, top, right, bottom), rle in zip(
            one.found.labels.tolist(), one.found.scores.tolist(), one.found.boxes.tolist(),
            mask.encode(np.asfortranarray(one.found.masks.permute(1, 2, 0).numpy(), dtype=np.uint8)), strict=True,
        )
    ]  # fmt: skip
    gt = COCO(truth)
    judge = COCOeval_faster(gt, gt.loadRes(found), kind, print_function=lambda *_: None)
    judge.run()
    precision = judge.eval["precision"][:, :, :, 0, -1]
    return list(judge.stats), [float(precision[:, :, n].mean()) for n in range(len(CLASSES))]


def over_ranks(parts: Sequence[Sequence[Any]], *, numbered: bool = True) -> ObjectNumbers:
    ranks = []
    for own in parts:
        scores = ObjectScores(CLASSES, masks=True)
        for one in own:
            number = one.number if numbered else None
            scores.add(one.truth, one.found, height=one.height, width=one.width, number=number)
        ranks.append(pickle.loads(pickle.dumps(scores.state())))
    return ObjectScores(CLASSES, masks=True).numbers(ranks)


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_are_those_of_faster_coco_eval_on_one_process(pictures: Callable[..., Any], seed: int) -> None:
    known = [  # it knows no objects that are to be ignored and are no crowd
        dataclasses.replace(one, truth=tuple(obj for obj in one.truth if obj.crowd or not obj.ignored))
        for one in pictures(30, seed)
    ]
    got = over_ranks([known])
    assert got.masks is not None
    for kind, own in (("bbox", got.boxes), ("segm", got.masks)):
        wanted, by_class = directly(copy.deepcopy(known), kind)
        assert [-1 if own.twelve[name] is None else own.twelve[name] for name in TWELVE] == wanted
        assert [-1 if ap is None else ap for ap in own.by_class.values()] == pytest.approx(by_class)
    assert got.boxes.twelve != got.masks.twelve
    for own in (got.boxes, got.masks):
        assert 0 < own.twelve["AP"] < 1
        assert None not in own.twelve.values()


@pytest.mark.parametrize("numbered", [True, False])
def test_neither_ranks_nor_their_order_nor_that_of_pictures_change_a_number(
    pictures: Callable[..., Any], numbered: bool
) -> None:
    own = pictures(6, 5)
    wanted = over_ranks([own], numbered=numbered)
    halves = [own[::2], own[1::2]]
    thirds = [own[4:], [], own[:4][::-1]]
    for parts in (*itertools.permutations(halves), *itertools.permutations(thirds)):
        assert over_ranks(parts, numbered=numbered) == wanted


def test_equal_scores_stand_in_the_order_of_the_numbers_of_their_pictures() -> None:
    hit, miss = ([thing(0, BOX)], results((0, BOX, 0.5))), ([], results((0, BOX, 0.5)))
    for numbers, wanted in (((3, 7), 1.0), ((7, 3), 0.5)):
        scores = ObjectScores(CLASSES)
        for (truth, found), number in zip((hit, miss), numbers, strict=True):
            scores.add(truth, found, height=64, width=64, number=number)
        assert scores.numbers([scores.state()]).boxes.twelve["AP50"] == pytest.approx(wanted)


def test_nor_does_their_order_where_pictures_differ_in_their_masks_only(pictures: Callable[..., Any]) -> None:
    one = pictures(1, 8)[0]
    true = next(obj for obj in one.truth if not obj.ignored)
    found, pixels = results((true.label, true.box, 0.5)), torch.from_numpy(true.region.pixels)[None]
    right, wrong = encoded(pixels), encoded(~pixels)
    numbers = []
    for masks in ((right, wrong), (wrong, right)):
        scores = ObjectScores(CLASSES, masks=True)
        for rles in masks:
            scores.add([true], found, height=one.height, width=one.width, rles=rles)
        numbers.append(scores.numbers([scores.state()]))
    assert numbers[0] == numbers[1]


def overlap(result: list[float], box: Sequence[float], *, crowd: bool) -> float:
    width = min(result[2], box[2]) - max(result[0], box[0])
    height = min(result[3], box[3]) - max(result[1], box[1])
    both = max(0.0, width) * max(0.0, height)
    one, other = ((each[2] - each[0]) * (each[3] - each[1]) for each in (result, box))
    return both / (one if crowd else one + other - both)


def average_precision_by_loops(pictures: Sequence[Any], label: int, least: float) -> float | None:
    """Match by falling score, objects that count before those that do not; then precision at 101 recalls."""
    told, wanted = [], 0
    for one in pictures:
        own = [obj for obj in one.truth if obj.label == label]
        wanted += sum(not (obj.crowd or obj.ignored) for obj in own)
        taken: set[int] = set()
        found = zip(one.found.scores.tolist(), one.found.boxes.tolist(), one.found.labels.tolist(), strict=True)
        for score, box, of in sorted(found, key=lambda each: -each[0]):
            if of != label:
                continue
            match, verdict = None, False
            for counts in (True, False):
                best = least
                for n, obj in enumerate(own):
                    free = obj.crowd or n not in taken
                    share = overlap(box, obj.box, crowd=obj.crowd)
                    if (not (obj.crowd or obj.ignored)) == counts and free and share >= best:
                        best, match, verdict = share, n, True if counts else None
                if match is not None:
                    taken.add(match)
                    break
            if verdict is not None:
                told.append((score, verdict))
    if not wanted:
        return None
    told.sort(key=lambda each: -each[0])
    right = [sum(hit for _, hit in told[: n + 1]) for n in range(len(told))]
    points = [(hits / wanted, hits / (n + 1)) for n, hits in enumerate(right)]
    best_from = [max((p for r, p in points if r >= at / 100), default=0.0) for at in range(101)]
    return sum(best_from) / 101


@given(st.integers(0, 100_000))
@settings(max_examples=25)
def test_average_precision_at_one_overlap_is_its_definition(pictures: Callable[..., Any], seed: int) -> None:
    own = pictures(4, seed)
    got = over_ranks([own]).boxes
    for name, least in (("AP50", 0.5), ("AP75", 0.75)):
        by_class = [average_precision_by_loops(own, label, least) for label in range(len(CLASSES))]
        there = [ap for ap in by_class if ap is not None]
        assert got.twelve[name] == (pytest.approx(sum(there) / len(there)) if there else None)
    for name, least in (("IoU 0.50", 0.5), ("IoU 0.75", 0.75)):
        there = [ap for n in range(4) if (ap := average_precision_by_loops(own, n, least)) is not None]
        area = sum(precision for _, precision in got.curves[name]) / 101 if there else 0
        assert area == pytest.approx(sum(there) / max(1, len(there)))


def test_curves_say_the_best_precision_at_each_recall_or_a_higher_one() -> None:
    got = scored(([thing(0, BOX), thing(0, FAR)], results((0, BOX, 0.9), (0, (50.0, 50.0, 60.0, 60.0), 0.8))))
    curve = dict(got.boxes.curves["IoU 0.50"])
    assert list(curve) == [n / 100 for n in range(101)]
    assert (curve[0.0], curve[0.5], curve[0.51]) == (1, 1, 0)


def test_a_state_holds_no_pixels(pictures: Callable[..., Any]) -> None:
    (one,) = pictures(1, 8)
    assert len(one.found) > 2
    scores = ObjectScores(CLASSES, masks=True)
    scores.add(one.truth, one.found, height=one.height, width=one.width)
    (seen,) = scores.state()
    tensors = [v for drawn in (seen.truth, seen.found) for v in vars(drawn).values() if isinstance(v, Tensor)]
    assert max(tensor.numel() for tensor in tensors) == 4 * max(len(one.found), len(one.truth))
    assert len(pickle.dumps(scores.state())) < one.found.masks.numel()


def test_masks_may_come_as_run_lengths(pictures: Callable[..., Any]) -> None:
    scores, same = ObjectScores(CLASSES, masks=True), ObjectScores(CLASSES, masks=True)
    for one in pictures(5, 2):
        size = {"height": one.height, "width": one.width}
        scores.add(one.truth, one.found, **size)
        bare = dataclasses.replace(one.found, masks=None)
        same.add(one.truth, bare, rles=encoded(one.found.masks), **size)
    assert scores.numbers([scores.state()]) == same.numbers([same.state()])


def test_what_cannot_be_scored_is_refused_with_the_reason() -> None:
    boxes, masks = ObjectScores(CLASSES), ObjectScores(CLASSES, masks=True)
    size = {"height": 8, "width": 8}
    with pytest.raises(ValueError, match="has no scores"):
        boxes.add([], Instances.none(), **size)
    with pytest.raises(ValueError, match=r"a result has a label beyond the 4 classes: \[4\]"):
        boxes.add([], results((4, BOX, 0.5)), **size)
    with pytest.raises(ValueError, match="an object has a label beyond the 4 classes"):
        boxes.add([thing(-1, BOX)], results(), **size)
    with pytest.raises(ValueError, match="annotation 17 has no region"):
        masks.add([thing(0, BOX, number=17)], results(), **size)
    with pytest.raises(ValueError, match="what was found has no masks"):
        masks.add([], results((0, BOX, 0.5)), **size)
    with pytest.raises(ValueError, match=r"a mask has the size \[8, 9\], wanted that of its picture, \[8, 8\]"):
        masks.add([], results((0, BOX, 0.5)), rles=encoded(torch.ones(1, 8, 9, dtype=torch.bool)), **size)
    with pytest.raises(ValueError, match="there are 2 masks, wanted one of each of the 1 results"):
        masks.add([], results((0, BOX, 0.5)), rles=encoded(torch.ones(2, 8, 8, dtype=torch.bool)), **size)
    for _ in range(2):
        boxes.add([], results(), number=0, **size)
    with pytest.raises(ValueError, match=r"more than once, wanted each once: numbers \[0\]"):
        boxes.numbers([boxes.state()])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"pip install 'synchromesh\[vision\]'"):
        scored(([thing(0, BOX)], results()))
    with pytest.raises(InputError, match=r"pip install 'synchromesh\[vision\]'"):
        encoded(torch.ones(1, 2, 2, dtype=torch.bool))
