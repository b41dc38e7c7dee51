import random
from collections import Counter

import torch

from synchromesh.tasks.label_confusion import MOST_IN_MATRIX, SHOWN, Mistakes, class_sheet, confusion_panel
from synchromesh.training.panels import Matrix, Sheet


def of_pairs(pairs: list[tuple[int, int]], names: list[str]) -> tuple[dict, list[dict]]:
    """Return what scores tell of pairs (true, taken): of each class, and the mistakes."""
    mistakes = Mistakes(len(names))
    for first in range(0, len(pairs), 7):
        labels, taken = torch.tensor(pairs[first : first + 7]).unbind(1)
        mistakes.add(labels, taken)
    classes = {}
    for number, name in enumerate(names):
        own = [taken for true, taken in pairs if true == number]
        classes[name] = {"images": len(own), "accuracy": own.count(number) / max(1, len(own))}
    return classes, mistakes.listed(names)


def drawn(count: int, classes: int) -> tuple[list[tuple[int, int]], list[str]]:
    rng = random.Random(5)
    return [(rng.randrange(classes), rng.randrange(classes)) for _ in range(count)], [f"c{i}" for i in range(classes)]


def test_each_cell_of_the_matrix_counts_its_pair_of_classes() -> None:
    pairs, names = drawn(200, 6)
    (matrix,) = confusion_panel(*of_pairs(pairs, names))
    counted = Counter(pairs)
    assert isinstance(matrix, Matrix)
    assert matrix.names == tuple(names)
    assert matrix.counts == tuple(tuple(counted[true, taken] for taken in range(6)) for true in range(6))


def test_many_classes_have_a_list_of_their_most_frequent_mistakes() -> None:
    pairs, names = drawn(3000, MOST_IN_MATRIX + 1)
    (sheet,) = confusion_panel(*of_pairs(pairs, names))
    counted = Counter((names[true], names[taken]) for true, taken in pairs if true != taken)
    assert isinstance(sheet, Sheet)
    assert [int(times) for *_, times in sheet.rows] == sorted(counted.values(), reverse=True)[:SHOWN]
    assert all(counted[true, taken] == int(times) for true, taken, times in sheet.rows)


def test_there_is_no_matrix_where_nothing_was_wrong() -> None:
    pairs = [(number % 3, number % 3) for number in range(9)]
    assert confusion_panel(*of_pairs(pairs, ["a", "b", "c"])) == ()


def test_precision_is_of_what_was_taken_for_a_class_and_accuracy_of_what_belongs_to_it() -> None:
    pairs = [(0, 0)] * 3 + [(0, 1)] + [(1, 1)] * 4 + [(2, 1)] * 2
    sheet = class_sheet(*of_pairs(pairs, ["a", "b", "c"]), most=2)
    assert sheet.title == "The 2 hardest of 3 classes"
    assert sheet.rows == (("c", "2", "0.0%", "-", "b (2)"), ("a", "4", "75.0%", "100.0%", "b (1)"))
    whole = class_sheet(*of_pairs(pairs, ["a", "b", "c"]), most=3)
    assert whole.rows[2] == ("b", "4", "100.0%", "57.1%", "-")
