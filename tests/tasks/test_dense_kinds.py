import numpy as np
import pytest
import torch

from synchromesh.data.dense_targets import UNKNOWN, dense_targets
from synchromesh.data.panoptic import Segment, SegmentMap
from synchromesh.tasks.dense_kinds import PIXELS, WORKS, DenseKind

NUMBERS = np.array([[0, 0, 0, -1], [0, 1, 1, 0], [0, 1, 1, 0]], dtype=np.int32)
TARGETS = dense_targets(SegmentMap(NUMBERS, (Segment(0, 1), Segment(1, 0))), (True, False))


def said_of(kind: DenseKind) -> torch.Tensor:
    """What a model that is right says."""
    truth = WORKS[kind].truth(TARGETS)
    if kind is DenseKind.SEMANTIC:
        return torch.nn.functional.one_hot(truth.clamp(min=0), 2).permute(2, 0, 1) * 20.0
    return truth[:2] / PIXELS if kind is DenseKind.OFFSETS else (truth[None] * 40.0 - 20)


@pytest.mark.parametrize("kind", WORKS)
def test_who_is_right_loses_nothing_and_scores_best_and_who_is_wrong_does_not(kind: DenseKind):
    work, right = WORKS[kind], said_of(kind)
    assert work.channels(2) == len(right)
    truth = work.truth(TARGETS)[None]
    assert work.count(truth) == (4 if kind is DenseKind.OFFSETS else 11)
    assert work.loss(right[None], truth) < 1e-6
    assert work.loss(-right[None], truth) > 0.1
    scale = PIXELS if kind is DenseKind.OFFSETS else 1.0
    best, worst = (work.score(work.scored(said * scale, truth[0], 2)) for said in (right, -right))
    assert best == pytest.approx(1.0 if work.number.more_is_better else 0.0, abs=1e-6)
    assert worst < 0.7 if work.number.more_is_better else worst == pytest.approx(2 * 0.5**0.5)


@pytest.mark.parametrize("kind", WORKS)
def test_pixels_that_nobody_knows_change_nothing_and_gradients_are_there_without_any(kind: DenseKind):
    work, right = WORKS[kind], said_of(kind).double()
    truth = work.truth(TARGETS)[None]
    strange = right.clone()
    strange[:, 0, 3] += 7
    torch.testing.assert_close(work.loss(strange[None], truth), work.loss(right[None], truth))
    assert torch.equal(work.scored(strange, truth[0], 2), work.scored(right, truth[0], 2))
    nothing = torch.full_like(truth, UNKNOWN)
    said = right[None].requires_grad_()
    total = work.loss(said, nothing)
    assert (float(total.detach()), work.count(nothing)) == (0, 0)
    assert not torch.autograd.grad(total, said)[0].any()
