import pytest
import torch
import torch.nn.functional as functional

from synchromesh.kernels import REFERENCE, MLPWeights, quantize
from synchromesh.kernels.mlp import LARGEST
from synchromesh.testing.cases import NETWORKS, network_parts, row_map_of, zipf

E, F, D = 2, 3, 4


def parts(**changes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    shapes = {"up": (E, F, D), "down": (E, F, D), **changes}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("given", "joint", "says"),
    [
        (parts(gate_bias=(E, F)), False, "gate_bias without a gate"),
        (parts(up=(E, 2 * F, D)), False, "up with 6 rows, wanted 3; joint=True"),
        (parts(), True, "up with 3 rows, wanted 6"),
        (parts(up=(E, 2 * F, D), gate=(E, F, D)), True, "joint weights with a gate of their own"),
        (parts(up_scale=(E, F)), False, "scales for some matrices"),
        (parts(gate=(E, F, D), up_scale=(E, F), down_scale=(E, D)), False, "scales for some matrices"),
    ],
)
def test_weights_that_contradict_each_other_are_refused(given, joint, says):
    with pytest.raises(ValueError, match=says):
        MLPWeights(**given, joint=joint)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gate_and_up_are_told_apart_without_a_copy(kind):
    given = network_parts(kind, E, torch.float32, width=D, hidden=F)
    mlp = MLPWeights(**given, joint="joint" in kind)
    apart = mlp.apart()
    assert not apart.joint
    assert (apart.gate is None) == (kind in ("plain", "biased"))
    own = {t.untyped_storage().data_ptr() for t in given.values()}
    assert {t.untyped_storage().data_ptr() for t in apart.tensors() if t is not None} == own
    if "joint" in kind:
        assert torch.equal(torch.cat([apart.gate, apart.up], 1), mlp.up)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_tensors_of_each_expert_are_its_own(kind):
    mlp = MLPWeights(**network_parts(kind, E, torch.float32, width=D, hidden=F), joint="joint" in kind)
    for expert, net in enumerate(mlp.tensors().of_each(E)):
        for own, all_of_them in zip(net, mlp.tensors(), strict=True):
            assert own is None if all_of_them is None else torch.equal(own, all_of_them[expert])


def test_weights_of_8_bits_say_so_and_joint_ones_are_taken_apart_first():
    mlp = MLPWeights(**network_parts("joint", E, torch.float32, width=D, hidden=F), joint=True)
    small = quantize(mlp, torch.int8)
    assert (mlp.quantized, small.quantized, small.joint) == (False, True, False)
    meant = small.dequantized(torch.float32)
    for got, wanted in zip(meant.tensors()[:3], mlp.apart().tensors()[:3], strict=True):
        assert (got - wanted).abs().max() <= wanted.abs().max() / 127


DTYPES = pytest.mark.parametrize("dtype", list(LARGEST), ids=str)
# Half of the distance between neighbours, as a share of the number: 1/2^4 for three digits after the point.
ROUNDING = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}


def weights_of(experts=3, hidden=20, width=12, *, gated=True):
    shapes = {"up": (hidden, width), "down": (hidden, width), "up_bias": (hidden,), "down_bias": (width,)}
    shapes |= {"gate": (hidden, width), "gate_bias": (hidden,)} if gated else {}
    return MLPWeights(**{name: torch.randn(experts, *shape) for name, shape in shapes.items()})


@DTYPES
def test_each_number_is_off_by_half_a_step_of_its_channel_at_most(dtype):
    mlp = weights_of()
    quantized = quantize(mlp, dtype)
    for name, dim in (("up", 2), ("gate", 2), ("down", 1)):
        matrix = getattr(mlp, name)
        assert getattr(quantized, name).dtype == dtype
        error = (getattr(quantized.dequantized(torch.float32), name) - matrix).abs()
        largest = matrix.abs().amax(dim, keepdim=True)
        bound = largest if dtype == torch.int8 else matrix.abs() + largest * 2.0**-13  # small ones are subnormal
        assert (error <= bound * ROUNDING[dtype] * 1.01).all()
    assert torch.equal(quantized.down_bias, mlp.down_bias)


@DTYPES
def test_a_channel_of_zeros_stays_zero(dtype):
    mlp = MLPWeights(up=torch.zeros(1, 4, 4), down=torch.eye(4)[None])
    back = quantize(mlp, dtype).dequantized(torch.float64)
    assert torch.equal(back.up, torch.zeros(1, 4, 4, dtype=torch.float64))
    assert back.down.dtype == torch.float64


@DTYPES
def test_the_smallest_numbers_there_are_vanish_instead_of_overflowing(dtype):
    mlp = MLPWeights(up=torch.full((1, 2, 2), 2e-45), down=torch.ones(1, 2, 2))
    assert (quantize(mlp, dtype).dequantized(torch.float32).up.abs() <= 1e-37).all()


@DTYPES
def test_the_result_is_near_that_of_the_weights_it_came_from(dtype):
    mlp, rowmap = weights_of(hidden=64, width=48), row_map_of(zipf(40, 3, 2), 3)
    x, weights = torch.randn(40, 48), torch.rand(40, 2)
    wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, functional.silu)
    got = REFERENCE.fused_mlp(x, weights, rowmap, quantize(mlp, dtype), functional.silu)
    assert (got - wanted).norm() <= {torch.int8: 0.02, torch.float8_e4m3fn: 0.06}[dtype] * wanted.norm()


def test_other_dtypes_and_broken_weights_are_refused():
    with pytest.raises(ValueError, match=r"got torch.int4.*torch.int8"):
        quantize(weights_of(), torch.int4)
    with pytest.raises(ValueError, match="infinite weights or NaN"):
        quantize(MLPWeights(up=torch.full((1, 2, 2), torch.nan), down=torch.ones(1, 2, 2)), torch.int8)
