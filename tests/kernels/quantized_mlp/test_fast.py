import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights, quantize
from synchromesh.kernels.mlp import LARGEST
from synchromesh.testing.cases import NETWORKS, Case, network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close, check

NUMBERS = pytest.mark.parametrize("numbers", list(LARGEST), ids=str)


def quantized_of(kind, experts, numbers, *, width=10, hidden=17):
    return quantize(MLPWeights(**network_parts(kind, experts, torch.float32, width=width, hidden=hidden)), numbers)


@NUMBERS
def test_output(fast, case: Case, numbers, every_dtype):
    x, weights, rowmap = case.tokens(10, every_dtype), case.weights(every_dtype), case.rowmap()
    for kind, activation in (("gated_biased", F.silu), ("plain", F.gelu)):
        mlp = quantized_of(kind, case.num_experts, numbers)
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, activation)
        assert_close("y", fast.fused_mlp(x, weights, rowmap, mlp, activation), wanted)


@NUMBERS
@pytest.mark.parametrize("kind", NETWORKS[:4])
def test_few_tokens(fast, numbers, kind, every_dtype):
    ids = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 7]])
    mlp = quantized_of(kind, 9, numbers, width=150, hidden=37)
    for rowmap in (row_map_of(ids, 9), row_map_of(ids, 9, capacity=1), row_map_of(ids[:0], 9)):
        x, weights = torch.randn(len(rowmap.rows), 150).to(every_dtype), torch.rand(len(rowmap.rows), 2)
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, F.silu)
        assert_close("y", fast.fused_mlp(x, weights, rowmap, mlp, F.silu), wanted)


@NUMBERS
@pytest.mark.parametrize(("tokens", "activation"), [(60, F.silu), (3, torch.sin), (3, F.silu)])
def test_gradients_of_tokens_and_combine_weights(fast, numbers, tokens, activation):
    mlp, rowmap = quantized_of("gated_biased", 4, numbers), row_map_of(zipf(tokens, 4, 2), 4)
    inputs = {"x": torch.randn(tokens, 10), "weights": torch.rand(tokens, 2)}
    run = [lambda x, weights, k=k: k.fused_mlp(x, weights, rowmap, mlp, activation) for k in (fast, REFERENCE)]
    check(*run, inputs)
    assert_close("y", *(function(**inputs) for function in run))


def test_experts_that_are_not_in_use_are_not_read(fast):
    mlp = quantized_of("plain", 4, torch.int8)
    broken = mlp.up_scale.clone()
    broken[2] = torch.nan
    rowmap, x = row_map_of(torch.tensor([[0, 1], [3, -1]]), 4), torch.randn(2, 10)
    y = fast.fused_mlp(x, torch.rand(2, 2), rowmap, dataclasses.replace(mlp, up_scale=broken), F.gelu)
    assert y.isfinite().all()
