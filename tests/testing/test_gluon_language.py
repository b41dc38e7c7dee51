"""Kernels with one mistake each: the emulator must see every one of them."""

import pytest
import torch

from synchromesh.testing.gluon_language import Descriptor, Pointer, run_kernel, value_of
from synchromesh.testing.gluon_machine import ProtocolError

gluon = pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
hopper = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
launch = pytest.importorskip("synchromesh.kernels.gluon.launch")
mbarrier, fence_async_shared = hopper.mbarrier, hopper.fence_async_shared
warpgroup_mma_wait = hopper.warpgroup_mma_wait


@gluon.jit
def acquired_at_once(free, step, STAGES):
    return step % STAGES


@gluon.jit
def acquired_in_the_wrong_phase(free, step, STAGES):
    slot = step % STAGES
    mbarrier.wait(free.index(slot), (step // STAGES) & 1)
    return slot


@gluon.jit
def arrived_at_once(ready, step, FENCED, STAGES):
    fence_async_shared()
    return step % STAGES


@gluon.jit
def arrived_without_a_fence(ready, step, FENCED, STAGES):
    slot = step % STAGES
    mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
    return slot


@gluon.jit
def released_too_early(free, step, pred, STAGES):
    mbarrier.arrive(free.index(step % STAGES), count=1, pred=pred)


@gluon.jit
def never_released(free, step, pred, STAGES):
    pass


@gluon.jit
def barriers_of_one_more(COUNT, ARRIVALS):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS + 1)
    return made


@gluon.jit
def barriers_of_one(COUNT, ARRIVALS):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=1)
    return made


@gluon.jit
def one_more_outstanding(num_outstanding, deps):
    return warpgroup_mma_wait(num_outstanding=num_outstanding + 1, deps=deps)


MISTAKES = [
    ("acquired", acquired_at_once, "overwritten|arrivals"),
    ("acquired", acquired_in_the_wrong_phase, "deadlock"),
    ("arrived", arrived_at_once, "has not arrived"),
    ("arrived", arrived_without_a_fence, "without a fence"),
    ("released", released_too_early, "overwritten|arrivals|deadlock"),
    ("released", never_released, "deadlock"),
    ("barriers", barriers_of_one_more, "deadlock"),
    ("barriers", barriers_of_one, "arrivals|has not arrived|overwritten"),
    ("warpgroup_mma_wait", one_more_outstanding, "overwritten while a product still reads it"),
]


def opened(monkeypatch, **options):
    """Run the opening product of 70 rows, 10 steps deep: its ring goes round twice and a half."""
    monkeypatch.setattr(
        launch, "started", lambda kernel, programs, **given: run_kernel(kernel, given, programs=1, **options)
    )
    ends = torch.tensor([70], dtype=torch.int32)
    tiles = launch.Tiles(
        *(torch.tensor([n], dtype=torch.int32) for n in (0, 0, 70)), torch.ones(1).int(), torch.zeros(2).int(), 128
    )
    x, up = torch.randn(70, 640).bfloat16(), torch.randn(1, 64, 640).bfloat16()
    pairs = torch.arange(70).flip(0)
    hidden = torch.empty(int(ends[-1]), 64, dtype=torch.bfloat16)
    return launch.opening(x, up, None, tiles, (pairs, 1), "relu", hidden=hidden)


def opened_every_way(monkeypatch, **options):
    return [opened(monkeypatch, haste=haste, **options) for haste in (0.0, 0.05, 0.5)]


@pytest.mark.parametrize(("name", "mistake", "said"), MISTAKES, ids=lambda one: getattr(one, "__name__", ""))
def test_a_mistake_in_the_protocol_is_seen(monkeypatch, name, mistake, said):
    with pytest.raises(ProtocolError, match=said):
        opened_every_way(monkeypatch, replaced={name: mistake})


def test_without_a_mistake_all_is_well(monkeypatch):
    assert all(hidden.isfinite().all() for hidden in opened_every_way(monkeypatch))


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
