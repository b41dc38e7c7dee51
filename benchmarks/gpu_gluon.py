"""The Gluon kernels as contestants of benchmarks/gpu.py, and alone: checked against float64, then beside Triton's.

    python benchmarks/gpu_gluon.py        # on an sm_90 or sm_100; elsewhere it says so

They have been compiled and emulated, but no card has run them: each contestant is checked before its time counts.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gpu_rivals as rivals
import torch
import torch.nn.functional as F
from gpu_problem import SHAPES, TINY, Problem, Shape, fused, problem_of, timed
from gpu_session import Session
from torch import Tensor

from synchromesh.kernels import REFERENCE, Kernels, MLPWeights
from synchromesh.kernels.gpu import GLUON
from synchromesh.kernels.grouped_mm import gluon
from synchromesh.testing.compare import TOLERANCE, relative_rms

CHECKED = [*TINY, Shape(1000, 200, 328, 7, 3), Shape(2048, 512, 1024, 16, 2, False)]
TIMED = [shape for shape in SHAPES if shape.rows >= 128 * shape.experts]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """A kernel, and what it must agree with.

    Attributes:
        name: of it and its shape.
        run: returns the output and every gradient.
        reference: the same in float64.
        problem: what both compute.
    """

    name: str
    run: Callable[[], Results]
    reference: Callable[[], Results]
    problem: Problem

    def error(self) -> float:
        """Return the largest relative error of any result; twice the same bits, or infinity."""
        got, again, wanted = self.run(), self.run(), self.reference()
        if not all(torch.equal(got[name], again[name]) for name in got):
            return float("inf")
        return max(relative_rms(got[name], wanted[name]) for name in wanted)


def contestants(device: str, shapes: list[Shape] | None = None) -> Iterator[Contestant]:
    """Return one contestant for each shape, balanced and not."""
    for shape in CHECKED if shapes is None else shapes:
        for routing in ("balanced", "zipf"):
            p = problem_of(shape, routing, device)
            yield Contestant(
                f"fused_mlp {shape} {routing}",
                lambda p=p: results(p, GLUON),
                lambda p=p: results(wide(p), REFERENCE),
                p,
            )


def ways() -> dict[str, Callable[..., Tensor]]:
    """Return the Gluon ways to the products of the measured table, by the names of its kinds."""
    return {"product": gluon.product, "weights": gluon.weight_gradient}


def results(p: Problem, kernels: Kernels) -> Results:
    """Run a layer forward and backward."""
    activation = F.silu if p.shape.gated else F.gelu
    run = partial(kernels.fused_mlp, p.x, p.routing.weights, p.rowmap, p.mlp, activation)
    y = p.run(rivals.Contestant(run), backward=True)
    leaves = {"x": p.x, "weights": p.routing.weights, "up": p.mlp.up, "down": p.mlp.down, "gate": p.mlp.gate}
    grads = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {"output": y, **{name: grad for name, grad in grads.items() if grad is not None}}


def wide(p: Problem) -> Problem:
    """Return a problem in float64."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_()

    mlp = MLPWeights(leaf(p.mlp.up), leaf(p.mlp.down), None if p.mlp.gate is None else leaf(p.mlp.gate))
    routing = dataclasses.replace(p.routing, weights=leaf(p.routing.weights))
    return dataclasses.replace(p, routing=routing, x=leaf(p.x), mlp=mlp, dy=p.dy.double())


def gluon_part(session: Session) -> bool:
    """Check and time the Gluon kernels in a process of its own, which is ended where it hangs or breaks its GPU."""
    command = [sys.executable, __file__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(1.0, session.left()))
    except subprocess.TimeoutExpired as late:
        session.write("gluon", {"left_out": f"not done after {late.timeout:.0f} s", "said": str(late.stdout or "")})
        return False
    session.write("gluon", {"passed": done.returncode == 0, "said": done.stdout, "error": done.stderr[-2000:]})
    print(done.stdout)
    return done.returncode == 0


def main() -> int:
    """Check every shape, then time those of the tables; return 1 where a check fails."""
    if not torch.cuda.is_available() or not gluon.takes(torch.empty(1, 8, device="cuda").bfloat16(), (1, 8, 8)):
        print("The Gluon kernels are for sm_90 and sm_100: nothing to run here.")
        return 0
    failed = 0
    for one in contestants("cuda"):
        error = one.error()
        failed += not error <= TOLERANCE[torch.bfloat16]
        print(f"{one.name}: error {error:.3g}")
    for shape in [] if failed else TIMED:
        p = problem_of(shape, "balanced", "cuda")
        runs = {"triton": lambda p=p: p.run(fused(p), backward=True), "gluon": lambda p=p: results(p, GLUON)}
        print(f"{shape}: { ({name: f'{1e3 * seconds:.3f} ms' for name, seconds in timed(runs, 1.0).items()}) }")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
