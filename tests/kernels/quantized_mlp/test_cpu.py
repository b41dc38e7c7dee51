import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, REFERENCE, MLPWeights, quantize
from synchromesh.kernels.quantized_mlp.reference import LARGEST
from synchromesh.testing.cases import Case, evil_cases, row_map_of, zipf
from synchromesh.testing.compare import TOLERANCE, assert_close, check

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
WIDTH, HIDDEN = 10, 17


def quantized_of(experts, dtype, *, gated, biased=True):
    names = ["up", "down"] + ["gate"] * gated
    parts = {name: torch.randn(experts, HIDDEN, WIDTH) / WIDTH**0.5 for name in names}
    if biased:
        parts |= {"up_bias": torch.randn(experts, HIDDEN), "down_bias": torch.randn(experts, WIDTH)}
        parts |= {"gate_bias": torch.randn(experts, HIDDEN)} if gated else {}
    return quantize(MLPWeights(**parts), dtype)


@CASES
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("numbers", list(LARGEST), ids=str)
def test_output(case: Case, numbers, dtype):
    x, weights, rowmap = case.tokens(WIDTH, dtype), case.weights(dtype), case.rowmap()
    for gated, activation in ((True, F.silu), (False, F.gelu)):
        mlp = quantized_of(case.num_experts, numbers, gated=gated)
        wanted = REFERENCE.quantized_mlp(x, weights, rowmap, mlp, activation)
        assert_close("y", CPU.quantized_mlp(x, weights, rowmap, mlp, activation), wanted)


@pytest.mark.parametrize("activation", [F.silu, torch.sin], ids=["known", "unknown"])
def test_gradients_of_tokens_and_weights_where_wanted(activation):
    rowmap, mlp = row_map_of(zipf(40, 4, 2), 4), quantized_of(4, torch.int8, gated=True)
    inputs = {"x": torch.randn(40, WIDTH), "weights": torch.rand(40, 2)}
    run = [lambda x, weights, k=k: k.quantized_mlp(x, weights, rowmap, mlp, activation) for k in (CPU, REFERENCE)]
    check(*run, inputs)


def test_autocast_chooses_the_dtype():
    rowmap, mlp = row_map_of(zipf(40, 4, 2), 4), quantized_of(4, torch.int8, gated=False, biased=False)
    x, weights = torch.randn(40, WIDTH), torch.rand(40, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = CPU.quantized_mlp(x, weights, rowmap, mlp, F.gelu)
        wanted = REFERENCE.quantized_mlp(x, weights, rowmap, mlp, F.gelu)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert_close("y", got, wanted)


def test_experts_that_are_not_in_use_are_not_read():
    mlp = quantized_of(4, torch.int8, gated=False)
    broken = mlp.up_scale.clone()
    broken[2] = torch.nan
    rowmap, x = row_map_of(torch.tensor([[0, 1], [3, -1]]), 4), torch.randn(2, WIDTH)
    y = CPU.quantized_mlp(x, torch.rand(2, 2), rowmap, dataclasses.replace(mlp, up_scale=broken), F.gelu)
    assert y.isfinite().all()
