import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, REFERENCE, MLPWeights, quantize
from synchromesh.kernels.quantized_mlp.reference import LARGEST
from synchromesh.testing.cases import Case, evil_cases, row_map_of, zipf
from synchromesh.testing.compare import TOLERANCE, assert_close

CASES = [case for case in evil_cases() if case.capacity is None and case.max_pairs is None]  # nobody drops here
KINDS = ["plain", "biased", "gated", "gated_biased", "joint", "joint_biased"]


def mlp_of(kind, experts, dtype, *, width=10, hidden=17):
    names = {"up": (hidden, width), "down": (hidden, width)}
    if "gated" in kind:
        names["gate"] = (hidden, width)
    if "joint" in kind:
        names["up"] = (2 * hidden, width)
    if "biased" in kind:
        names |= {f"{name}_bias": shape[:1] for name, shape in names.items() if name != "down"}
        names["down_bias"] = (width,)
    return MLPWeights(**{name: (torch.randn(experts, *shape) / width**0.5).to(dtype) for name, shape in names.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_definition_is_that_of_fused_mlp_where_nothing_is_dropped(case: Case, kind):
    x, weights, mlp = case.tokens(10, torch.float64), case.weights(torch.float64), mlp_of(kind, 20, torch.float64)
    wanted = REFERENCE.fused_mlp(x, weights, row_map_of(case.expert_ids, 20), mlp, F.silu)
    assert_close("y", REFERENCE.direct_mlp(x, weights, case.expert_ids, mlp, F.silu), wanted)


@pytest.mark.parametrize("sizes", [(10, 17), (16, 32)], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_output_on_every_case(kind, dtype, sizes):
    for case in CASES:
        mlp = mlp_of(kind, case.num_experts, dtype, width=sizes[0], hidden=sizes[1])
        x, weights = case.tokens(sizes[0], dtype), case.weights(dtype)
        for activation in (F.silu, F.gelu):
            wanted = REFERENCE.direct_mlp(x, weights, case.expert_ids, mlp, activation)
            assert_close(f"y of {case.name}", CPU.direct_mlp(x, weights, case.expert_ids, mlp, activation), wanted)


@pytest.mark.parametrize("numbers", list(LARGEST), ids=str)
@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_of_experts_of_8_bits(kind, numbers, dtype):
    ids, mlp = zipf(30, 6, 2), quantize(mlp_of(kind, 6, torch.float32), numbers)
    x, weights = torch.randn(30, 10).to(dtype), torch.rand(30, 2)
    wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
    assert_close("y", CPU.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


def test_weights_that_are_kept_transposed_give_the_same():
    ids, mlp = zipf(30, 6, 2), mlp_of("gated", 6, torch.float32, width=16, hidden=32)
    turned = MLPWeights(**{n: w if w is None else w.mT.contiguous().mT for n, w in vars(mlp).items()})
    x, weights = torch.randn(30, 16), torch.rand(30, 2)
    assert_close("y", *(CPU.direct_mlp(x, weights, ids, each, F.relu) for each in (turned, mlp)))


def test_experts_that_are_not_in_use_are_not_read_and_ids_of_none_are_refused():
    mlp = mlp_of("gated_biased", 4, torch.float32, width=16, hidden=32)
    broken = dataclasses.replace(mlp, up=mlp.up.index_fill(0, torch.tensor([2]), torch.nan))
    ids, x, weights = torch.tensor([[0, 1], [3, -1], [-1, -1]]), torch.randn(3, 16), torch.rand(3, 2)
    y = CPU.direct_mlp(x, weights, ids, broken, F.gelu)
    assert_close("y", y, REFERENCE.direct_mlp(x, weights, ids, mlp, F.gelu))
    assert torch.equal(y[2], torch.zeros(16))
    for wrong in (4, -2):
        with pytest.raises(ValueError, match=f"got expert id {wrong}, wanted 0 .. 3"):
            CPU.direct_mlp(x, weights, ids.where(ids != 3, wrong), mlp, F.gelu)


def test_autocast_chooses_the_dtype_and_mixed_ones_are_refused():
    ids, mlp, x = zipf(8, 4, 2), mlp_of("plain", 4, torch.float32), torch.randn(8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert CPU.direct_mlp(x, torch.rand(8, 2), ids, mlp, F.gelu).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="wanted one dtype"):
        CPU.direct_mlp(x.bfloat16(), torch.rand(8, 2), ids, mlp, F.gelu)


def test_it_is_for_few_pairs_and_known_activations():
    assert CPU.prefers_direct(512, 8, F.silu)
    assert not CPU.prefers_direct(513, 8, F.silu)
    assert not CPU.prefers_direct(2, 8, torch.sin)
    assert not REFERENCE.prefers_direct(2, 8, F.silu)
