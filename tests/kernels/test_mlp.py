import pytest
import torch

from synchromesh.kernels import MLPWeights, quantize
from synchromesh.testing.cases import NETWORKS, network_parts

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
