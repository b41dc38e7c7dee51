"""Measure what products of matrices cost this CPU, in seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from synchromesh.kernels.matmul import has_onednn
from synchromesh.kernels.product_costs import NOISE, Cost, Machine, ProductCosts, cpu_model
from synchromesh.torch_private import onednn_linear

EXPERTS = 128  # whose matrices are more than caches hold, as those of a layer are when its turn comes again
SMALL = (8, 64)  # rows, and the width of matrices, of products that cost little more than their call
WIDTH = 512
ROWS = (2, 34)
MANY = 256  # rows at which a library shows whether it uses a processor's full width, where others are as fast as ever
DTYPES = (torch.float32, torch.bfloat16)


def measure(*, seconds: float = 0.5, dtypes: Sequence[torch.dtype] = DTYPES) -> Machine:
    """Return the costs of products with as many threads as torch has now.

    Args:
        seconds: for each of three or four sizes of a dtype.
        dtypes: float32 and what else.
    """
    products = {str(dtype).removeprefix("torch."): _measured(dtype, seconds) for dtype in dtypes}
    return Machine(cpu_model(), torch.get_num_threads(), str(torch.__version__), products)


def fitted(small: float, few: float, many: float, *, calls: int) -> Cost:
    """Return the cost of which three timings of `EXPERTS` experts tell, in so many calls."""
    (least, width), (low, high), numbers = SMALL, ROWS, WIDTH**2
    row = max(0.0, (many - few) / (EXPERTS * numbers * (high - low)))
    of_rows = row * (numbers * low - width**2 * least)
    number = max(0.0, ((few - small) / EXPERTS - of_rows) / (numbers - width**2))
    call = max(0.0, (small - EXPERTS * width**2 * (number + least * row)) / calls)
    return Cost(call, number, row)


def _measured(dtype: torch.dtype, seconds: float) -> ProductCosts:
    timings = [_timed(dtype, rows, width, seconds) for rows, width in (SMALL, *((rows, WIDTH) for rows in ROWS))]
    alone, batched, *onednn = zip(*timings, strict=True)
    costs = ProductCosts(fitted(*alone, calls=EXPERTS), fitted(*batched, calls=1))
    if onednn:
        by_torch, _, by_onednn = _timed(dtype, MANY, WIDTH, seconds)
        if NOISE * by_onednn < by_torch:  # at few rows torch's library may just be slow
            return dataclasses.replace(costs, onednn=fitted(*onednn[0], calls=EXPERTS))
    return costs


def _timed(dtype: torch.dtype, rows: int, width: int, seconds: float) -> list[float]:
    """Return the seconds of the ways: one by one, in one call, and by oneDNN where torch takes another library."""
    a, out = torch.randn(2, EXPERTS, rows, width).to(dtype)
    matrices = torch.randn(EXPERTS, width, width).to(dtype)
    runs = [lambda: _each(a, matrices, out, _by_torch), lambda: torch.bmm(a, matrices, out=out)]
    if has_onednn(dtype):
        runs.append(lambda: _each(a, matrices, out, _by_onednn))
    return _quickest(runs, seconds)


def _each(a: Tensor, matrices: Tensor, out: Tensor, multiply: Callable[[Tensor, Tensor, Tensor], object]) -> None:
    for own, matrix, to in zip(a.unbind(0), matrices.unbind(0), out.unbind(0), strict=True):
        multiply(own, matrix, to)


def _by_torch(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out=out)


def _by_onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(onednn_linear(a, b.t(), None, gelu=False))


def _quickest(runs: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Return the shortest time of each, in turns: others may compute beside."""
    taken: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 3:
        for run, own in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    return [min(own) for own in taken]
