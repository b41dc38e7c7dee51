"""Launches of Triton kernels on paper: what launchers would launch, compiled ahead of time and read. No GPU needed.

A run on a CPU, or on the meta device, with launches recorded instead of made. What they are compiled to says how many
registers and bytes of shared memory a program takes, what it spills, and how long the loop around its products is.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from synchromesh.torch_private import CUSTOM_OPS, TorchDispatchMode

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
FREE = re.compile(
    r"aten::(_?view|mT$|_reshape_alias|_?unsafe_view|as_strided|t$|transpose|permute|expand|slice|select|split"
    r"|unsqueeze|squeeze|alias|detach|unbind|chunk|diagonal|unfold|empty|new_empty)"
)
"""Operations of torch that launch nothing."""


@dataclass(frozen=True)
class Launch:
    """What a kernel is specialised for.

    Attributes:
        kernel: its name.
        signature: the type of each argument.
        constants: what is known when it is compiled.
        divisible: the arguments that are multiples of 16.
        options: warps and stages.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


class Recorder:
    """Notes launches instead of making them, and counts torch's own operations beside them.

    Attributes:
        launches: in order, with repetitions.
        operations: names of torch's operations that launch something on a GPU, in order.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.operations: list[str] = []
        self._kernels: dict[str, Any] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Record while the block runs; the meta device then stands in for a GPU."""
        run = functools.partialmethod(lambda kernel, *args, **kwargs: self._note(kernel, *args, **kwargs))
        with (
            patch.object(triton.JITFunction, "run", run),
            patch.object(torch, "is_autocast_enabled", lambda device: False),  # which does not know the meta device
            patch.object(torch, "autocast", lambda device, enabled: contextlib.nullcontext()),
            _Operations(self.operations),
        ):
            yield self

    def compiled(self, launch: Launch, target: GPUTarget) -> Any:
        """Compile a launch for a target."""
        kernel = self._kernels[launch.kernel]
        source = _source_of(kernel)(
            kernel, dict(launch.signature), dict(launch.constants),
            {(index,): [["tt.divisibility", 16]] for index in launch.divisible},
        )  # fmt: skip
        return triton.compile(source, target=target, options=dict(launch.options))

    def _note(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: list[int] = []
        for index, name in enumerate(kernel.arg_names):
            value, declared = values[name], kernel.params[index]
            if declared.is_constexpr or (isinstance(value, int) and value == 1 and not declared.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = f"*{NAMES[value.dtype]}"
                divisible.append(index)
            elif isinstance(value, int):
                signature[name] = "i32"
                divisible += [index] * (value % 16 == 0 and not declared.do_not_specialize)
            else:  # a descriptor that TMA reads by
                block = f"{NAMES[value.base.dtype]}{list(value.block_shape)}"
                signature[name] = f"tensordesc<{block},{value.layout!r}>"
        found = tuple(signature.items()), tuple(constants.items())
        self.launches.append(Launch(kernel.__name__, *found, tuple(divisible), tuple(options.items())))
        self._kernels[kernel.__name__] = kernel


def _source_of(kernel: Any) -> type[ASTSource]:
    """Return how the compiler takes a kernel, of Triton or of Gluon, which not every Triton has."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


class _Operations(TorchDispatchMode):
    """Appends to a list the name of each operation that launches something."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        definition = CUSTOM_OPS.get(name)
        if definition is not None:  # its own code, not the one that stands in for it where there are no numbers
            super().__enter__()
            try:
                return definition._init_fn(*args, **(kwargs or {}))
            finally:
                super().__exit__(None, None, None)
        if name.startswith("aten::") and not FREE.match(name):
            self._names.append(name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Figures:
    """What a kernel was compiled to.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that do not fit into them.
        shared: bytes of shared memory of a program.
        lines: instructions.
        loop: instructions of the longest innermost loop with a product in it; 0 where there is none.
        unit: the matrix instruction, with its shape; "" where there is none.
    """

    registers: int
    spilled: int
    shared: int
    lines: int
    loop: int
    unit: str


def figures(made: Any) -> Figures:
    """Read what was compiled for one of Nvidia's targets off its machine code."""
    said, code = _dumped(made.asm["cubin"], "--dump-resource-usage"), _dumped(made.asm["cubin"], "-sass")
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.+?);", code)
    lines = [(int(at, 16), text) for at, text in found]
    units = re.findall(r"wgmma\.mma_async\.\S+|tcgen05\.mma\.\S+|mma\.sync\.\S+", made.asm["ptx"])
    return Figures(
        registers=max(map(int, re.findall(r"REG:(\d+)", said))),
        spilled=sum(map(int, re.findall(r"STACK:(\d+)", said))),
        shared=made.metadata.shared,
        lines=len(lines),
        loop=_loop(lines),
        unit=units[0] if units else "",
    )


def _loop(lines: list[tuple[int, str]]) -> int:
    """Return the length of the longest loop that has a product in it and no loop with one inside."""
    places = {at: number for number, (at, _) in enumerate(lines)}
    loops = []
    for number, (at, text) in enumerate(lines):
        back = re.search(r"BRA(?:\.U)?(?:\.\w+)? .*?(0x[0-9a-f]+)", text)
        if back and int(back[1], 16) < at and int(back[1], 16) in places:
            loops.append((places[int(back[1], 16)], number))
    multiplies = [number for number, (_, text) in enumerate(lines) if re.search(r"GMMA|HMMA|UTC\w*MMA|IMMA", text)]
    own = [one for one in loops if any(one[0] <= number <= one[1] for number in multiplies)]
    inner = [a for a in own if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in own)]
    return max((stop - start + 1 for start, stop in inner), default=0)


def _dumped(cubin: bytes, flag: str) -> str:
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = [folder / "cuobjdump", flag, file.name]
        return subprocess.run(
            asked, capture_output=True, text=True, check=True, env={"PATH": f"{folder}:/usr/bin:/bin"}
        ).stdout
