import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.fused_mlp.few import is_few
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import NETWORKS, network_parts, row_map_of
from synchromesh.testing.compare import assert_close


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_without_gradients(kind, dtype):
    ids = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 7]])
    mlp = MLPWeights(**network_parts(kind, 9, dtype, width=150, hidden=37), joint="joint" in kind)
    for rowmap in (row_map_of(ids, 9), row_map_of(ids, 9, capacity=1), row_map_of(ids[:0], 9)):
        tokens = len(rowmap.rows)
        assert is_few(len(rowmap.pairs), 9)
        x, weights = torch.randn(tokens, 150).to(dtype), torch.rand(tokens, 2)
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, F.silu)
        assert_close("y", TRITON.fused_mlp(x, weights, rowmap, mlp, F.silu), wanted)


def test_many_rows_of_few_experts_take_tiles():
    """Past 1.5 rows an expert a matrix is read more often than tiles of 16 rows would read it."""
    assert not is_few(513, 1000)
    assert not is_few(25, 16)
    assert is_few(24, 16)
