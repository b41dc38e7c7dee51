import pytest
import torch

from synchromesh.kernels.memory import HUGE_FROM, room, room_like


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("nbytes", [0, 64, HUGE_FROM - 64, HUGE_FROM, 3 * HUGE_FROM])
def test_room_is_aligned_writable_and_outlives_its_maker(dtype, nbytes):
    numel = nbytes // dtype.itemsize
    buffer = room((2, numel // 2), dtype)
    assert (buffer.shape, buffer.dtype, buffer.is_contiguous()) == ((2, numel // 2), dtype, True)
    assert buffer.data_ptr() % 16 == 0
    other = room((2, numel // 2), dtype).zero_()
    assert buffer.fill_(1).eq(1).all()
    assert other.eq(0).all()


def test_room_like_keeps_a_transposed_layout():
    large = torch.zeros(2, 1024, 1024).mT
    assert room_like(large).stride() == large.stride()
    small = torch.zeros(2, 3, 4)
    assert room_like(small).stride() == small.stride()
    assert room_like(small[:, :, ::2]).is_contiguous()
