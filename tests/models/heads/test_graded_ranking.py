import math

import pytest
import torch
from sklearn.metrics import average_precision_score

from synchromesh.models.heads import graded_ranking
from synchromesh.models.heads.dense_agreement import PixelContrast, Seen
from synchromesh.models.heads.graded_ranking import (
    GradedRanking,
    ObjectFilter,
    graded_average_precision,
    ranked_precision,
)

B, L, D = 3, 5, 4


def drawn(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_targets_of_zero_and_one_give_the_average_precision_of_the_field():
    for seed in range(20):
        scores, targets = drawn(40, seed=seed), (drawn(40, seed=100 + seed) < 0.3).double()
        if targets.any():
            wanted = average_precision_score(targets.numpy(), scores.numpy())
            assert graded_average_precision(scores, targets, temperature=1e-7).item() == pytest.approx(wanted, abs=1e-6)


def test_graded_targets_reach_one_in_their_own_order_alone():
    targets = drawn(12)
    assert graded_average_precision(targets, targets, temperature=1e-7).item() == pytest.approx(1, abs=1e-9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        order = torch.randperm(12, generator=generator)
        if (order != torch.arange(12)).any():
            assert graded_average_precision(targets[order], targets, temperature=1e-7).item() < 0.99


def test_an_increasing_change_of_the_scores_changes_nothing_at_low_temperature():
    scores, targets = drawn(15), drawn(15, seed=2)
    plain, changed = (
        graded_average_precision(s, targets, temperature=1e-9).item() for s in (scores, (3 * scores).exp())
    )
    assert plain == pytest.approx(changed, abs=1e-9)


def by_loops(scores, targets, temperature):
    total, count = 0.0, len(scores)
    for i in range(count):
        above, weighted = 1.0, 1.0
        for j in range(count):
            if j != i:
                before = 1 / (1 + math.exp(-(float(scores[j]) - float(scores[i])) / temperature))
                above += before
                weighted += before * min(1.0, float(targets[j]) / max(1e-3, float(targets[i])))
        total += float(targets[i]) * weighted / above
    return total / float(targets.sum())


def test_it_is_what_loops_say():
    scores, targets = drawn(3, 7), drawn(3, 7, seed=3)
    wanted = [by_loops(s, t, 0.2) for s, t in zip(scores, targets, strict=True)]
    got = graded_average_precision(scores, targets, temperature=0.2)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairs", [1, 100, 2**20])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_parts_give_the_value_and_the_gradient_of_the_definition(monkeypatch, pairs, shape):
    monkeypatch.setattr(graded_ranking, "CPU_PAIRS", pairs)
    targets = drawn(*shape, seed=3)
    targets[..., 2] = 0
    if len(shape) > 1:
        targets.view(-1, 7)[0] = 0
    weights, found = drawn(*(shape[:-1] or (1,)), seed=4), []
    for precision in (graded_average_precision, ranked_precision):
        scores = drawn(*shape).requires_grad_()
        value = precision(scores, targets, temperature=0.2)
        found.append((value, *torch.autograd.grad((value * weights).sum(), scores)))
    assert found[0][1].any()
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


def test_parts_are_not_what_a_transform_sees():
    scores, targets = drawn(3, 5), drawn(3, 5, seed=3)
    found = torch.vmap(lambda s, y: ranked_precision(s, y, temperature=0.2))(scores, targets)
    torch.testing.assert_close(found, graded_average_precision(scores, targets, temperature=0.2))


def test_a_query_without_targets_has_nothing_to_mend():
    scores = drawn(6).requires_grad_()
    found = graded_average_precision(scores, torch.zeros(6, dtype=torch.float64), temperature=0.1)
    found.backward()
    assert found.item() == 1
    assert not scores.grad.any()


def test_one_prototype_makes_all_cells_alike():
    torch.manual_seed(0)
    one = ObjectFilter(D, 1, 0.1).double()
    found = one(drawn(B, L, D))
    torch.testing.assert_close(found, one.prototypes.detach().expand(B, L, D))


def seen(seed=0):
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randn(B, L, D, dtype=torch.float64, generator=generator) for _ in range(4)]
    positive = torch.rand(B, L, L, generator=generator) < 0.3
    return Seen((cells[0].requires_grad_(), cells[1].requires_grad_()), (cells[2], cells[3]), positive)


@pytest.mark.parametrize("prototypes", [0, 3])
@pytest.mark.parametrize("across", [False, True])
def test_gradients_are_those_of_finite_differences(prototypes, across):
    torch.manual_seed(0)
    loss = GradedRanking(prototypes=prototypes, across=across, temperature=0.3).build(D).double()
    given = seen()
    assert torch.autograd.gradcheck(lambda a, b: loss(Seen((a, b), given.twin, given.positive)), given.student)


def test_a_student_that_ranks_as_its_twin_does_has_the_base_loss_left():
    given, config = seen(), GradedRanking(prototypes=0, across=False, temperature=1e-6)
    same = Seen(given.twin, given.twin, given.positive)
    left = config.build(D).double()(same) - PixelContrast().build(D)(same)
    assert left.abs().max() < 0.01


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"sharpness": 0.0}, {"weight": -1.0}, {"prototypes": -1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted temperature"):
        GradedRanking(**wrong)
