import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights, quantize
from synchromesh.kernels.fused_mlp.few import is_few
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.quantized_mlp.reference import LARGEST
from synchromesh.testing.cases import row_map_of, zipf
from synchromesh.testing.compare import assert_close, check

WIDTH, HIDDEN = 150, 37
NUMBERS = pytest.mark.parametrize("numbers", list(LARGEST), ids=str)


def quantized_of(experts, numbers, *, gated, biased):
    names = ["up", "down"] + ["gate"] * gated
    parts = {name: torch.randn(experts, HIDDEN, WIDTH) / WIDTH**0.5 for name in names}
    if biased:
        parts |= {"up_bias": torch.randn(experts, HIDDEN), "down_bias": torch.randn(experts, WIDTH)}
        parts |= {"gate_bias": torch.randn(experts, HIDDEN)} if gated else {}
    return quantize(MLPWeights(**parts), numbers)


@NUMBERS
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_few_tokens(numbers, gated, biased, dtype):
    ids = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 7]])
    mlp = quantized_of(9, numbers, gated=gated, biased=biased)
    for rowmap in (row_map_of(ids, 9), row_map_of(ids, 9, capacity=1), row_map_of(ids[:0], 9)):
        assert is_few(len(rowmap.pairs), 9)
        x, weights = torch.randn(len(rowmap.rows), WIDTH).to(dtype), torch.rand(len(rowmap.rows), 2)
        wanted = REFERENCE.quantized_mlp(x, weights, rowmap, mlp, F.silu)
        assert_close("y", TRITON.quantized_mlp(x, weights, rowmap, mlp, F.silu), wanted)


@NUMBERS
def test_many_tokens_an_unknown_activation_and_gradients(numbers):
    mlp = quantized_of(4, numbers, gated=True, biased=True)
    for tokens, activation in ((60, F.silu), (3, torch.sin), (3, F.silu)):
        rowmap = row_map_of(zipf(tokens, 4, 2), 4)
        inputs = {"x": torch.randn(tokens, WIDTH), "weights": torch.rand(tokens, 2)}
        run = [
            lambda x, weights, k=k, r=rowmap, a=activation: k.quantized_mlp(x, weights, r, mlp, a)
            for k in (TRITON, REFERENCE)
        ]
        check(*run, inputs)
        assert_close("y", *(function(**inputs) for function in run))
