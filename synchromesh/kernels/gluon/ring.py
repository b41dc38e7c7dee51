"""The ring of buffers through which a producer hands blocks to the warps that multiply them.

On sm_90 a program is a warpgroup that loads (the producer) and two that multiply 64 rows each (the consumers); sm_100's
programs are told in `tmem.py`. Block number `step` of a program lies in slot step % STAGES. Each slot has two barriers:
`ready` completes when its bytes have arrived, `free` when all consumers have read them; a slot's round (step // STAGES)
is odd or even in turn, and so is the phase that is waited for. A barrier that never completed counts as having
completed the phase before its first, so the producer's first round does not wait.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from synchromesh.kernels.gluon.layouts import gathered_layout, stored_layout, sums_layout


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return COUNT barriers, each of which completes a phase after ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def acquired(free, step, STAGES: gl.constexpr):
    """Wait until the block that lay in this step's slot has been read; return the slot."""
    slot = step % STAGES
    mbarrier.wait(free.index(slot), ((step // STAGES) & 1) ^ 1)
    return slot


@gluon.jit
def arrived(ready, step, FENCED: gl.constexpr, STAGES: gl.constexpr):
    """Wait until this step's block is there; return its slot.

    FENCED: it may have been written by cp.async, which the matrix unit sees after a fence only.
    """
    slot = step % STAGES
    mbarrier.wait(ready.index(slot), (step // STAGES) & 1)
    if FENCED:
        fence_async_shared()
    return slot


@gluon.jit
def released(free, step, pred, STAGES: gl.constexpr):
    """Tell the producer that this consumer has read the block of the step before this one, if pred."""
    mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), count=1, pred=pred)


@gluon.jit
def gather_rows(source, rows, own, begin, width, into):
    """Start to copy source[rows, begin : begin + cols] of a matrix [., width] into a block [BK rows, cols].

    Zeros come in place of what is not in the matrix, and of rows that are not own; None takes all.
    """
    GATHERED: gl.constexpr = gathered_layout()
    cols = begin + gl.arange(0, into.shape[1], gl.SliceLayout(0, GATHERED))
    inside = (cols < width)[None, :]
    if own is not None:
        inside = inside & own[:, None]
    # Rows are widened because a matrix may have 2^31 numbers or more.
    at = source + rows.to(gl.int64)[:, None] * width + cols[None, :]
    async_copy.async_copy_global_to_shared(into, at, mask=inside)


@gluon.jit
def copied_rows(bar):
    """Let each thread arrive at a barrier once all that it began to copy is there."""
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def matrix(block, TRANSPOSED: gl.constexpr):
    """Return a block of a matrix, or [1, depth, width] of an expert's; TRANSPOSED: the block is the other way round."""
    flat = block
    if len(block.shape) == 3:
        flat = block.reshape([block.shape[1], block.shape[2]])
    if TRANSPOSED:
        return flat.permute([1, 0])
    else:  # noqa: RET505 -- without it Triton compiles what follows as well
        return flat


@gluon.jit
def halves(total):
    """Return the left and the right columns of sums, which stay in the registers where they are."""
    COLS: gl.constexpr = total.shape[1] // 2
    apart = gl.permute(gl.reshape(total, [total.shape[0], 2, COLS]), [0, 2, 1])
    left, right = gl.split(apart)
    return gl.convert_layout(left, sums_layout(COLS)), gl.convert_layout(right, sums_layout(COLS))


@gluon.jit
def store(out, total, begin, end, col, width, to, SCATTERED: gl.constexpr):
    """Write sums [rows, cols] to rows begin .. end of out [R, width], from column col on.

    SCATTERED: row r goes to out[to[r]].
    """
    STORED: gl.constexpr = stored_layout(total.shape[0], total.shape[1])
    value = gl.convert_layout(total.to(out.dtype.element_ty), STORED)
    row = gl.arange(0, total.shape[0], gl.SliceLayout(1, STORED))
    cols = col + gl.arange(0, total.shape[1], gl.SliceLayout(0, STORED))
    own = begin + row < end
    mask = own[:, None] & (cols < width)[None, :]
    if SCATTERED:
        place = gl.load(to + begin + row, mask=own, other=0).to(gl.int64)
        gl.store(out + (place[:, None] * width + cols[None, :]), value, mask=mask)
    else:
        # 64 bits for the first row only: offsets inside a tile fit into 32.
        gl.store(out + begin.to(gl.int64) * width + (row[:, None] * width + cols[None, :]), value, mask=mask)
