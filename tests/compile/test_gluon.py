"""Every Gluon kernel, compiled ahead of time, no GPU needed: registers, shared memory, and what the machine code holds.

What is compiled is what the launchers launch: a run on the CPU with launches recorded instead of made.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from synchromesh.kernels.tiles import Tiles

launch = pytest.importorskip("synchromesh.kernels.gluon.launch", reason="this Triton has no Gluon")

SM_90, SM_100 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 100, 32)
SHARED = 227 * 1024  # bytes that a program may have
LAUNCHED = 168  # registers of a thread, of 3 warpgroups: 65,536 / 384, in steps of 8
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
EXPERTS, ROWS, WIDTH, HIDDEN = 4, 512, 512, 1024


@dataclass(frozen=True)
class Made:
    """A compiled kernel: PTX, machine code, and what it asks for."""

    ptx: str
    code: str
    shared: int
    registers: int
    spilled: int


def signature_of(kernel: Any, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Return types, constants and what is divisible by 16, as Triton finds them when a kernel is launched."""
    types, constants, divisible = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value: Any = arguments[name]
        if kernel.params[index].is_constexpr or (isinstance(value, int) and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name] = f"*{NAMES[value.dtype]}"
        elif isinstance(value, int):
            types[name] = "i32"
        else:
            types[name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
        if types[name][0] == "*" or (types[name] == "i32" and value % 16 == 0):
            divisible[(index,)] = [["tt.divisibility", 16]]
    return types, constants, divisible


def tool(name: str, *arguments: object) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def compiled(kernel: Any, arguments: dict[str, Any], folder: Path, target: GPUTarget) -> Made:
    from triton.experimental.gluon._runtime import GluonASTSource

    made = triton.compile(
        GluonASTSource(kernel, *signature_of(kernel, arguments)), target=target, options={"num_warps": 4}
    )
    file = folder / "kernel.cubin"
    file.write_bytes(made.asm["cubin"])
    said = tool("cuobjdump", "--dump-resource-usage", file)
    spilled = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", said)))
    (registers,) = map(int, re.findall(r"REG:(\d+)", said))
    return Made(made.asm["ptx"], tool("nvdisasm", "-c", file), made.metadata.shared, registers, spilled)


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Compile what a launcher launches."""

    def made(name: str, dtype: torch.dtype, target: GPUTarget = SM_90) -> Made:
        found = []
        monkeypatch.setattr(launch, "architecture_of", lambda device: f"sm_{target.arch}")
        monkeypatch.setattr(launch, "started", lambda kernel, programs, **arguments: found.append((kernel, arguments)))
        LAUNCHES[name](dtype)
        ((kernel, arguments),) = found
        return compiled(kernel, arguments, tmp_path, target)

    return made


def tiles():
    expert, first, stop = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
    return Tiles(expert, first, stop, torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 128)


def tensors(dtype, *shapes):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def closing(dtype, *, second=False, scattered=False, bias=False):
    a, w, out, b = tensors(dtype, (ROWS, HIDDEN), (EXPERTS, HIDDEN, WIDTH), (ROWS, WIDTH), (EXPERTS, WIDTH))
    extra: dict[str, Any] = {"second": (a, w)} if second else {}
    if scattered:
        extra["scatter"] = launch.Scatter(torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, 1))
    launch.product(a, w, tiles(), out=out, bias=b if bias else None, **extra)


def turned(dtype):
    a, w, out = tensors(dtype, (ROWS, WIDTH), (EXPERTS, HIDDEN, WIDTH), (ROWS, HIDDEN))
    launch.product(a, w.mT, tiles(), out=out)


def opening(dtype, activation, *, gated):
    x, up, gate = tensors(dtype, (ROWS // 2, WIDTH), *[(EXPERTS, HIDDEN, WIDTH)] * 2)
    hidden, pre_up, pre_gate, *biases = tensors(dtype, *[(ROWS, HIDDEN)] * 3, *[(EXPERTS, HIDDEN)] * 2)
    tokens = torch.zeros(ROWS, dtype=torch.int32)
    extra = {"pre": (pre_up, pre_gate), "biases": (biases[0], biases[1] if gated else None)}
    launch.opening(x, up, gate if gated else None, tiles(), tokens, activation, hidden=hidden, **extra)


def closing_backward(dtype, activation, *, gated):
    grad, down, pre_up, pre_gate = tensors(dtype, (ROWS // 2, WIDTH), (EXPERTS, HIDDEN, WIDTH), *[(ROWS, HIDDEN)] * 2)
    by = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int32)
    pre = (pre_up, pre_gate if gated else None)
    launch.closing_gradient(grad, down, torch.zeros(ROWS // 2, 2), tiles(), by, activation, pre)


def gradient(dtype, *, gathered):
    left, right, out = tensors(dtype, (ROWS, HIDDEN), (ROWS, WIDTH), (EXPERTS, HIDDEN, WIDTH))
    tokens = torch.zeros(ROWS, dtype=torch.int32) if gathered else None
    launch.weight_gradient(left, right, torch.zeros(EXPERTS, dtype=torch.int32), out=out, tokens=tokens)


LAUNCHES = {
    "closing": lambda dtype: closing(dtype, bias=True),
    "closing, one choice": lambda dtype: closing(dtype, bias=True, scattered=True),
    "columns of k": turned,
    "rows' gradient of two": lambda dtype: closing(dtype, second=True),
    "opening": lambda dtype: opening(dtype, "gelu", gated=False),
    "opening, gated": lambda dtype: opening(dtype, "silu", gated=True),
    "closing backward": lambda dtype: closing_backward(dtype, "relu", gated=False),
    "closing backward, gated": lambda dtype: closing_backward(dtype, "silu", gated=True),
    "closing backward, gated gelu": lambda dtype: closing_backward(dtype, "gelu", gated=True),
    "matrix gradient, gathered": lambda dtype: gradient(dtype, gathered=True),
    "matrix gradient": lambda dtype: gradient(dtype, gathered=False),
}
GATHERING = {"opening", "opening, gated", "closing backward, gated", "matrix gradient, gathered", "matrix gradient"}


@pytest.mark.parametrize("name", LAUNCHES)
def test_specialised_warps_tma_and_wgmma_without_spills(build, name):
    made = build(name, torch.bfloat16)
    assert made.spilled == 0
    assert made.shared <= SHARED
    assert made.registers <= LAUNCHED
    assert highest_register(made.code) < 240
    assert {"setmaxnreg.inc", "setmaxnreg.dec"} <= set(re.findall(r"setmaxnreg\.\w+", made.ptx))
    assert "USETMAXREG" in made.code
    assert "UTMALDG" in made.code
    assert "HGMMA" in made.code
    # Two consumers of 4 wgmma a step each, twice as many where there is a gate.
    width = 128 if name in ("opening, gated", "closing backward, gated gelu") else 256
    products = 16 if name == "opening, gated" else 8
    assert len(re.findall(rf"wgmma\.mma_async\.\S*m64n{width}k16", made.ptx)) == products
    assert "ld.local" not in made.ptx


@pytest.mark.parametrize("name", sorted(GATHERING))
def test_threads_copy_16_bytes_and_arrive_when_they_land(build, name):
    ptx = build(name, torch.bfloat16).ptx
    sizes = set(re.findall(r"cp\.async\.c\w\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx))
    assert sizes == {"0x10"}
    assert "cp.async.mbarrier.arrive.noinc" in ptx  # what the count of 129 holds already
    assert len(re.findall(r"mbarrier\.init\.\S+ \[\S+\], 129;", ptx)) == launch.STAGES
    assert "fence.proxy.async" in ptx


@pytest.mark.parametrize("name", ["closing", "opening, gated", "matrix gradient"])
def test_no_consumer_frees_a_slot_before_all_its_warps_have_read_it(build, name):
    """Gluon lets one thread arrive for all: the compiler must let the others come to it first."""
    lines = [line for line in build(name, torch.bfloat16).ptx.splitlines() if SYNCHRONISES.search(line)]
    arrivals = [index for index, line in enumerate(lines) if re.search(r"mbarrier\.arrive\.shared", line)]
    alone = [index for index in arrivals if "bar.warp.sync" in lines[index - 1]]
    assert len(alone) == 2 * (
        name == "closing"
    )  # the first item and further ones, handed on by the only warp that loads
    assert len(arrivals) > len(alone)
    for index in sorted({*arrivals} - {*alone}):
        assert "bar.sync" in lines[index - 1], lines[index - 3 : index + 1]
        assert ", 128" in lines[index - 1]  # the warpgroup's own threads, not all


SYNCHRONISES = re.compile(r"bar\.(warp\.)?sync|wgmma\.(mma_async|wait_group)|mbarrier\.(arrive|try_wait)|cp\.async")


def highest_register(code: str) -> int:
    return max(map(int, re.findall(r"\bR(\d+)\b", code)))


def test_float16(build):
    made = build("opening, gated", torch.float16)
    assert made.spilled == 0
    assert "m64n128k16.f32.f16.f16" in made.ptx


@pytest.mark.parametrize("name", LAUNCHES)
def test_sums_in_tensor_memory_on_sm_100(build, name):
    made = build(name, torch.bfloat16, SM_100)
    assert made.spilled == 0
    assert made.shared <= SHARED
    assert made.registers <= 255
    products = 8 if name == "opening, gated" else 4
    assert len(re.findall(r"tcgen05\.mma", made.ptx)) == products
    # All 512 columns that there are: two tiles of 256, or of 128 and 128.
    columns = map(int, re.findall(r"tcgen05\.alloc\S* \[[^]]*\], (\d+);", made.ptx))
    assert sum(columns) == 512
    assert {"setmaxnreg", "tcgen05.commit", "tcgen05.ld"} <= set(re.findall(r"setmaxnreg|tcgen05\.\w+", made.ptx))
    assert "UTMALDG" in made.code
    assert ("tile::gather4" in made.ptx) == (name in GATHERING | {"closing backward", "closing backward, gated gelu"})
    assert "cp.async.c" not in made.ptx  # by threads


@pytest.mark.parametrize("name", ["closing", "opening, gated", "closing backward, gated", "matrix gradient"])
def test_all_warps_have_read_the_sums_that_the_next_tile_overwrites(build, name):
    ptx = build(name, torch.bfloat16, SM_100).ptx
    lines = [line for line in ptx.splitlines() if SYNCHRONISES.search(line) or "tcgen05.ld" in line]
    last = max(index for index, line in enumerate(lines) if "tcgen05.ld" in line)
    after = lines[last + 1 :]
    arrival = next(index for index, line in enumerate(after) if re.search(r"mbarrier\.arrive\.shared", line))
    assert "bar.sync" in after[arrival - 1]


@pytest.mark.parametrize("target", [SM_90, SM_100], ids=lambda target: f"sm_{target.arch}")
def test_items_are_taken_by_an_atomic_counter(build, target):
    ptx = build("closing", torch.bfloat16, target).ptx
    orders = re.findall(r"atom\.global\.gpu\.(\w+)\.add\.u32", ptx)
    assert orders == ["relaxed", "relaxed", "acq_rel"]  # the first item, further ones, and the program's leave
