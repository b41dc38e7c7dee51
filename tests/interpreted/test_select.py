import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.select import triton as select_triton
from synchromesh.kernels.select.reference import GATES, counts_of
from synchromesh.moe.losses import LoadBalance
from synchromesh.testing.cases import evil_cases
from synchromesh.testing.compare import assert_close
from synchromesh.types import Routing

NAMES = ("scores", "ids", "weights", "sums", "counts")


def selected(kernels, logits, k, *, of=("scores", "weights", "sums"), **options):
    """Return all that select does, and the gradient that flows through some of it."""
    own, generator = logits.clone().requires_grad_(), torch.Generator().manual_seed(1)
    results = dict(zip(NAMES, kernels.select(own, k, **options), strict=True))
    gradients = [torch.randn(results[name].shape, generator=generator) for name in of]
    gradient = torch.autograd.grad([results[name] for name in of], own, gradients)[0]
    return {**results, "gradient": gradient}


def compare(logits, k, **options):
    """Everything equals the reference's; of tokens with a broken gate, their share of the sums."""
    got, wanted = (selected(kernels, logits, k, **options) for kernels in (TRITON, REFERENCE))
    whole = logits.isfinite().all(1)
    assert_close("sums", got["sums"], wanted["sums"])
    assert torch.equal(got["counts"], counts_of(got["ids"], logits.shape[1]))
    if whole.all():
        assert_close("counts", got["counts"], wanted["counts"])
    for name in ("scores", "ids", "weights", "gradient"):
        assert_close(name, got[name][whole], wanted[name][whole])


def logits_of(case):
    """Let a case's experts be chosen in its order, where it has that many, and break the gate of its NaN tokens."""
    ids = case.expert_ids
    logits = torch.randn(len(ids), case.num_experts, generator=torch.Generator().manual_seed(2)) / 10
    for k in range(ids.shape[1]):
        logits.scatter_add_(1, ids[:, k : k + 1].clamp(min=0), torch.full((len(ids), 1), 3 - k / 2))
    logits[list(case.nan_tokens)] = math.nan
    return logits


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(70, 8, 2), (33, 7, 7), (5, 1, 1), (3, 300, 8), (0, 4, 2)])
def test_scores_choices_weights_and_gradients(gate, normalize, tokens, experts, k):
    compare(torch.randn(tokens, experts), k, gate=gate, normalize=normalize)
    compare(torch.randn(tokens, experts), k, gate=gate, normalize=normalize, bias=torch.randn(experts))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "of", [("scores",), ("weights",), ("sums",), ("scores", "sums"), ("weights", "sums")], ids="+".join
)
def test_gradients_of_some_of_them(gate, of):
    compare(torch.randn(20, 6), 2, of=of, gate=gate, normalize=True)


@pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
def test_every_case(case):
    logits, k = logits_of(case), min(case.expert_ids.shape[1], case.num_experts)
    for gate in GATES:
        compare(logits, k, gate=gate, normalize=True)


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_programs_that_take_several_blocks_and_the_same_bits_twice(programs, monkeypatch):
    small = {"MOST_PROGRAMS": programs, "BLOCK_NUMBERS": 128, "PART_ROWS": 2}  # 5 blocks of 4 tokens
    for name, value in small.items():
        monkeypatch.setattr(select_triton, name, value)
    logits = torch.randn(5 * 4 - 2, 20)
    compare(logits, 3, gate="softmax", normalize=True)
    one, two = (selected(TRITON, logits, 3, gate="softmax") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("tokens", [0, 3, 70])
def test_without_sums_the_rest_is_the_same_to_the_bit(tokens):
    found = []
    for sums in (True, False):
        logits = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(3)).requires_grad_()
        results = TRITON.select(logits, 3, gate="softmax", normalize=True, sums=sums)
        torch.autograd.backward(results[::2][:2], [torch.ones_like(one) for one in results[::2][:2]])
        found.append((*results[:3], logits.grad))
    assert results[3:] == (None, None)
    assert all(map(torch.equal, *found))


def test_a_loss_of_balance_sends_back_a_number_per_expert_and_keeps_no_more_for_it(monkeypatch):
    """Kept are scores, ids and weights, as without the loss, and numbers per expert."""
    sent, op, tokens, experts, k = [], select_triton._select_backward_op, 70, 8, 2

    def spy(scores, ids, weights, gradients, *rest):
        sent.extend(gradients)
        return op(scores, ids, weights, gradients, *rest)

    monkeypatch.setattr(select_triton, "_select_backward_op", spy)
    kept = {}
    logits = torch.randn(tokens, experts, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        scores, ids, weights, *sums = TRITON.select(logits, k, gate="softmax")
        LoadBalance(0.01)(Routing(ids, weights, scores, logits).with_sums(*sums), lambda value: value).backward()
    assert sent[:2] == [None, None]
    assert sent[2].shape == (experts,)
    assert sum(t.numel() for t in kept.values()) <= tokens * (experts + 2 * k) + 10 * experts


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_token_without_finite_logits_has_no_weight_and_no_other_token_notices(gate, broken):
    logits = torch.randn(6, 5)
    wanted = TRITON.select(logits, 2, gate=gate, normalize=True)
    logits[1, 3] = broken
    got = TRITON.select(logits, 2, gate=gate, normalize=True)
    others = [0, 2, 3, 4, 5]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got[:3], wanted[:3], strict=True))
    of_reference = REFERENCE.select(logits, 2, gate=gate, normalize=True)[3]
    assert torch.equal(got[3].isnan(), of_reference.isnan())
    assert torch.equal(got[4], counts_of(got[1], 5))
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
