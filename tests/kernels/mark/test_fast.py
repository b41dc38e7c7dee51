"""NaN weights show in their tokens, and in no others."""

import pytest
import torch

from synchromesh.kernels import REFERENCE

NAN = float("nan")


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("graded", [False, True], ids=["without gradient", "with gradient"])
def test_a_token_with_a_nan_weight_of_a_present_pair_is_nan_and_gives_no_gradient(fast, dtypes, graded):
    weights = torch.tensor([[0.5, NAN, 1.0], [0.1, 0.2, 0.3], [NAN, 0.2, 0.3]], dtype=dtypes[1])
    ids = torch.tensor([[1, 0, 2], [-1, 1, 0], [-1, 1, 0]])
    y = torch.randn(3, 1100, dtype=dtypes[0], requires_grad=graded)
    before = y.detach().clone()
    with torch.set_grad_enabled(graded):
        got = fast.mark(y, weights, ids)
    assert got[0].isnan().all()
    assert torch.equal(got[1:].detach(), before[1:])
    if graded:
        assert torch.equal(y.detach(), before)
        got[1:].sum().backward()
        assert y.grad is not None
        assert y.grad.float().sum(1).tolist() == [0, 1100, 1100]


def test_sizes_of_none_and_another_layout(fast):
    for y in (torch.randn(0, 3), torch.randn(2, 0), torch.randn(3, 2).T):
        weights, ids = torch.full((len(y), 2), NAN), torch.zeros(len(y), 2, dtype=torch.int64)
        with torch.no_grad():
            wanted = REFERENCE.mark(y.clone(), weights, ids)
            assert torch.equal(fast.mark(y, weights, ids).isnan(), wanted.isnan())
