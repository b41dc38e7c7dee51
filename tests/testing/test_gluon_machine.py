"""Barriers, shared memory and the order of events, without a kernel."""

import pytest
import torch

from synchromesh.testing.gluon_machine import Barrier, Grid, Machine, ProtocolError, Shared


def test_a_phase_ends_when_all_have_arrived_and_all_bytes_are_there():
    barrier = Barrier()
    barrier.init(2)
    assert barrier.passed(1)  # as if one had ended before the first
    assert not barrier.passed(0)
    barrier.landed(64)
    barrier.arrive(1, expected=64)
    assert not barrier.passed(0)
    barrier.arrive(1)
    assert barrier.passed(0)
    assert not barrier.passed(1)
    with pytest.raises(ProtocolError, match="3 arrivals where 2"):
        barrier.arrive(3)


def test_a_block_is_read_when_it_is_there_and_written_when_it_was_read():
    block = Shared.allocated([2, 4], torch.float32).index(1)
    with pytest.raises(ProtocolError, match="has not arrived"):
        block.begin_read(fenced=0)
    block.begin_write()
    block.end_write(torch.ones(4), time=3)
    with pytest.raises(ProtocolError, match="without a fence"):
        block.begin_read(fenced=2)
    block.begin_read(fenced=3)
    with pytest.raises(ProtocolError, match="still reads"):
        block.begin_write()


def test_partitions_wait_for_each_other_and_for_what_lands_later():
    machine, said = Machine(0, haste=0.0), []
    barrier = Barrier()
    barrier.init(1)

    def load():
        machine.later(lambda: barrier.arrive(1))
        said.append("asked")

    def use():
        machine.pause(lambda: barrier.passed(0))
        said.append("used")

    machine.specialize([use, load], [4, 1], [24])
    assert said == ["asked", "used"]


def test_waiting_for_ever_is_an_error_and_leaves_no_thread():
    machine = Machine(0)
    with pytest.raises(ProtocolError, match="deadlock"):
        machine.specialize([lambda: machine.pause(lambda: False), lambda: None], [4, 1], [24])


def test_what_is_in_flight_at_the_end_is_an_error():
    machine = Machine(0, haste=0.0)

    def load():
        machine.later(lambda: None)

    with pytest.raises(ProtocolError, match="1 copies or products in flight"):
        machine.specialize([load], [4], [])


def test_more_registers_than_there_are_is_an_error():
    with pytest.raises(ProtocolError, match="registers"):
        Machine(0).specialize([lambda: None] * 3, [4, 4, 4], [240, 280])


def test_programs_of_a_grid_run_at_once_and_in_another_order_each_time():
    def orders(seed):
        grid, said = Grid(seed), []

        def program(number):
            for _ in range(200):
                said.append(number)
                grid.pause(number)

        grid.run([lambda number=number: program(number) for number in range(2)])
        return said

    assert sorted(orders(0)) == [0] * 200 + [1] * 200
    assert orders(0) not in ([0] * 200 + [1] * 200, [1] * 200 + [0] * 200)
    assert orders(0) == orders(0) != orders(1)


def test_a_broken_program_ends_the_others():
    grid = Grid(0)

    def broken():
        raise ProtocolError("broken")

    def endless():
        while True:
            grid.pause(1)

    with pytest.raises(ProtocolError, match="broken"):
        grid.run([broken, endless])
