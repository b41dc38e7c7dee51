import pytest
import torch

from synchromesh.kernels import CPU, REFERENCE


@pytest.mark.parametrize("num_experts", [1, 255, 256, 300, 70_000])
def test_every_width_of_the_sorted_key(num_experts):
    ids = torch.randint(-1, num_experts, (50, 2))
    for got, wanted in zip(CPU.positions(ids, num_experts), REFERENCE.positions(ids, num_experts), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("bad", "named"), [(4, "expert id 4"), (-2, "expert id -2")])
def test_an_id_out_of_range_is_named(bad, named):
    with pytest.raises(ValueError, match=named):
        CPU.positions(torch.tensor([[0], [bad]]), 4)
