"""transformers' experts on a CPU or GPU by each of its backends and by this library's, in one run.

    python benchmarks/huggingface.py                # every shape, fp32 and bf16, balanced and Zipf routing
    python benchmarks/huggingface.py --tiny         # a look whether it runs, in seconds

The module is Mixtral's, its routing given; all backends run the same weights, tokens and ids, and are first compared
with the eager loop, output and every gradient (decode: output); where they differ no time is printed. A *step* is
forward and backward of all tokens, *decode* a forward of few without gradients. Rounds are interleaved, times are
medians. batched_mm copies an expert's weights for every pair: where that is over 4 GiB it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro
from layer import FIGURE, ROUTINGS, seconds_of, timed
from rich.console import Console
from rich.table import Table
from timing import machine, save
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from synchromesh.compat.huggingface import register
from synchromesh.testing.compare import assert_close

OURS = "synchromesh"
BACKENDS = ("eager", "batched_mm", "grouped_mm", OURS)
STEPS = [(2048, 512, 1024, 8, 2), (2048, 512, 512, 32, 4), (2048, 512, 256, 128, 8)]  # T D F E K
DECODES = [(1, 512, 1024, 8, 2), (16, 512, 512, 32, 4), (64, 512, 256, 128, 8)]
OTHER_STEPS = [(1024, 384, 768, 12, 2), (1024, 640, 320, 48, 6)]
OTHER_DECODES = [(1, 384, 768, 12, 2), (8, 768, 512, 16, 4), (32, 640, 320, 48, 6)]
TINY = [(16, 16, 8, 4, 2)]
MOST_COPIED = 4 * 2**30
RESULTS = Path(__file__).parent / "results" / "huggingface.jsonl"


@dataclass(frozen=True)
class Args:
    """What to measure. seconds: of timing per backend and figure.

    tiny: one small shape, one round. quick: five rounds. kept_back: other shapes.
    """

    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    routings: list[str] = field(default_factory=lambda: list(ROUTINGS))
    seconds: float = 2.0
    tiny: bool = False
    quick: bool = False
    kept_back: bool = False
    threads: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = RESULTS


@dataclass(frozen=True)
class Problem:
    """What all backends share."""

    experts: Any
    x: Tensor
    ids: Tensor
    weights: Tensor
    grad: Tensor

    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "weights": self.weights, **dict(self.experts.named_parameters())}


def problem_of(shape: Sequence[int], dtype: torch.dtype, routing: str, device: str) -> Problem:
    tokens, width, hidden, num_experts, choices = shape
    torch.manual_seed(0)
    config = SimpleNamespace(
        num_local_experts=num_experts, hidden_size=width, intermediate_size=hidden, hidden_act="silu",
        _experts_implementation="eager",
    )  # fmt: skip
    experts = MixtralExperts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    weights = torch.rand(tokens, choices)
    return Problem(
        experts=experts.to(device, dtype),
        x=torch.randn(tokens, width).to(device, dtype).requires_grad_(),
        ids=ROUTINGS[routing](tokens, num_experts, choices).to(device),
        weights=(weights / weights.sum(1, keepdim=True)).to(device, dtype).requires_grad_(),
        grad=torch.randn(tokens, width).to(device, dtype),
    )


def run(p: Problem, backend: str, *, training: bool) -> Tensor:
    """Run once; gradients are those of this run alone."""
    p.experts.config._experts_implementation = backend
    for leaf in p.leaves().values():
        leaf.grad = None
    with torch.set_grad_enabled(training):
        y = p.experts(p.x, p.ids, p.weights)
        if training:
            y.backward(p.grad)
    if y.is_cuda:
        torch.cuda.synchronize(y.device)
    return y.detach()


def check_equal(p: Problem, backends: Sequence[str], *, training: bool) -> None:
    """Fail unless all give what the eager loop gives, within the tolerance of the dtype."""
    wanted: dict[str, Tensor | None] = {}
    for backend in backends:
        got = {"y": run(p, backend, training=training)} | {name: leaf.grad for name, leaf in p.leaves().items()}
        wanted = wanted or got
        for name, value in got.items():
            assert_close(f"{name} of {backend}", value, wanted[name])


def measure(shape: Sequence[int], dtype: torch.dtype, routing: str, args: Args, *, training: bool) -> dict[str, Any]:
    p = problem_of(shape, dtype, routing, args.device)
    p.experts.train(training)
    copied = p.ids.numel() * 3 * p.experts.down_proj[0].numel() * dtype.itemsize
    backends = [name for name in BACKENDS if name != "batched_mm" or copied <= MOST_COPIED]
    if args.quick and shape[3] > 8:  # whose loops take many times as long
        backends = [
            name for name in backends if name == "grouped_mm" or name == OURS or (name == "eager" and not training)
        ]
    check_equal(p, backends, training=training)
    runs: dict[str, Callable[[], float]] = {
        name: partial(seconds_of, partial(run, p, name, training=training)) for name in backends
    }
    seconds, spread = timed(
        runs, seconds=0.001 if args.tiny else 0.0 if args.quick else args.seconds, least=1 if args.tiny else 5,
        most=5 if args.quick and training else 50,
    )  # fmt: skip
    best = min((name for name in backends if name != OURS), key=seconds.__getitem__)
    return {
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "routing": routing,
        "pass": "step" if training else "decode",
        "device": args.device,
        "seconds": seconds,
        "spread": spread,
        "best": best,
        "over_best": seconds[OURS] / seconds[best],
    }


def show(records: list[dict[str, Any]]) -> None:
    table = Table("T D F E K", "dtype", "routing", "pass", title="milliseconds")
    for name in (*BACKENDS, "over the best other"):
        table.add_column(name, justify="right")
    for r in records:
        times = [f"{1e3 * r['seconds'][name]:.2f}" if name in r["seconds"] else "-" for name in BACKENDS]
        table.add_row(
            " ".join(map(str, r["shape"])), r["dtype"], r["routing"], r["pass"], *times,
            f"{r['over_best']:.2f} ({r['best']})",
        )  # fmt: skip
    Console(width=160).print(table)


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    register()
    about, records = machine(), []
    steps, decodes = (TINY, TINY) if args.tiny else (OTHER_STEPS, OTHER_DECODES) if args.kept_back else (STEPS, DECODES)
    shapes = [(shape, True) for shape in steps] + [(shape, False) for shape in decodes]
    for shape, training in shapes:
        for dtype in args.dtypes:
            for routing in args.routings:
                records.append(about | measure(shape, getattr(torch, dtype), routing, args, training=training))
    if not args.tiny or args.out != RESULTS:
        save(records, args.out, figure=FIGURE)
    show(records)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
