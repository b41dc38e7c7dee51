import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights, quantize
from synchromesh.kernels.mlp import LARGEST
from synchromesh.testing.cases import NETWORKS, Case, network_parts, zipf
from synchromesh.testing.compare import assert_close

KINDS = pytest.mark.parametrize("kind", NETWORKS)
ABSENT = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 1]])


def mlp_of(kind, experts, dtype, *, width=10, hidden=17):
    parts = network_parts(kind, experts, dtype, width=width, hidden=hidden)
    return MLPWeights(**parts, joint="joint" in kind)


@pytest.mark.parametrize("sizes", [(10, 17), (16, 32), (150, 37)], ids=["odd", "aligned", "wide"])
@KINDS
def test_output(fast, kind, every_dtype, sizes):
    mlp = mlp_of(kind, 9, every_dtype, width=sizes[0], hidden=sizes[1])
    for ids in (ABSENT, ABSENT[:1], ABSENT[2:3], ABSENT[:0]):
        x, weights = torch.randn(len(ids), sizes[0]).to(every_dtype), torch.rand(len(ids), 2)
        for activation in (F.silu, F.gelu):
            wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, activation)
            assert_close("y", fast.direct_mlp(x, weights, ids, mlp, activation), wanted)


def test_output_on_every_case(fast, case: Case, exact):
    if case.capacity is None and case.max_pairs is None:  # nobody drops here
        mlp, x, weights = mlp_of("gated_biased", case.num_experts, exact), case.tokens(10, exact), case.weights(exact)
        wanted = REFERENCE.direct_mlp(x, weights, case.expert_ids, mlp, F.silu)
        assert_close("y", fast.direct_mlp(x, weights, case.expert_ids, mlp, F.silu), wanted)


@pytest.mark.parametrize("numbers", list(LARGEST), ids=str)
@pytest.mark.parametrize("kind", NETWORKS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_of_experts_of_8_bits(fast, kind, numbers, dtype):
    ids, mlp = zipf(8, 6, 2), quantize(mlp_of(kind, 6, torch.float32), numbers)
    x, weights = torch.randn(8, 10).to(dtype), torch.rand(8, 2)
    wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
    assert_close("y", fast.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


def test_weights_that_are_kept_transposed_give_the_same(fast):
    ids, mlp = zipf(30, 6, 2), mlp_of("gated", 6, torch.float32, width=16, hidden=32)
    turned = MLPWeights(*(w if w is None else w.mT.contiguous().mT for w in mlp.tensors()))
    x, weights = torch.randn(30, 16), torch.rand(30, 2)
    assert_close("y", *(fast.direct_mlp(x, weights, ids, each, F.relu) for each in (turned, mlp)))


def test_experts_that_are_not_in_use_are_not_read(fast):
    mlp = mlp_of("gated_biased", 4, torch.float32, width=16, hidden=32)
    broken = dataclasses.replace(mlp, up=mlp.up.index_fill(0, torch.tensor([2]), torch.nan))
    ids, x, weights = torch.tensor([[0, 1], [3, -1], [-1, -1]]), torch.randn(3, 16), torch.rand(3, 2)
    y = fast.direct_mlp(x, weights, ids, broken, F.gelu)
    assert_close("y", y, REFERENCE.direct_mlp(x, weights, ids, mlp, F.gelu))
    assert torch.equal(y[2], torch.zeros(16))


def test_two_dtypes_are_refused(fast):
    ids, mlp, x = zipf(8, 4, 2), mlp_of("plain", 4, torch.float32), torch.randn(8, 10)
    with pytest.raises(ValueError, match="wanted one dtype"):
        fast.direct_mlp(x.bfloat16(), torch.rand(8, 2), ids, mlp, F.gelu)
