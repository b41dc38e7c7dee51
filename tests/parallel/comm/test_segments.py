"""Rows in segments change their order whole, on the host and on the device alike."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.parallel.comm.segments import Segments, order_on_device, order_on_host


def sizes_of(first, second, random, *, even):
    return np.array([[2 if even else random.randint(0, 3) for _ in range(second)] for _ in range(first)])


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False), st.booleans())
@settings(deadline=None, max_examples=100)
def test_segments_are_transposed_whole(first, second, random, even):
    sizes = sizes_of(first, second, random, even=even)
    names = [(a, b, i) for a in range(first) for b in range(second) for i in range(sizes[a, b])]
    rows = torch.arange(len(names))[:, None]
    got = [names[int(row)] for row in Segments(sizes, torch.from_numpy(sizes)).transpose(rows)]
    assert got == sorted(names, key=lambda name: (name[1], name[0], name[2]))


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_a_device_finds_the_order_that_the_host_finds(first, second, random):
    sizes = sizes_of(first, second, random, even=False)
    if sizes.sum():
        on_device = order_on_device(torch.from_numpy(sizes), int(sizes.sum()))
        assert np.array_equal(on_device.numpy(), order_on_host(sizes))


@given(st.lists(st.integers(0, 100), min_size=1), st.sampled_from([1, 2, 4, 8]))
def test_pieces_are_even_to_one_row_complete_and_the_same_on_host_and_device(counts, chunks):
    whole = Segments(np.array([counts]), torch.tensor([counts]))
    pieces = [whole.piece(c, chunks) for c in range(chunks)]
    assert all(np.array_equal(one.host, one.device) for one in pieces)
    hosts = np.stack([one.host for one in pieces])
    assert (hosts.sum(0) == counts).all()
    assert (hosts.max(0) - hosts.min(0) <= 1).all()
