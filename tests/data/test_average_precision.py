import pytest
import torch

from synchromesh.data.average_precision import average_precision
from synchromesh.data.instances import Instances

CLASSES = ("cat", "dog", "owl")


def instances(*objects: tuple[int, list[float]], scores: list[float] | None = None) -> Instances:
    boxes = torch.tensor([box for _, box in objects]).reshape(-1, 4)
    labels = torch.tensor([label for label, _ in objects], dtype=torch.int64)
    return Instances(boxes, labels, None if scores is None else torch.tensor(scores))


NOTHING = instances(scores=[])


def test_what_is_all_found_scores_one_and_classes_that_nowhere_are_score_nothing() -> None:
    truth = [instances((0, [0.0, 0, 10, 10])), instances((1, [5.0, 5, 9, 9]), (0, [1.0, 1, 3, 3]))]
    found = [
        instances((0, [0.0, 0, 10, 10]), scores=[0.9]),
        instances((0, [1.0, 1, 3, 3]), (1, [5.0, 5, 9, 9]), scores=[0.8, 0.7]),
    ]
    got = average_precision(truth, found, CLASSES)
    assert (got.ap, got.ap50, got.ap75) == (1, 1, 1)
    assert got.by_class == {"cat": 1, "dog": 1, "owl": None}


def test_a_box_counts_at_the_thresholds_that_its_overlap_reaches() -> None:
    truth = [instances((0, [0.0, 0, 10, 10]))]
    found = [instances((0, [0.0, 0, 10, 7.2]), scores=[0.5])]  # IoU 0.72: right at 0.50, 0.55, 0.60, 0.65 and 0.70
    got = average_precision(truth, found, CLASSES)
    assert (got.ap, got.ap50, got.ap75) == (pytest.approx(0.5), 1, 0)


def test_a_wrong_box_that_is_surer_costs_precision() -> None:
    truth = [instances((0, [0.0, 0, 10, 10]))]
    found = [instances((0, [20.0, 20, 30, 30]), (0, [0.0, 0, 10, 10]), scores=[0.9, 0.5])]
    assert average_precision(truth, found, CLASSES).ap == pytest.approx(0.5)


def test_the_right_box_of_the_wrong_class_or_picture_is_wrong() -> None:
    box = [0.0, 0, 10, 10]
    assert average_precision([instances((0, box))], [instances((1, box), scores=[1.0])], CLASSES).ap == 0
    truth = [instances((0, box)), instances((0, [50.0, 50, 60, 60]))]
    swapped = [instances((0, [50.0, 50, 60, 60]), scores=[1.0]), instances((0, box), scores=[1.0])]
    assert average_precision(truth, swapped, CLASSES).ap == 0


def test_nothing_found_is_zero_and_nothing_to_find_is_no_number() -> None:
    truth = [instances((0, [0.0, 0, 10, 10]))]
    assert average_precision(truth, [NOTHING], CLASSES).by_class == {"cat": 0, "dog": None, "owl": None}
    assert average_precision([instances()], [instances((0, [0.0, 0, 1, 1]), scores=[1.0])], CLASSES).ap is None
    assert average_precision([], [], CLASSES).ap is None
