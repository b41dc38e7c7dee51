"""Every Triton kernel, compiled ahead of time for every target, no GPU needed: registers, shared memory, matrix units.

What is compiled is what the launchers launch: a run on the CPU with launches recorded instead of made.
"""

import re
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import triton

from synchromesh.kernels import Float8Products, MLPWeights, MXFloat8Products, quantize
from synchromesh.kernels.fused_mlp import few
from synchromesh.kernels.fused_mlp import triton as fused
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.grouped_mm import tilings
from synchromesh.kernels.grouped_mm import triton as grouped
from synchromesh.kernels.scaled_mm import triton as scaled
from synchromesh.kernels.select.reference import GATES
from synchromesh.kernels.select.triton import MOST_EXPERTS, MOST_PROGRAMS
from synchromesh.testing.cases import network_parts, row_map_of, zipf
from synchromesh.testing.launches import TARGETS, Recorder

MATRIX_UNIT = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "sm_120": "mma.sync", "gfx942": "v_mfma"}
SHARED = {
    "sm_80": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
}  # KiB that a program may have
PRODUCTS = {"_product", "open_rows", "close_rows_backward", "_weight_gradient"}


def recorded(arch, dtype, *, gated, width=512, hidden=1024, tokens=512):
    """Return the launches of a forward and a backward of every kernel."""
    recorder = Recorder()

    def known(dtype, device, *, rows_per_expert):
        return tilings.tilings_for(arch, dtype, rows_per_expert)

    names = {"up": (hidden, width), "down": (hidden, width), "up_bias": (hidden,), "down_bias": (width,)}
    if gated:
        names |= {"gate": (hidden, width), "gate_bias": (hidden,)}
    mlp = MLPWeights(**{name: torch.ones(4, *shape, dtype=dtype, requires_grad=True) for name, shape in names.items()})
    ids = zipf(tokens, 4, 2)
    rowmap = row_map_of(ids, 4)
    x = torch.ones(tokens, width, dtype=dtype, requires_grad=True)
    weights = torch.ones(tokens, 2, requires_grad=True)
    with recorder.recording():
        for module in (grouped, fused):
            patch.object(module, "tilings_of", known).start()
        try:
            TRITON.fused_mlp(x, weights, rowmap, mlp, F.silu).sum().backward()
            rows = TRITON.gather(x, rowmap)
            out = TRITON.grouped_mm(rows, mlp.up.mT, rowmap.ends, mlp.up_bias)
            TRITON.combine(TRITON.grouped_mm(out, mlp.down, rowmap.ends), weights, rowmap).sum().backward()
            with torch.no_grad():
                TRITON.fused_mlp(x[:3], weights[:3], row_map_of(ids[:3], 4), mlp, F.silu)
                TRITON.direct_mlp(x[:8], weights[:8], ids[:8], mlp, F.silu)
                TRITON.mark(torch.ones(8, width), weights[:8], ids[:8])
                TRITON.select(torch.ones(8, 128), 8, gate="softmax", normalize=True, sums=False)
            turns = [(gate, number) for gate in GATES for number in (tokens, 16 * MOST_PROGRAMS)]  # one, and more
            for gate, number in [*turns, ("softmax", 8)]:
                logits = torch.ones(number, 128, requires_grad=True)
                scores, _, chosen, sums, _ = TRITON.select(logits, 8, gate=gate, normalize=True, bias=torch.ones(128))
                (scores.sum() + chosen.sum() + sums.sum()).backward()
            for priority in (None, torch.ones(tokens)):
                places, counts = TRITON.positions(ids, 4, priority)
            for capacity in (None, 7, counts.max()):
                TRITON.row_map(ids, places, counts, num_rows=ids.numel(), capacity=capacity)
            TRITON.segment_map(counts[None].expand(8, 4), num_rows=8 * ids.numel())
            TRITON.fused_mlp(x, weights[:, :1], row_map_of(ids[:, :1], 4), mlp, F.silu).sum().backward()
            for k in (1, 2):
                some = row_map_of(ids[:, :k], 4, capacity=tokens // 4)
                TRITON.marked_mlp(x, weights[:, :k], some, ids[:, :k], mlp, F.silu).sum().backward()
        finally:
            patch.stopall()
    return recorder


def resources(arch, made, folder):
    """Return (assembly, bytes spilled)."""
    if arch == "gfx942":
        assembly = made.asm["amdgcn"]
        return assembly, sum(map(int, re.findall(r"vgpr_spill_count:\s+(\d+)", assembly)))
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return made.asm["ptx"], sum(map(int, re.findall(r"STACK:(\d+)", said)))


def check(arch, recorder, folder, *, narrow, only=None):
    """Compile each launch once; none may spill, nor ask for more shared memory than there is."""
    launches = [one for one in dict.fromkeys(recorder.launches) if only is None or one.kernel in only]
    assert launches
    for launch in launches:
        made = recorder.compiled(launch, TARGETS[arch])
        assembly, spilled = resources(arch, made, folder)
        assert spilled == 0, f"{launch} spills {spilled} bytes"
        assert made.metadata.shared <= SHARED[arch] * 1024, launch
        if narrow and launch.kernel in PRODUCTS:
            high = dict(launch.constants)["BM"] >= 64  # Hopper's and Blackwell's units take no fewer rows
            assert (MATRIX_UNIT[arch] if high or arch == "gfx942" else "mma.sync") in assembly, launch
    return {launch.kernel for launch in launches}


TILED = [arch for arch in TARGETS if arch != "sm_89"]  # it takes sm_80's tilings, and has 8-bit products besides
ARCHITECTURES = pytest.mark.parametrize("arch", TILED)
EVERY = {
    "_map_tiles", "_map_rows", "_add_blocks", "_count_block", "_place_block", "_copy_rows", "_fill_absent", "_sum_rows",
    "_spread_rows", "_column_sums", "_zero_tail", "sum_parts", "_open_few", "_close_few", "_select", "_add_programs",
    "_select_backward", "_mark_tokens", "_unmark_tokens", "_map_segments",
} | PRODUCTS  # fmt: skip


@ARCHITECTURES
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_kernel_compiles_to_matrix_instructions_without_spills(arch, gated, tmp_path):
    recorder = recorded(arch, torch.bfloat16, gated=gated)
    assert check(arch, recorder, tmp_path, narrow=True) == EVERY


@ARCHITECTURES
@pytest.mark.parametrize("tokens", [16, 48, 112], ids=["16_rows", "32_rows", "64_rows"])
def test_tilings_for_few_rows(arch, tokens, tmp_path):
    recorder = recorded(arch, torch.bfloat16, gated=True, tokens=tokens)
    heights = {dict(one.constants)["BM"] for one in recorder.launches if one.kernel == "open_rows"}
    assert heights == {16: {16}, 48: {32, 16}, 112: {64, 32}}[tokens]  # of two choices, and of one
    check(arch, recorder, tmp_path, narrow=True, only=PRODUCTS - {"_weight_gradient"})


@ARCHITECTURES
def test_choices_among_the_most_experts(arch, tmp_path):
    recorder, logits = Recorder(), torch.ones(MOST_PROGRAMS + 1, MOST_EXPERTS, requires_grad=True)
    with recorder.recording():
        TRITON.select(logits, 8, gate="softmax", normalize=True)[2].sum().backward()
    assert {"_select", "_select_backward"} <= check(arch, recorder, tmp_path, narrow=True)


# sm_80 and gfx942 have no instruction that widens float8_e4m3fn: quantized_mlp dequantizes there.
EIGHT_BITS = [(arch, torch.int8) for arch in TILED] + [
    (arch, torch.float8_e4m3fn) for arch in ("sm_90", "sm_100", "sm_120")
]


@pytest.mark.parametrize(("arch", "numbers"), EIGHT_BITS, ids=str)
def test_numbers_of_8_bits_for_few_tokens(arch, numbers, tmp_path):
    recorder = Recorder()
    mlp = MLPWeights(*(torch.ones(16, 1024, 512) for _ in range(3)), *(torch.ones(16, n) for n in (1024, 1024, 512)))
    with recorder.recording():
        ids, x = zipf(8, 16, 2), torch.ones(8, 512, dtype=torch.bfloat16)
        narrow = quantize(mlp, numbers)
        TRITON.fused_mlp(x, torch.ones(8, 2), row_map_of(ids, 16), narrow, F.silu)
        TRITON.direct_mlp(x, torch.ones(8, 2), ids, narrow, F.silu)
    assert {"_open_few", "_close_few"} <= check(arch, recorder, tmp_path, narrow=True)


@ARCHITECTURES
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gated_biased", torch.float32), ("gated_biased", torch.bfloat16), ("biased", torch.float16)],
    ids=str,
)
def test_few_tokens_share_a_matrix_without_spills_and_round_each_rows_products_alike(arch, kind, dtype, tmp_path):
    """One rounding a product, as written: a compiler that may choose could give rows that share other bits."""
    recorder = Recorder()
    mlp = MLPWeights(**network_parts(kind, 16, dtype, width=512, hidden=1024))
    with recorder.recording():
        for tokens in (8, 32):
            ids, x = zipf(tokens, 16, 2), torch.ones(tokens, 512, dtype=dtype)
            TRITON.direct_mlp(x, torch.ones(tokens, 2), ids, mlp, F.silu)
            TRITON.fused_mlp(x, torch.ones(tokens, 2), row_map_of(ids, 16), mlp, F.silu)
    only = {"_open_few", "_close_few"}
    assert check(arch, recorder, tmp_path, narrow=False, only=only) == only
    for launch in dict.fromkeys(one for one in recorder.launches if one.kernel in only):
        made, own = recorder.compiled(launch, TARGETS[arch]), dict(launch.constants)
        each = few.SHARED * own["BF"] * own["BD"] // (32 * few.WARPS) * (1 + own.get("GATED", False))
        if arch != "gfx942":
            fused = len(re.findall(r"fma\.rn(?:\.ftz)?\.f32\s", made.asm["ptx"]))
            pairs = len(re.findall(r"fma\.rn(?:\.ftz)?\.f32x2\s", made.asm["ptx"]))
            assert fused + 2 * pairs >= each, launch


@ARCHITECTURES
def test_float32(arch, tmp_path):
    check(arch, recorded(arch, torch.float32, gated=True), tmp_path, narrow=False, only=PRODUCTS)


@ARCHITECTURES
def test_widths_that_no_block_divides(arch, tmp_path):
    recorder = recorded(arch, torch.float16, gated=True, width=200, hidden=328)
    check(arch, recorder, tmp_path, narrow=True, only=PRODUCTS)


FLOAT8, MXFLOAT8 = Float8Products(), MXFloat8Products()
OWN_PRODUCTS = [
    ("sm_89", FLOAT8, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3"),
    ("sm_90", FLOAT8, "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
    ("sm_100", FLOAT8, "tcgen05.mma.cta_group::1.kind::f8f6f4"),
    ("sm_120", FLOAT8, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3"),
    ("sm_100", MXFLOAT8, "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale"),
    ("sm_120", MXFLOAT8, "mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale"),
]


def recorded_scaled(arch, products, *, own, tokens=512, width=512, hidden=1024):
    """Return the launches of a forward and a backward of scaled_mm, on a device with or without such products."""
    recorder = Recorder()

    def known(dtype, device, *, rows_per_expert):
        return tilings.tilings_for("sm_80" if arch == "sm_89" else arch, dtype, rows_per_expert)

    rows, weight, bias = (
        torch.ones(*shape, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((2 * tokens, width), (4, hidden, width), (4, hidden))
    )
    with (
        recorder.recording(),
        patch.object(grouped, "tilings_of", known),
        patch.object(scaled, "tilings_of", known),
        patch.object(scaled, "multiplies", lambda products, device: own),
    ):
        ends = row_map_of(zipf(tokens, 4, 2), 4).ends
        TRITON.scaled_mm(rows, weight.mT, ends, bias, products=products).sum().backward()
    return recorder


@pytest.mark.parametrize(("arch", "products", "unit"), OWN_PRODUCTS, ids=str)
def test_8_bit_numbers_are_multiplied_as_such(arch, products, unit, tmp_path):
    recorder = recorded_scaled(arch, products, own=True)
    only = {"_narrow", "_scaled_product"}
    assert check(arch, recorder, tmp_path, narrow=False, only=only) == only
    for launch in (one for one in recorder.launches if one.kernel == "_scaled_product"):
        assert unit in recorder.compiled(launch, TARGETS[arch]).asm["ptx"]


@pytest.mark.parametrize(("arch", "products"), [("sm_90", FLOAT8), ("sm_100", MXFLOAT8)], ids=str)
@pytest.mark.parametrize("sizes", [(16, 512, 1024), (112, 512, 1024), (512, 200, 328)], ids=str)
def test_8_bit_numbers_of_few_rows_and_of_odd_widths(arch, products, sizes, tmp_path):
    tokens, width, hidden = sizes
    recorder = recorded_scaled(arch, products, own=True, tokens=tokens, width=width, hidden=hidden)
    check(arch, recorder, tmp_path, narrow=False, only={"_scaled_product"})


@pytest.mark.parametrize(("arch", "products"), [("sm_80", MXFLOAT8), ("sm_90", MXFLOAT8), ("gfx942", FLOAT8)], ids=str)
def test_8_bit_numbers_are_widened_where_there_is_no_unit_for_them(arch, products, tmp_path):
    recorder = recorded_scaled(arch, products, own=False)
    only = {"_narrow", "_product"}
    assert check(arch, recorder, tmp_path, narrow=True, only=only) == only
