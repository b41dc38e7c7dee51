import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import network_parts
from synchromesh.testing.compare import assert_close


def test_ids_of_experts_elsewhere_are_absent_pairs():
    ids = torch.tensor([[0, 7], [5, 9], [12, 7]])  # of 9 experts
    mlp = MLPWeights(**network_parts("gated", 9, torch.float32, width=150, hidden=37))
    x, weights = torch.randn(3, 150), torch.rand(3, 2)
    wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
    assert_close("y", TRITON.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


def test_float64_goes_by_the_reference():
    mlp = MLPWeights(**network_parts("biased", 9, torch.float64, width=10, hidden=7))
    ids, x, weights = torch.tensor([[0, 7]]), torch.randn(1, 10).double(), torch.rand(1, 2).double()
    wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
    assert torch.equal(TRITON.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


def test_it_is_for_few_rows_of_each_expert():
    assert TRITON.prefers_direct(64, 16, F.silu)
    assert not TRITON.prefers_direct(65, 16, F.silu)
    assert not TRITON.prefers_direct(4, 16, torch.sin)
