import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights, quantize
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.compare import assert_close

WIDTH, HIDDEN = 150, 37
IDS = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 9], [12, 7]])  # of 9 experts: some are absent, or of others
KINDS = pytest.mark.parametrize("kind", ["plain", "biased", "gated", "gated_biased", "joint", "joint_biased"])


def mlp_of(kind, dtype):
    names = {"up": (HIDDEN, WIDTH), "down": (HIDDEN, WIDTH)}
    if "gated" in kind:
        names["gate"] = (HIDDEN, WIDTH)
    if "joint" in kind:
        names["up"] = (2 * HIDDEN, WIDTH)
    if "biased" in kind:
        names |= {f"{name}_bias": shape[:1] for name, shape in names.items() if name != "down"}
        names["down_bias"] = (WIDTH,)
    return MLPWeights(**{name: (torch.randn(9, *shape) / WIDTH**0.5).to(dtype) for name, shape in names.items()})


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_few_tokens_without_a_map(kind, dtype):
    mlp = mlp_of(kind, dtype)
    for ids in (IDS, IDS[:1], IDS[2:3], IDS[:0]):
        x, weights = torch.randn(len(ids), WIDTH).to(dtype), torch.rand(len(ids), 2)
        wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
        assert_close("y", TRITON.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


@pytest.mark.parametrize("numbers", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["plain", "gated_biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_to_experts_of_8_bits(kind, numbers, dtype):
    mlp, x, weights = quantize(mlp_of(kind, torch.float32), numbers), torch.randn(6, WIDTH).to(dtype), torch.rand(6, 2)
    wanted = REFERENCE.direct_mlp(x, weights, IDS, mlp, F.gelu)
    assert_close("y", TRITON.direct_mlp(x, weights, IDS, mlp, F.gelu), wanted)


def test_it_is_for_few_rows_of_each_expert():
    assert TRITON.prefers_direct(64, 16, F.silu)
    assert not TRITON.prefers_direct(65, 16, F.silu)
    assert not TRITON.prefers_direct(4, 16, torch.sin)
