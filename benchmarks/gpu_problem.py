"""A layer with a fixed routing, contestants that compute it on one GPU, and how they are timed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from gpu_rivals import LIBRARIES, Contestant
from torch import Tensor

from synchromesh.kernels import MLPWeights
from synchromesh.kernels.gpu import GLUON, TRITON
from synchromesh.kernels.grouped_mm import gluon
from synchromesh.kernels.tiles import interpreted
from synchromesh.moe.capacity import Dropless
from synchromesh.testing.cases import balanced, routing_of, zipf
from synchromesh.testing.compare import relative_rms
from synchromesh.types import Routing, RowMap


@dataclass(frozen=True)
class Shape:
    """T tokens of width D through E experts of hidden width F, K of them each."""

    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int
    gated: bool = True

    def __str__(self) -> str:
        return " ".join(map(str, dataclasses.astuple(self)[:5]))

    @property
    def rows(self) -> int:
        return self.tokens * self.choices

    @property
    def product_flops(self) -> int:
        """Of all rows times one matrix of their expert."""
        return 2 * self.rows * self.width * self.hidden


LARGE = [Shape(32768, 2048, 1024, 64, 8), Shape(32768, 4096, 1536, 128, 8), Shape(8192, 4096, 14336, 8, 2)]
SWIN = [Shape(18432, 512, 2048, 32, 1, False), Shape(4608, 1024, 4096, 32, 1, False)]  # 128 images of 192 px, B
DECODE = [Shape(tokens, 4096, 1536, 128, 8) for tokens in (1, 8, 64)]
SHAPES = [
    *LARGE, Shape(32768, 2048, 512, 256, 32), Shape(8192, 2048, 1408, 64, 4), *SWIN, *DECODE,
    Shape(8192, 2048, 2048, 2, 2, False), Shape(8192, 7168, 2048, 256, 8),  # the last one takes 44 GB and its gradients
]  # fmt: skip
TINY = [Shape(48, 32, 64, 4, 2), Shape(40, 24, 40, 3, 1, False)]  # in place of all of them
ROUTINGS = {"balanced": balanced, "zipf": zipf}
RIVALS = ("grouped_mm", "grouped_mm unsorted", "padded bmm", *LIBRARIES)


@dataclass(frozen=True)
class Problem:
    """What all contestants share."""

    shape: Shape
    routing: Routing
    rowmap: RowMap
    x: Tensor
    mlp: MLPWeights
    dy: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        mlp = self.mlp
        return [self.routing.weights, mlp.up, mlp.down] + ([] if mlp.gate is None else [mlp.gate])

    def run(self, contestant: Contestant, *, backward: bool) -> Tensor:
        """Run a contestant once; gradients are those of this run alone."""
        for leaf in (self.x, *self.parameters, *contestant.own):
            leaf.grad = None
        with torch.set_grad_enabled(backward):
            y = contestant.forward()
        if backward:
            y.backward(self.dy)
        return y.detach()

    def experts(self, rows: Tensor, multiply: Callable[..., Tensor]) -> Tensor:
        """Run rows through their experts, given a product of each expert's rows with its matrix."""
        hidden = multiply(rows, self.mlp.up.mT)
        hidden = F.gelu(hidden) if self.mlp.gate is None else F.silu(multiply(rows, self.mlp.gate.mT)) * hidden
        return multiply(hidden, self.mlp.down)


def problem_of(shape: Shape, routing: str, device: str) -> Problem:
    torch.manual_seed(0)
    torch.cuda.empty_cache()  # `padded` looks at what is free
    random = partial(torch.randn, device=device, dtype=torch.bfloat16)
    ids = ROUTINGS[routing](shape.tokens, shape.experts, shape.choices)
    weights = torch.rand(ids.shape, device=device).requires_grad_()
    given = routing_of(ids, shape.experts, weights.detach().cpu())
    given = dataclasses.replace(given, expert_ids=ids.to(device), weights=weights)
    scales = (shape.width, shape.hidden, shape.width)[: 2 + shape.gated]
    matrices = [random(shape.experts, shape.hidden, shape.width).mul_(n**-0.5).requires_grad_() for n in scales]
    x, dy = (random(shape.tokens, shape.width) for _ in range(2))
    return Problem(shape, given, Dropless()(given, max), x.requires_grad_(), MLPWeights(*matrices), dy)


def fused(p: Problem) -> Contestant:
    activation = F.silu if p.shape.gated else F.gelu
    return Contestant(lambda: TRITON.fused_mlp(p.x, p.routing.weights, p.rowmap, p.mlp, activation))


def fused_by_gluon(p: Problem) -> Contestant:
    """Use the Gluon kernels, whatever the measured table says of them. Raises ValueError where they do not run."""
    if not gluon.takes(p.x, tuple(p.mlp.down.shape)):
        raise ValueError("the Gluon kernels are for bfloat16 and float16 on sm_90 and sm_100")
    activation = F.silu if p.shape.gated else F.gelu
    return Contestant(lambda: GLUON.fused_mlp(p.x, p.routing.weights, p.rowmap, p.mlp, activation))


def grouped(p: Problem, *, scatter: bool) -> Contestant:
    """Use torch's grouped_mm; weighted rows are added up by index_add (torchtitan), or unsorted (transformers)."""
    multiply = partial(getattr(F, "grouped_mm", None) or torch._grouped_mm, offs=p.rowmap.ends)
    pairs, tokens, rows = p.rowmap.pairs, p.rowmap.pairs // p.shape.choices, p.rowmap.rows

    def forward() -> Tensor:
        out = p.experts(p.x.index_select(0, tokens), multiply)
        out = out * p.routing.weights.view(-1).index_select(0, pairs)[:, None].to(out.dtype)
        if scatter:
            return torch.zeros_like(p.x).index_add(0, tokens, out)
        return out.index_select(0, rows.view(-1)).view(*rows.shape, -1).sum(1)

    return Contestant(forward)


def padded(p: Problem) -> Contestant:
    """Pad every expert to the largest and multiply in batches. Raises ValueError where that takes too much."""
    ids, ends, shape = p.routing.expert_ids, p.rowmap.ends, p.shape
    counts = ends.diff(prepend=ends.new_zeros(1))
    most = int(counts.max())
    total = shape.experts * most
    size = 2 * (total * (4 * shape.width + 8 * shape.hidden) + sum(map(torch.numel, p.parameters)))
    if total > 16 * shape.rows or (ids.is_cuda and size > torch.cuda.mem_get_info()[0]):
        raise ValueError(f"{total} padded rows for {shape.rows} take about {size / 2**30:.1f} GiB")
    slots = (ids * most + p.rowmap.rows - (ends - counts)[ids]).view(-1)
    tokens = torch.arange(total, device=ids.device) % shape.tokens  # of padding, different ones: one is contended for
    tokens = tokens.scatter(0, slots, torch.arange(shape.rows, device=ids.device) // shape.choices)

    def forward() -> Tensor:
        out = p.experts(p.x.index_select(0, tokens).view(shape.experts, most, -1), torch.bmm)
        out = out.view(total, -1).index_select(0, slots).view(*ids.shape, -1)
        return (out * p.routing.weights[..., None].to(out.dtype)).sum(1)

    return Contestant(forward)


def disagreements(p: Problem, runs: dict[str, Contestant]) -> dict[str, float]:
    """Return the largest error of each against torch's grouped_mm, in the output and the gradients of T rows."""
    found = {name: (p.run(run, backward=True), p.x.grad, p.routing.weights.grad) for name, run in runs.items()}
    wanted = found["grouped_mm"]
    return {name: max(map(relative_rms, own, wanted)) for name, own in found.items()}


def seconds_of(run: Callable[[], object]) -> float:
    if interpreted():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def timed(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median time of each, in interleaved rounds: about `seconds` of the slowest, but 5 to 50 rounds."""
    for run in runs.values():
        run()
    slowest = max(map(seconds_of, runs.values()))
    rounds = 1 if interpreted() else int(min(50, max(5, seconds / slowest)))
    times = [list(map(seconds_of, runs.values())) for _ in range(rounds)]
    return dict(zip(runs, map(statistics.median, zip(*times, strict=True)), strict=True))


def memory(p: Problem, contestant: Contestant, *, backward: bool) -> dict[str, int]:
    """Return the bytes at the peak above what was allocated before, and those kept for backward."""
    given, kept = {parameter.untyped_storage().data_ptr() for parameter in (*p.parameters, *contestant.own)}, {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    p.run(Contestant(lambda: p.x, contestant.own), backward=False)  # drops the gradients of earlier runs
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        p.run(contestant, backward=backward)
    return {"peak": torch.cuda.max_memory_allocated() - before, "saved": sum(kept.values())}


def weights_in_use(p: Problem) -> Tensor:
    """Return as many bytes as the weights of the experts that have rows, to be read."""
    used = len(p.routing.expert_ids.unique())
    matrices = [p.mlp.up, p.mlp.down] + ([] if p.mlp.gate is None else [p.mlp.gate])
    numbers = used * sum(matrix[0].numel() for matrix in matrices)
    return torch.empty(numbers * 2, dtype=torch.uint8, device=p.x.device).view(torch.int32)
