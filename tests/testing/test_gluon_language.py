"""Kernels with one mistake each: the emulator must see every one of them."""

from functools import partial

import pytest
import torch

from synchromesh.testing.gluon_language import run_kernel
from synchromesh.testing.gluon_machine import ProtocolError

gluon = pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")
gl = pytest.importorskip("triton.experimental.gluon.language")
hopper = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
launch = pytest.importorskip("synchromesh.kernels.gluon.launch")
items = pytest.importorskip("synchromesh.kernels.gluon.items")
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
def received_at_once(items, number):
    numbers, _given, read = items
    slot = number % 4
    e = gl.sum(numbers.index(4 * slot).load(None), 0)
    mbarrier.arrive(read.index(slot), count=1)
    return e, e, e, e


@gluon.jit
def handed_on_at_once(items, number, e, start, end, place):
    numbers, given, _read = items
    slot = number % 4
    numbers.index(4 * slot).store(gl.full([1], e, gl.int32, None))
    mbarrier.arrive(given.index(slot), count=1)


@gluon.jit
def never_committed(barrier):
    pass


@gluon.jit
def one_more_outstanding(num_outstanding, deps):
    return warpgroup_mma_wait(num_outstanding=num_outstanding + 1, deps=deps)


MISTAKES = [
    ("acquired", acquired_at_once, "overwritten|arrivals"),
    ("acquired", acquired_in_the_wrong_phase, "deadlock"),
    ("arrived", arrived_at_once, "has not arrived|nobody has written"),
    ("arrived", arrived_without_a_fence, "without a fence"),
    ("released", released_too_early, "overwritten|arrivals|deadlock"),
    ("released", never_released, "deadlock"),
    ("barriers", barriers_of_one_more, "deadlock"),
    ("barriers", barriers_of_one, "arrivals|has not arrived|overwritten"),
    ("warpgroup_mma_wait", one_more_outstanding, "overwritten while a product still reads it"),
]


SUMS_MISTAKES = [
    ("acquired", acquired_at_once, "overwritten|arrivals|are read before"),
    ("arrived", arrived_at_once, "has not arrived|are read before|nobody has written"),
    ("barriers", barriers_of_one_more, "deadlock"),
    ("tcgen05_commit", never_committed, "deadlock"),
]
ITEM_MISTAKES = [
    ("received", received_at_once, "nobody has written"),
    ("_hand_on", handed_on_at_once, "nobody has written|arrivals"),
]


def emulate(monkeypatch, architecture, **options):
    """Let launchers run kernels of an architecture in the emulator, by one program."""
    monkeypatch.setattr(launch, "architecture_of", lambda device: architecture)
    monkeypatch.setattr(
        launch, "started", lambda kernel, programs, **given: run_kernel(kernel, given, programs=1, **options)
    )


def tiles_of_one():
    parts = (torch.tensor([n], dtype=torch.int32) for n in (0, 0, 70))
    return launch.Tiles(*parts, torch.ones(1).int(), torch.zeros(2).int(), 128)


def opened(monkeypatch, architecture="sm_90", **options):
    """Run the opening product of 70 rows, 10 steps deep and two tiles wide: its ring goes round five times."""
    emulate(monkeypatch, architecture, **options)
    x, up = torch.randn(70, 640).bfloat16(), torch.randn(1, 264, 640).bfloat16()
    hidden = torch.empty(70, 264, dtype=torch.bfloat16)
    return launch.opening(x, up, None, tiles_of_one(), torch.arange(70).flip(0).int(), "relu", hidden=hidden)


def multiplied():
    a, w = torch.randn(70, 640).bfloat16(), torch.randn(1, 640, 264).bfloat16()
    return launch.product(a, w, tiles_of_one(), out=torch.empty(70, 264).bfloat16())


def closed_backward():
    grad, down, pre = torch.randn(70, 640).bfloat16(), torch.randn(1, 264, 640).bfloat16(), torch.randn(70, 264)
    by = torch.arange(70), torch.arange(70).int()
    return launch.closing_gradient(grad, down, torch.ones(70, 1), tiles_of_one(), by, "relu", (pre.bfloat16(), None))


def gradient_of_matrices():
    left, right = torch.randn(610, 264).bfloat16(), torch.randn(610, 264).bfloat16()
    ends = torch.tensor([600], dtype=torch.int32)
    return launch.weight_gradient(left, right, ends, out=torch.empty(1, 264, 264).bfloat16())


def opened_every_way(monkeypatch, **options):
    ways = [(seed, haste) for seed in range(2) for haste in (0.0, 0.05, 0.5)]
    return [opened(monkeypatch, seed=seed, haste=haste, **options) for seed, haste in ways]


named = partial(pytest.mark.parametrize, ids=lambda one: getattr(one, "__name__", ""))


@named(("name", "mistake", "said"), [*MISTAKES, *ITEM_MISTAKES])
def test_a_mistake_in_the_protocol_is_seen(monkeypatch, name, mistake, said):
    with pytest.raises(ProtocolError, match=said):
        opened_every_way(monkeypatch, replaced={name: mistake})


@named(("name", "mistake", "said"), [*SUMS_MISTAKES, *ITEM_MISTAKES])
def test_a_mistake_with_sums_in_tensor_memory_is_seen(monkeypatch, name, mistake, said):
    with pytest.raises(ProtocolError, match=said):
        opened_every_way(monkeypatch, architecture="sm_100", replaced={name: mistake})


@pytest.mark.parametrize("run", [multiplied, closed_backward, gradient_of_matrices])
@named(("name", "mistake", "said"), SUMS_MISTAKES)
def test_a_mistake_in_any_kernel_with_tensor_memory_is_seen(monkeypatch, run, name, mistake, said):
    def run_every_way(**options):
        for seed, haste in ((0, 0.0), (1, 0.05), (2, 0.5)):
            emulate(monkeypatch, "sm_100", seed=seed, haste=haste, **options)
            run()

    with pytest.raises(ProtocolError, match=said):
        run_every_way(replaced={name: mistake})


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_without_a_mistake_all_is_well(monkeypatch, architecture):
    assert all(hidden.isfinite().all() for hidden in opened_every_way(monkeypatch, architecture=architecture))
