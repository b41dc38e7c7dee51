"""Values and memory of emulated kernels."""

import pytest
import torch

from synchromesh.testing.gluon_machine import ProtocolError
from synchromesh.testing.gluon_memory import Descriptor, Pointer, value_of


def test_values_do_not_change():
    one = value_of(torch.arange(3))
    other = one
    other += 1
    assert one.tolist() == [0, 1, 2]


def test_addresses_outside_a_tensor_are_an_error():
    at = Pointer.to(torch.zeros(4))
    assert at.load(torch.tensor([True, False])[:1]).shape == (1,)
    with pytest.raises(ProtocolError, match=r"addresses 4 \.\. 4 of 4"):
        (at + 4).load()
    with pytest.raises(ProtocolError, match="addresses -1"):
        (at - 1).store(torch.zeros(()))


def test_tma_reads_zeros_outside_and_refuses_odd_steps():
    block = Descriptor(torch.ones(3, 8, dtype=torch.bfloat16), [4, 16]).block([1, 0])
    assert block.sum() == 2 * 8
    with pytest.raises(ProtocolError, match="steps of 16 bytes"):
        Descriptor(torch.ones(3, 9, dtype=torch.bfloat16)[:, :8], [4, 16])


def test_tma_gathers_single_rows_and_zeros_for_those_outside():
    matrix = torch.arange(24).view(3, 8).bfloat16()
    found = Descriptor(matrix, [1, 16]).rows(torch.tensor([2, -1, 0, 3]), 0, 16)
    assert torch.equal(found[:, :8], torch.stack([matrix[2], torch.zeros(8), matrix[0], torch.zeros(8)]).bfloat16())
    assert not found[:, 8:].any()
