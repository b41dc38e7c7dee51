import torch

from synchromesh.kernels.gpu import TRITON


def test_ids_out_of_range_are_absent_pairs():
    places, counts = TRITON.positions(torch.tensor([[0], [4], [-7], [0]]), 4)
    assert places.flatten().tolist() == [0, -1, -1, 1]
    assert counts.tolist() == [2, 0, 0, 0]
