"""What Triton's kernels are compiled to: registers, spills, shared memory, the loop around the products. No GPU needed.

    python benchmarks/compiled.py --out benchmarks/results/compiled.jsonl --name after
    python benchmarks/compiled.py --out benchmarks/results/compiled.jsonl --name gluon --gluon --targets sm_90 sm_100

The launches are those of a layer's forward and backward at a shape of Qwen3-235B, on tensors without numbers; each is
compiled ahead of time. Lines of one name are replaced, others stay, so that two names are a before and an after. The
table is printed; nothing here is a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import tyro

from synchromesh import GatedMLPExperts, LoadBalance, Local, MLPExperts, MoE, TopKRouter, aux_loss
from synchromesh.kernels import Kernels
from synchromesh.kernels.fused_mlp import few
from synchromesh.kernels.fused_mlp import triton as fused
from synchromesh.kernels.gpu import GLUON, TRITON
from synchromesh.kernels.grouped_mm import gluon, tilings
from synchromesh.kernels.grouped_mm import triton as grouped
from synchromesh.testing.launches import TARGETS, Recorder, figures


@dataclass(frozen=True)
class Shape:
    """Of a layer: T tokens of width D, experts' hidden width F, E experts, K choices."""

    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int
    gated: bool = True


SHAPES = {
    "qwen3-235b": Shape(32768, 4096, 1536, 128, 8),
    "deepseek-v3": Shape(8192, 7168, 2048, 256, 8),
    "swin, one choice": Shape(8192, 384, 1536, 8, 1, gated=False),
}
PRODUCTS = ("open_rows", "_product", "close_rows_backward", "_weight_gradient")
FEW = ("_open_few", "_close_few")
MOST_FEW_TOKENS = 64
GLUON_PRODUCTS = ("opening_product", "grouped_product", "closing_gradient", "weight_product")


@dataclass(frozen=True)
class Options:
    """What to compile.

    Attributes:
        out: a file of JSON lines.
        name: of this state of the code, such as "before".
        targets: architectures of Nvidia's.
        shapes: of layers.
        gluon: the Gluon kernels instead of Triton's.
    """

    out: Path | None = None
    name: str = "now"
    targets: tuple[str, ...] = ("sm_90",)
    shapes: tuple[str, ...] = tuple(SHAPES)
    gluon: bool = False


@contextlib.contextmanager
def as_on(target: str) -> Iterator[None]:
    """Let launchers choose what they would on an architecture."""
    from synchromesh.kernels.gluon import launch

    def known(dtype: torch.dtype, device: torch.device, *, rows_per_expert: int) -> tilings.Tilings:
        return tilings.tilings_for(target, dtype, rows_per_expert)

    with contextlib.ExitStack() as patches:
        for module in (grouped, fused):
            patches.enter_context(patch.object(module, "tilings_of", known))
        for module in (gluon, launch):
            patches.enter_context(patch.object(module, "architecture_of", lambda device: target))
        yield


def recorded(target: str, shape: Shape, kernels: Kernels = TRITON) -> tuple[Recorder, Recorder]:
    """Return the launches of a layer's forward, and those of its backward."""
    with torch.device("meta"):
        experts = (GatedMLPExperts if shape.gated else MLPExperts)(shape.experts, shape.width, hidden=shape.hidden)
        router = TopKRouter(shape.width, shape.experts, k=shape.choices)
    layer = MoE(router, experts, losses=(LoadBalance(0.01),), strategy=Local(kernels=kernels)).to(torch.bfloat16)
    x = torch.empty(shape.tokens, shape.width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    dy = torch.empty_like(x)
    forward, backward = Recorder(), Recorder()
    with as_on(target):
        with forward.recording():
            y, loss = layer(x), aux_loss(layer)
        with backward.recording():
            torch.autograd.backward([y, loss], [dy, None])
    return forward, backward


def recorded_few(shape: Shape) -> Recorder:
    """Return the launches of a layer in inference, of as many tokens as are called few."""
    with torch.device("meta"):
        experts = (GatedMLPExperts if shape.gated else MLPExperts)(shape.experts, shape.width, hidden=shape.hidden)
        router = TopKRouter(shape.width, shape.experts, k=shape.choices)
    layer = MoE(router, experts, strategy=Local(kernels=TRITON)).to(torch.bfloat16).eval()
    most = int(few.MOST_ROWS_PER_EXPERT * shape.experts) // shape.choices
    x, recorder = torch.empty(min(MOST_FEW_TOKENS, most), shape.width, dtype=torch.bfloat16, device="meta"), Recorder()
    with recorder.recording(), torch.no_grad():
        layer(x)
    return recorder


def tile_of(constants: dict[str, int]) -> str:
    """Return rows, columns and depth of a program's block."""
    if "BF" in constants:
        return f"{few.SHARED}x{constants['BF']}x{constants['BD']}"
    return "x".join(str(constants[side]) for side in ("BM", "BN", "BK"))


def intensity(constants: dict[str, int]) -> int:
    """Return operations of a tile for each byte that it reads, bfloat16; a gate's columns stand beside those of up."""
    if "BF" in constants:
        return few.SHARED  # two operations a row on numbers of two bytes
    rows, cols = constants["BM"], constants["BN"] * (1 + constants.get("GATED", 0) * ("SAVE" in constants))
    return rows * cols // (rows + cols)


def is_product(kernel: str) -> bool:
    """Tell whether a kernel multiplies."""
    return kernel in PRODUCTS or kernel.removesuffix("_tmem") in GLUON_PRODUCTS


def table(lines: list[dict[str, object]]) -> str:
    """Return the states of each kernel beside each other, as Markdown."""
    names = ("tile", "stages", "flop_per_byte", "registers", "spilled", "shared", "loop", "lines", "triton", "torch")
    rows: dict[tuple[object, ...], dict[object, dict[str, object]]] = {}
    for line in lines:
        place = tuple(line[name] for name in ("target", "shape", "pass", "kernel"))
        rows.setdefault(place, {})[line["state"]] = line
    states = list(dict.fromkeys(line["state"] for line in lines))
    said = ["| target, shape, pass, kernel | " + " | ".join(names) + " |", "|-" * (len(names) + 1) + "|"]
    for place, found in rows.items():
        cells = []
        for name in names:
            values = [str(found[state].get(name, "")) if state in found else "" for state in states]
            cells.append(values[0] if len(set(values)) == 1 else " → ".join(values))
        said.append(f"| {', '.join(map(str, place))} | " + " | ".join(cells) + " |")
    return "\n".join(said)


def lines_of(options: Options, target: str, name: str) -> list[dict[str, object]]:
    """Return one line a product, and one of what is launched."""
    kernels = GLUON if options.gluon else TRITON
    passes = dict(zip(("forward", "backward"), recorded(target, SHAPES[name], kernels), strict=True))
    if not options.gluon:
        passes["few tokens"] = recorded_few(SHAPES[name])
    about = {"state": options.name, "target": target, "shape": name}
    lines = []
    for way, recorder in passes.items():
        lines.append(
            {**about, "pass": way, "kernel": "launches", "triton": len(recorder.launches)}
            | {"torch": len(recorder.operations)}
        )
        for launch in dict.fromkeys(one for one in recorder.launches if is_product(one.kernel) or one.kernel in FEW):
            constants, chosen = dict(launch.constants), dict(launch.options)
            made = figures(recorder.compiled(launch, TARGETS[target]))
            how = {
                "tile": tile_of(constants),
                "warps": chosen["num_warps"],
                "stages": constants.get("STAGES", chosen.get("num_stages")),
            }
            how["flop_per_byte"] = intensity(constants)
            lines.append({**about, "pass": way, "kernel": launch.kernel, **how, **asdict(made)})
    return lines


def main(options: Options) -> None:
    """Compile, write and print."""
    lines = [line for target in options.targets for name in options.shapes for line in lines_of(options, target, name)]
    if options.out is not None:
        others = options.out.read_text().splitlines() if options.out.exists() else []
        lines = [*[line for line in map(json.loads, others) if line["state"] != options.name], *lines]
        options.out.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(table(lines))


if __name__ == "__main__":
    main(tyro.cli(Options))
