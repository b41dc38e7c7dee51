"""One MoE layer on a CPU: its time and memory against the pure matrix products and against other layers.

    python benchmarks/layer.py                       # every shape, fp32 and bf16, balanced and Zipf routing
    python benchmarks/layer.py --shapes 1 3 --quick  # two shapes, few rounds

All contestants compute y = Σ_k w_k gelu(x upᵀ) down without biases, from the same routing, and are first compared with
each other, output and gradients; where they differ no time is printed. Rounds are interleaved, times are medians.
The limit is the fastest of a loop of products into preallocated outputs, bmm (even loads only), grouped_mm and, in
float32, a loop of oneDNN's products, on rows already sorted. Peak memory is the resident set at its highest during one
run above what it was before, gradients included (Linux: /proc/self/clear_refs and VmHWM).
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from timing import machine, save
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from synchromesh import MLPExperts, MoE, TopKRouter
from synchromesh.kernels import CPU
from synchromesh.kernels.matmul import has_onednn, turned_by_onednn
from synchromesh.kernels.pages import pages
from synchromesh.testing.cases import balanced, routing_of, zipf
from synchromesh.testing.compare import assert_close
from synchromesh.torch_private import onednn_linear

SHAPES = [
    (4096, 2048, 2048, 2, 2),
    (4096, 512, 2048, 8, 1),
    (4096, 512, 2048, 32, 1),
    (4096, 512, 2048, 32, 2),
    (4096, 256, 512, 64, 4),
    (256, 512, 2048, 64, 2),
]
KEPT_BACK = [(2048, 384, 1536, 12, 2), (2048, 768, 1024, 16, 4), (1024, 320, 640, 48, 6), (1024, 512, 256, 128, 8)]
ROUTINGS = {"balanced": balanced, "zipf": zipf}
FIGURE = ("machine", "threads", "shape", "dtype", "routing", "pass")  # what tells a record from others
RESULTS = Path(__file__).parent / "results" / "layer.jsonl"


@dataclass(frozen=True)
class Args:
    """What to measure.

    shapes: indices, all by default. seconds: of timing per contestant. quick: five rounds, without contestants that
    take many times as long as others. kept_back: shapes that nothing was developed on.
    """

    shapes: list[int] = field(default_factory=lambda: list(range(len(SHAPES))))
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    seconds: float = 2.0
    quick: bool = False
    kept_back: bool = False
    out: Path = RESULTS


@dataclass(frozen=True)
class Problem:
    """Tensors that all contestants share; rows are sorted by expert for the limit."""

    ids: Tensor
    x: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    grad: Tensor

    @property
    def counts(self) -> Tensor:
        return self.ids.flatten().bincount(minlength=len(self.up))


def problem_of(shape: Sequence[int], dtype: torch.dtype, routing: str) -> Problem:
    tokens, width, hidden, experts, choices = shape
    torch.manual_seed(0)
    return Problem(
        ids=ROUTINGS[routing](tokens, experts, choices),
        x=torch.randn(tokens, width).to(dtype).requires_grad_(),
        weights=torch.rand(tokens, choices).to(dtype).requires_grad_(),
        up=nn.Parameter((torch.randn(experts, hidden, width) / width**0.5).to(dtype)),
        down=nn.Parameter((torch.randn(experts, hidden, width) / hidden**0.5).to(dtype)),
        grad=torch.randn(tokens, width).to(dtype),
    )


@dataclass(frozen=True)
class Contestant:
    """A layer. turned: its down is laid out [E D F]."""

    forward: Callable[[], Tensor]
    down: Tensor
    turned: bool = False


def ours(p: Problem) -> Contestant:
    num_experts, hidden, width = p.up.shape
    with torch.device("meta"):
        experts = MLPExperts(num_experts, width, hidden=hidden, up_bias=False, down_bias=False)
    experts.up, experts.down = p.up, p.down
    layer, routing = MoE(TopKRouter(width, num_experts), experts), routing_of(p.ids, num_experts, p.weights)
    return Contestant(lambda: layer(p.x, routing=routing), p.down)  # the router's own product is not what is measured


def padded(p: Problem) -> Contestant:
    """Pad every expert to the largest count and multiply in batches; padding rows are never read back."""
    num_experts, _, width = p.up.shape
    tokens, choices = p.ids.shape

    def forward() -> Tensor:
        places, counts = CPU.positions(p.ids, num_experts)
        most = int(counts.max())
        slots = (p.ids * most + places).view(-1)
        token_of_slot = torch.zeros(num_experts * most, dtype=torch.int64)
        token_of_slot[slots] = torch.arange(tokens).repeat_interleave(choices)
        buffer = p.x.index_select(0, token_of_slot).view(num_experts, most, width)
        out = torch.bmm(F.gelu(torch.bmm(buffer, p.up.mT)), p.down).view(-1, width)
        return torch.bmm(p.weights[:, None], out.index_select(0, slots).view(tokens, choices, width))[:, 0]

    return Contestant(forward, p.down)


def transformers_experts(implementation: str) -> Callable[[Problem], Contestant]:
    def build(p: Problem) -> Contestant:
        num_experts, hidden, width = p.up.shape
        config = SimpleNamespace(
            n_routed_experts=num_experts,
            hidden_size=width,
            moe_intermediate_size=hidden,
            moe_latent_size=None,
            mlp_hidden_act="gelu",
            _experts_implementation=implementation,
        )
        with torch.device("meta"):
            experts = NemotronHExperts(config)
        experts.up_proj, experts.down_proj = p.up, nn.Parameter(p.down.detach().mT.contiguous())
        return Contestant(lambda: experts(p.x, p.ids, p.weights), experts.down_proj, turned=True)

    return build


CONTESTANTS = {
    "ours": ours,
    "padded": padded,
    "hf_grouped_mm": transformers_experts("grouped_mm"),
    "hf_eager": transformers_experts("eager"),
}


def limits(p: Problem, *, backward: bool) -> dict[str, Callable[[], None]]:
    """Return each way of doing nothing but the matrix products, on sorted rows, into preallocated outputs."""
    sizes = p.counts.tolist()
    num_rows, (num_experts, hidden, width) = sum(sizes), p.up.shape
    with torch.no_grad():
        rows, grads = torch.randn(2, num_rows, width).to(p.x.dtype)
        h, d_h = torch.empty(2, num_rows, hidden, dtype=p.x.dtype)
        y, d_rows = torch.empty_like(rows), torch.empty_like(rows)
        up, down = p.up.detach(), p.down.detach()
        d_up, d_down = torch.empty_like(up), torch.empty_like(down)

    def loop() -> None:
        split = [t.split(sizes) for t in (rows, h, y, grads, d_h, d_rows)]
        for e, (rows_e, h_e, y_e, grads_e, d_h_e, d_rows_e) in enumerate(zip(*split, strict=True)):
            torch.mm(rows_e, up[e].t(), out=h_e)
            torch.mm(h_e, down[e], out=y_e)
            if backward:
                torch.mm(grads_e, down[e].t(), out=d_h_e)
                torch.mm(h_e.t(), grads_e, out=d_down[e])
                torch.mm(d_h_e.t(), rows_e, out=d_up[e])
                torch.mm(d_h_e, up[e], out=d_rows_e)

    def bmm() -> None:
        rows_e, h_e, y_e, grads_e, d_h_e, d_rows_e = (
            t.view(num_experts, -1, t.shape[1]) for t in (rows, h, y, grads, d_h, d_rows)
        )
        torch.bmm(rows_e, up.mT, out=h_e)
        torch.bmm(h_e, down, out=y_e)
        if backward:
            torch.bmm(grads_e, down.mT, out=d_h_e)
            torch.bmm(h_e.mT, grads_e, out=d_down)
            torch.bmm(d_h_e.mT, rows_e, out=d_up)
            torch.bmm(d_h_e, up, out=d_rows_e)

    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)

    def grouped() -> None:
        h = F.grouped_mm(rows, up.mT, offs=ends)
        F.grouped_mm(h, down, offs=ends)
        if backward:
            d_h = F.grouped_mm(grads, down.mT, offs=ends)
            F.grouped_mm(h.t(), grads, offs=ends)
            F.grouped_mm(d_h.t(), rows, offs=ends)
            F.grouped_mm(d_h, up, offs=ends)

    def onednn() -> None:
        for e, (rows_e, grads_e) in enumerate(zip(rows.split(sizes), grads.split(sizes), strict=True)):
            if len(rows_e):
                h_e = onednn_linear(rows_e, up[e], None, gelu=False)
                onednn_linear(h_e, down[e].t(), None, gelu=False)
                if backward:
                    d_h_e = onednn_linear(grads_e, down[e], None, gelu=False)
                    d_down[e] = turned_by_onednn(h_e, grads_e)
                    d_up[e] = turned_by_onednn(d_h_e, rows_e)
                    onednn_linear(d_h_e, up[e].t(), None, gelu=False)

    even = {"bmm": bmm} if len(set(sizes)) == 1 else {}
    other = {"oneDNN": onednn} if has_onednn(p.x.dtype) else {}
    return {"loop": loop, **even, "grouped_mm": grouped, **other}


def forget(p: Problem, contestants: dict[str, Contestant]) -> None:
    """Drop all gradients."""
    for leaf in (p.x, p.weights, p.up, *(contestant.down for contestant in contestants.values())):
        leaf.grad = None


def run_once(p: Problem, contestant: Contestant, *, backward: bool) -> float:
    """Return the seconds of one run; gradients are those of this run alone."""
    forget(p, {"own": contestant})
    with torch.set_grad_enabled(backward):
        start = time.perf_counter()
        y = contestant.forward()
        if backward:
            y.backward(p.grad)
        return time.perf_counter() - start


def check_equal(p: Problem, contestants: dict[str, Contestant]) -> None:
    """Fail unless all give the same output and gradients, within the tolerance of the dtype."""
    wanted: dict[str, Tensor] = {}
    for name, contestant in contestants.items():
        forget(p, contestants)
        y = contestant.forward()
        y.backward(p.grad)
        d_down = contestant.down.grad
        assert d_down is not None
        got = {"y": y.detach(), "x": p.x.grad, "weights": p.weights.grad, "up": p.up.grad}
        got["down"] = d_down.mT if contestant.turned else d_down
        wanted = wanted or got
        for part, value in got.items():
            assert_close(f"{part} of {name} against {next(iter(contestants))}", value, wanted[part])


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Return the most memory the process held during a run above what it held before; None where Linux is missing."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    pages().clear()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed is held no longer
    reset.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


Timed = tuple[dict[str, float], dict[str, float]]  # medians, and spreads as shares of them


def spreads(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the longest less the shortest time of each, as a share of the median."""
    return {name: (max(own) - min(own)) / statistics.median(own) for name, own in times.items()}


def timed(runs: dict[str, Callable[[], float]], *, seconds: float, least: int, most: int = 50) -> Timed:
    """Return the median time of each and its spread, over interleaved rounds; who has used up his seconds sits out.

    Each runs twice in a round and the second time counts, as in training, where a step follows its like: the host of
    a virtual machine takes freed memory back within seconds, and to get it again costs more than many a product.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    while True:
        waiting = [name for name, own in times.items() if len(own) < least or sum(own) < seconds]
        waiting = [
            name
            for name in waiting
            if len(times[name]) < most and (sum(times[name]) < 4 * seconds or len(times[name]) < least)
        ]
        if not waiting:
            return {name: statistics.median(own) for name, own in times.items()}, spreads(times)
        for name in waiting:
            runs[name]()
            times[name].append(runs[name]())


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(shape: Sequence[int], dtype: torch.dtype, routing: str, args: Args) -> list[dict[str, object]]:
    """Return one record for the forward and one for forward and backward."""
    p = problem_of(shape, dtype, routing)
    slow = {"hf_eager", *(["padded"] if routing == "zipf" else [])} if args.quick and shape[3] > 8 else set()
    contestants = {name: build(p) for name, build in CONTESTANTS.items() if name not in slow}
    check_equal(p, contestants)
    about = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "routing": routing}
    return [measure_pass(p, contestants, args, backward=backward) | about for backward in (False, True)]


def measure_pass(p: Problem, contestants: dict[str, Contestant], args: Args, *, backward: bool) -> dict[str, object]:
    bare = limits(p, backward=backward)
    runs: dict[str, Callable[[], float]] = {f"limit {name}": partial(seconds_of, run) for name, run in bare.items()}
    runs |= {name: partial(run_once, p, c, backward=backward) for name, c in contestants.items()}
    for run in runs.values():
        run()
    bounds = {"seconds": 0.0, "least": 5, "most": 5} if args.quick else {"seconds": args.seconds, "least": 4}
    times, spread = timed(runs, **bounds)
    peaks = {}
    for name in contestants:
        forget(p, contestants)
        peaks[name] = peak_bytes(runs[name])
    forget(p, contestants)
    best = min((name for name in times if name.startswith("limit")), key=times.__getitem__)
    seconds = {"limit": times[best], **{name: times[name] for name in contestants}}
    return {
        "pass": "forward+backward" if backward else "forward",
        "limit": best.removeprefix("limit "),
        "seconds": seconds,
        "spread": {name: spread[name] for name in contestants},
        "peak_bytes": peaks,
        **verdict(p, seconds),
    }


def verdict(p: Problem, seconds: dict[str, float]) -> dict[str, object]:
    """Compare with what is wanted of the layer."""
    mean, most = p.ids.numel() / len(p.up), int(p.counts.max())
    mine, limit = seconds["ours"], seconds["limit"]
    others = {name: taken for name, taken in seconds.items() if name not in ("ours", "limit")}
    best_other = min(others.values())
    bound = 1.25 if p.x.shape[1] >= 512 and mean >= 128 else 1.6
    met = {f"at most {bound}x the limit": mine <= bound * limit}
    if most <= mean + 1:
        met["at most 1.03x the best other"] = mine <= 1.03 * best_other
    else:
        met["faster than transformers"] = mine < min(own for name, own in others.items() if name != "padded")
        if most >= 2 * mean and "padded" in others:
            met["1.5x faster than padded"] = 1.5 * mine <= others["padded"]
    return {
        "over_limit": mine / limit,
        "over_best_other": mine / best_other,
        "padded_over_ours": others["padded"] / mine if "padded" in others else None,
        "largest_over_mean_count": most / mean,
        "met": met,
    }


def show(records: list[dict[str, object]]) -> None:
    table = Table("T D F E K", "dtype", "routing", "pass", title="milliseconds (MiB at peak)")
    for name in ("limit", *CONTESTANTS, "over limit", "over best", "misses"):
        table.add_column(name, justify="right")
    for r in records:
        cells = [f"{r['seconds']['limit'] * 1e3:.1f} {r['limit']}"]
        cells += [
            f"{r['seconds'][c] * 1e3:.1f} ({(r['peak_bytes'][c] or 0) / 2**20:.0f})" if c in r["seconds"] else "-"
            for c in CONTESTANTS
        ]
        missed = ", ".join(name for name, met in r["met"].items() if not met)
        ratios = [f"{r['over_limit']:.2f}", f"{r['over_best_other']:.2f}", missed or "-"]
        shape = " ".join(map(str, r["shape"]))
        table.add_row(shape, r["dtype"], r["routing"], r["pass"], *cells, *ratios)
    Console(width=200).print(table)


def main(args: Args) -> None:
    about = machine()
    records = []
    shapes = KEPT_BACK if args.kept_back else [SHAPES[index] for index in args.shapes]
    for shape in shapes:
        for dtype in args.dtypes:
            for routing in ROUTINGS:
                found = measure(shape, getattr(torch, dtype), routing, args)
                records += [{**about, **record} for record in found]
                save(records, args.out, figure=FIGURE)  # a run that is cut keeps what it has
    show(records)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
