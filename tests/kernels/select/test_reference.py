import math

import pytest
import torch

from synchromesh.kernels import REFERENCE
from synchromesh.kernels.select.reference import GATES
from synchromesh.testing.compare import assert_close

SELECT = REFERENCE.select


@pytest.mark.parametrize("k", [1, 3, 6])
def test_weights_by_their_formulas(k):
    logits = torch.randn(7, 6, dtype=torch.float64)
    p, s = logits.exp() / logits.exp().sum(1, keepdim=True), 1 / (1 + (-logits).exp())
    for gate, scores in (("softmax", p), ("sigmoid", s), ("softmax_of_selected", p)):
        got, ids, weights, *_ = SELECT(logits, k, gate=gate)
        best = scores.sort(dim=1, descending=True).values[:, :k]
        chosen = logits.sort(dim=1, descending=True).values[:, :k].exp()
        assert_close("scores", got, scores)
        assert torch.equal(scores.gather(1, ids), best)
        wanted = chosen / chosen.sum(1, keepdim=True) if gate == "softmax_of_selected" else best
        assert_close("weights", weights, wanted)
        normalized = SELECT(logits, k, gate=gate, normalize=True)[2]
        assert_close("normalized", normalized, wanted / wanted.sum(1, keepdim=True) if k > 1 else wanted)


@pytest.mark.parametrize("gate", GATES)
def test_a_bias_decides_who_is_selected_and_never_the_weights(gate):
    logits, bias = torch.randn(7, 6), torch.tensor([0.0, 0, 9, 0, 0, 0])
    scores, ids, weights, *_ = SELECT(logits, 1, gate=gate, bias=bias)
    assert (ids == 2).all()
    assert_close("weights", weights[:, 0], torch.ones(7) if gate == "softmax_of_selected" else scores[:, 2])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_token_without_finite_logits_has_no_weight_and_no_other_token_notices(gate, broken):
    logits = torch.randn(4, 5)
    wanted = SELECT(logits, 2, gate=gate)[2]
    logits[1, 3] = broken
    weights = SELECT(logits, 2, gate=gate)[2]
    assert weights[1].isnan().all()
    assert torch.equal(weights[[0, 2, 3]], wanted[[0, 2, 3]])


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_scores_and_counts_of_first_and_of_all_choices(k, tokens, dtype):
    scores, ids, _, sums, counts = SELECT(torch.randn(tokens, 6, dtype=dtype), k, gate="sigmoid")
    assert_close("sums", sums, torch.stack([scores[:, e].sum() for e in range(6)]))
    assert counts.tolist() == [[int((ids[:, :n] == e).sum()) for e in range(6)] for n in (1, k)]
    assert SELECT(scores, k, gate="sigmoid", sums=False)[3:] == (None, None)
