import pytest
import torch

from synchromesh.data.scores.thresholds import THRESHOLDS, ThresholdScores, best_f, best_iou


def test_both_are_the_best_of_all_thresholds_by_loops_over_pixels_of_all_pictures():
    torch.manual_seed(0)
    pictures = [(torch.rand(5, 6) > 0.6, torch.rand(5, 6), torch.rand(5, 6) > 0.2) for _ in range(3)]
    states = []
    for truth, found, known in pictures:  # one rank for each
        scores = ThresholdScores()
        assert torch.equal(scores.add(truth, found, known), scores.state())
        states.append(scores.state())
    ious, fs = [], []
    for threshold in THRESHOLDS:
        right = wrong = missed = 0
        for picture in pictures:
            for true, found, known in zip(*(one.flatten().tolist() for one in picture), strict=True):
                if known:
                    right += true and found >= threshold
                    wrong += not true and found >= threshold
                    missed += true and found < threshold
        ious.append(right / (right + wrong + missed))
        fs.append(2 * right / (2 * right + wrong + missed))
    assert best_iou(states) == pytest.approx(max(ious))
    assert best_f(states) == pytest.approx(max(fs))


def test_nothing_to_find_and_nothing_found_is_right():
    scores = ThresholdScores()
    scores.add(torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert best_iou([scores.state()]) == best_f([scores.state()]) == 1.0
