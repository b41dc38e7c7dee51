import gc
import threading

import numpy as np
import pytest
import torch

from synchromesh.kernels.pages import HUGE_PAGE, KEPT_FOR, Pages, block_size, pages

MIB = 2**20


def test_what_one_left_the_next_gets():
    own = Pages()
    first = own.take(5 * MIB)
    first[:] = 1
    place, blocks = first.ctypes.data, block_size(5 * MIB)
    assert own.kept_bytes() == 0
    del first
    assert own.kept_bytes() == blocks
    again = own.take(5 * MIB - 100)
    assert again.ctypes.data == place
    assert own.kept_bytes() == 0


def test_memory_that_is_in_use_is_given_to_nobody_else():
    own = Pages()
    view = own.take(4 * MIB)[8:16]  # all that is left of it
    tensor = torch.from_numpy(own.take(4 * MIB)).view(torch.float32)[:10]
    view[:], others = 7, [own.take(4 * MIB) for _ in range(3)]
    tensor.fill_(3.0)
    for other in others:
        other[:] = 0
    assert (view == 7).all()
    assert tensor.eq(3).all()


def test_blocks_that_nobody_asks_for_again_go_back_to_the_kernel():
    own = Pages()
    own.take(64 * MIB)
    assert own.kept_bytes() >= 64 * MIB
    for _ in range(KEPT_FOR + 2):
        own.take(4 * MIB)
    assert own.kept_bytes() == block_size(4 * MIB)
    own.clear()
    assert own.kept_bytes() == 0


@pytest.mark.parametrize("nbytes", [1, HUGE_PAGE, 3 * HUGE_PAGE + 1, 1000 * HUGE_PAGE - 1, 4097 * HUGE_PAGE])
def test_a_block_has_room_to_begin_at_a_huge_page_and_wastes_little(nbytes):
    assert nbytes + HUGE_PAGE <= block_size(nbytes) <= 9 / 8 * (nbytes + 2 * HUGE_PAGE)


def test_memory_begins_at_a_huge_page():
    assert Pages().take(6 * MIB).ctypes.data % HUGE_PAGE == 0


def test_threads_never_share_a_block():
    own, wrong = Pages(), []

    def work(number: int) -> None:
        for _ in range(50):
            mine = own.take(2 * MIB)
            mine[::4096] = number
            if (mine[::4096] != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong


def test_a_process_has_one_store():
    assert pages() is pages()
    assert isinstance(pages().take(8), np.ndarray)
