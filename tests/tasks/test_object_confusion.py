import dataclasses

import torch

from synchromesh.data.scores.boxes import NO_SIZE, Drawn, Seen
from synchromesh.tasks.object_confusion import confused, confusion_sheet

CLASSES = ("cat", "dog")
LEFT, RIGHT = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]


def seen(truth: list[tuple[int, list[float], float]], found: list[tuple[int, list[float], float]]) -> Seen:
    def drawn(objects: list[tuple[int, list[float], float]]) -> Drawn:
        boxes = torch.tensor([box for _, box, _ in objects]).reshape(-1, 4)
        labels = torch.tensor([label for label, _, _ in objects], dtype=torch.int64)
        return Drawn(boxes, labels, torch.tensor([value for *_, value in objects]))

    return Seen(40, 40, drawn(truth), drawn(found))


def test_what_was_taken_for_another_class_found_in_nothing_or_not_found_is_counted() -> None:
    pictures = [
        seen([(0, LEFT, 100.0), (1, RIGHT, 100.0)], [(0, LEFT, 0.9), (0, RIGHT, 0.8)]),
        seen([(1, RIGHT, 100.0)], [(0, RIGHT, 0.9), (0, LEFT, 0.9), (1, LEFT, 0.1)]),
        seen([(0, LEFT, 100.0)], []),
    ]
    assert confused(pictures, CLASSES, least=0.3) == [
        {"truth": "dog", "found": "cat", "count": 2},
        {"truth": "-", "found": "cat", "count": 1},
        {"truth": "cat", "found": "-", "count": 1},
    ]
    assert confusion_sheet(confused(pictures, CLASSES, least=0.3)).rows[0] == ("dog", "cat", "2")


def test_the_surest_takes_an_object_and_a_second_one_is_too_many() -> None:
    twice = seen([(0, LEFT, 100.0)], [(1, LEFT, 0.5), (0, LEFT, 0.9)])
    assert confused([twice], CLASSES, least=0.3) == [{"truth": "-", "found": "dog", "count": 1}]


def test_ignored_objects_are_neither_missed_nor_confused_however_often_they_are_found() -> None:
    ignored = seen([(0, LEFT, NO_SIZE)], [(1, LEFT, 0.9), (0, LEFT, 0.9)])
    assert confused([ignored, seen([(0, LEFT, NO_SIZE)], [])], CLASSES, least=0.3) == []


def test_what_lies_in_a_crowd_is_no_mistake_however_small_and_an_object_in_it_is_still_missed() -> None:
    crowd = seen([(0, [0.0, 0.0, 40.0, 40.0], NO_SIZE), (1, LEFT, 100.0)], [(0, RIGHT, 0.9), (1, RIGHT, 0.8)])
    truth = dataclasses.replace(crowd.truth, crowd=torch.tensor([True, False]))
    assert confused([dataclasses.replace(crowd, truth=truth)], CLASSES, least=0.3) == [
        {"truth": "dog", "found": "-", "count": 1}
    ]
    far = dataclasses.replace(truth, boxes=torch.tensor([[100.0, 0, 140, 40], LEFT]))
    assert len(confused([dataclasses.replace(crowd, truth=far)], CLASSES, least=0.3)) == 3


def test_an_object_that_can_be_missed_is_matched_before_one_that_is_ignored() -> None:
    both = seen([(0, LEFT, NO_SIZE), (0, [0.0, 0.0, 10.0, 12.0], 120.0)], [(0, LEFT, 0.9)])
    assert confused([both], CLASSES, least=0.3) == []
