import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.select.reference import GATES
from synchromesh.testing.compare import assert_close


def compare(logits, k, *, by=(True, True), **options):
    """Scores, ids, weights and the gradient, of a loss of scores or weights or both, equal the reference's."""
    d_scores, d_weights, found = torch.randn(logits.shape), torch.randn(len(logits), k), []
    for kernels in (TRITON, REFERENCE):
        own = logits.clone().requires_grad_()
        scores, ids, weights = kernels.select(own, k, **options)
        known = weights.nan_to_num() if not logits.isfinite().all() else weights
        ((scores * d_scores).nan_to_num().sum() * by[0] + (known * d_weights).sum() * by[1]).backward()
        found.append((scores, ids, weights, own.grad))
    for name, got, wanted in zip(("scores", "ids", "weights", "gradient"), *found, strict=True):
        assert_close(name, got, wanted)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(70, 8, 2), (33, 7, 7), (5, 1, 1), (3, 300, 8), (0, 4, 2)])
def test_scores_choices_weights_and_gradients(gate, normalize, tokens, experts, k):
    compare(torch.randn(tokens, experts), k, gate=gate, normalize=normalize)
    compare(torch.randn(tokens, experts), k, gate=gate, normalize=normalize, bias=torch.randn(experts))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("by", [(True, False), (False, True)], ids=["scores", "weights"])
def test_gradients_of_one_of_them(gate, by):
    logits = torch.randn(20, 6)
    d, found = torch.randn(20, 6 if by[0] else 2), []
    for kernels in (TRITON, REFERENCE):
        own = logits.clone().requires_grad_()
        scores, _, weights = kernels.select(own, 2, gate=gate, normalize=True)
        ((scores if by[0] else weights) * d).sum().backward()
        found.append(own.grad)
    assert_close("gradient", *found)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_token_without_finite_logits_has_no_weight_and_no_other_token_notices(gate, broken):
    logits = torch.randn(6, 5)
    wanted = TRITON.select(logits, 2, gate=gate, normalize=True)
    logits[1, 3] = broken
    got = TRITON.select(logits, 2, gate=gate, normalize=True)
    others = [0, 2, 3, 4, 5]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, wanted, strict=True))
    assert got[2][1].isnan().all()
    assert len(set(got[1][1].tolist())) == 2
    assert 0 <= int(got[1][1].min()) <= int(got[1][1].max()) < 5


def test_of_equal_scores_the_first_expert_comes_first():
    ids = TRITON.select(torch.zeros(2, 5), 3, gate="softmax")[1]
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_no_expert_is_chosen_twice_whatever_the_bias():
    bias = torch.tensor([float("-inf"), float("-inf"), 0, float("-inf")])
    ids = TRITON.select(torch.randn(5, 4), 3, gate="sigmoid", bias=bias)[1]
    assert all(len(set(row)) == 3 and row[0] == 2 for row in ids.tolist())


def test_more_experts_than_registers_hold_and_float64_go_to_the_reference():
    for logits in (torch.randn(2, 4097), torch.randn(2, 8, dtype=torch.float64)):
        wanted = REFERENCE.select(logits, 2, gate="softmax")
        assert all(torch.equal(a, b) for a, b in zip(TRITON.select(logits, 2, gate="softmax"), wanted, strict=True))


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 40),
    data=st.data(),
    gate=st.sampled_from(GATES),
    normalize=st.booleans(),
)
def test_any_shape(tokens, experts, data, gate, normalize):
    compare(torch.randn(tokens, experts), data.draw(st.integers(1, experts)), gate=gate, normalize=normalize)
