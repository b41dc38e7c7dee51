"""The producer of products whose rows are gathered: rows by cp.async, matrices by TMA."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are typed as Triton sees them, not as they are launched.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from synchromesh.kernels.gluon.layouts import gathered_layout
from synchromesh.kernels.gluon.ring import acquired, copied_rows, gather_rows, placed


@gluon.jit
def load_gathered(
    x, up, gate, pairs, ring, order, depth8, choices,
    GATED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Be the producer of rows x[pairs[r] // choices] and of blocks of up, and of gate if GATED."""
    rows, ups, gates, ready, free = ring
    expert, first, stop, tiles, across, steps = order
    GATHERED: gl.constexpr = gathered_layout()
    depth = depth8 * 8
    step = 0
    for item in range(gl.program_id(0), tiles * across, gl.num_programs(0)):
        e, start, end, column = placed(item, tiles, across, expert, first, stop, GROUP)
        # The last row is repeated where a tile is not full: nobody stores what comes of it.
        row = gl.minimum(start + gl.arange(0, BM, gl.SliceLayout(1, GATHERED)), end - 1)
        token = (gl.load(pairs + row) // choices).to(gl.int32)
        for k in range(steps):
            slot = acquired(free, step, STAGES)
            bar = ready.index(slot)
            if GATED:
                mbarrier.expect(bar, up.block_type.nbytes + gate.block_type.nbytes)
                tma.async_copy_global_to_shared(gate, [e, column * BN, k * BK], bar, gates.index(slot))
            else:
                mbarrier.expect(bar, up.block_type.nbytes)
            tma.async_copy_global_to_shared(up, [e, column * BN, k * BK], bar, ups.index(slot))
            gather_rows(x, token, None, k * BK, depth, rows.index(slot))
            copied_rows(bar)
            step += 1
