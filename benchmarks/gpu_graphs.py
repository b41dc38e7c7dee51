"""Whole steps of a layer as CUDA graphs: what `benchmarks/gpu.py --part graphs` captures, compares and times.

A step leaves nothing to the host: the tensors that it reads and writes stay where they are, and new inputs are copied
into them before a replay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_problem import DECODE, Shape, timed
from gpu_session import Record, Session
from rich.console import Console
from rich.table import Table
from torch import Tensor

from synchromesh import (
    Dropless,
    FixedCapacity,
    GatedMLPExperts,
    LoadBalance,
    Local,
    MLPExperts,
    MoE,
    TopKRouter,
    aux_loss,
    load_stats,
)
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.tiles import interpreted
from synchromesh.moe.capacity import Capacity
from synchromesh.testing.compare import TOLERANCE, relative_rms
from synchromesh.testing.reads import HostReads

Results = dict[str, Tensor]
WARM_UPS = 3  # steps that compile kernels and make the optimizer's state, before a capture
REPLAYS = 3  # on new inputs each
TRAIN = [Shape(8192, 2048, 1024, 64, 8), Shape(4608, 1024, 4096, 32, 1, False)]
SMALL = [Shape(10, 24, 40, 3, 2), Shape(10, 16, 24, 2, 1, False)]  # for the interpreter
CAPACITIES: dict[str, Capacity] = {"capacity 1.25": FixedCapacity(1.25), "dropless": Dropless()}


@dataclass(frozen=True)
class Step:
    """One step of a layer, called without arguments; returns what it computed.

    Attributes:
        optimizer: None in inference: forward alone.
        x: [T, D]. dy: [T, D], the gradient of the output.
    """

    layer: MoE
    optimizer: torch.optim.Optimizer | None
    x: Tensor
    dy: Tensor

    def __call__(self) -> Results:
        if self.optimizer is None:
            with torch.no_grad():
                return {"y": self.layer(self.x)}
        self.optimizer.zero_grad()
        self.x.grad = None
        y = self.layer(self.x)
        loss = aux_loss(self.layer)  # read inside the step: it holds the losses of all forwards before
        torch.autograd.backward((y, loss), (self.dy, torch.ones_like(loss)))
        self.optimizer.step()
        load = load_stats(self.layer)[""]
        assert self.x.grad is not None
        found = {"y": y.detach(), "loss": loss.detach(), "gradient of x": self.x.grad}
        found |= {"tokens": load.tokens_per_expert, "dropped": load.dropped}
        return found | {name: parameter.detach() for name, parameter in self.layer.named_parameters()}

    def fill(self, seed: int) -> None:
        """Put other inputs where the old ones were."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (self.x, self.dy):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def step_of(shape: Shape, capacity: Capacity, device: str, *, trains: bool) -> Step:
    """Return a step of a bfloat16 layer; float32 in the interpreter, which multiplies bfloat16 wrongly."""
    torch.manual_seed(0)
    experts = GatedMLPExperts if shape.gated else MLPExperts
    with torch.device(device):
        router = TopKRouter(shape.width, shape.experts, k=shape.choices)
        layer = MoE(
            router, experts(shape.experts, shape.width, hidden=shape.hidden), capacity=capacity,
            losses=(LoadBalance(0.01),), strategy=Local(kernels=TRITON),
        )  # fmt: skip
        layer = layer.to(torch.float32 if interpreted() else torch.bfloat16).train(trains)
        x, dy = (next(layer.experts.parameters()).new_zeros(shape.tokens, shape.width) for _ in range(2))
    step = Step(layer, optimizer_of(layer) if trains else None, x.requires_grad_(trains), dy)
    step.fill(0)
    return step


def optimizer_of(layer: MoE) -> torch.optim.Optimizer:
    """Return AdamW that keeps its count of steps on the device; it does so on GPUs only."""
    parameters = list(layer.parameters())
    if parameters[0].is_cuda:
        return torch.optim.AdamW(parameters, lr=1e-3, capturable=True)
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def twin(step: Step) -> Step:
    """Return the same step, in the same state, on tensors of its own."""
    layer, optimizer = copy.deepcopy(step.layer), None
    if step.optimizer is not None:
        optimizer = optimizer_of(layer)
        optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    x, dy = step.x.detach().clone(), step.dy.clone()
    return Step(layer, optimizer, x.requires_grad_(step.x.requires_grad), dy)


def captured(step: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Return a replay of the step, and the tensors that each replay writes its results to.

    Where Triton is interpreted there is nothing to capture: the step runs again, and its results are copied there.
    """
    if interpreted():
        results = {name: tensor.clone() for name, tensor in step().items()}

        def again() -> None:
            for name, tensor in step().items():
                results[name].copy_(tensor)

        return again, results
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph.replay, results


def worst(step: Step) -> tuple[float, Callable[[], None]]:
    """Return the largest error of replays on new inputs against eager steps, and the replay."""
    replay, results = captured(step)
    eager, errors = twin(step), []
    for seed in range(1, REPLAYS + 1):
        for one in (step, eager):
            one.fill(seed)
        replay()
        errors += [relative_rms(results[name], wanted) for name, wanted in eager().items()]
    return max(errors), replay


def tried(shape: Shape, capacity: Capacity, session: Session, *, trains: bool) -> Record:
    """Capture one step; return whether its replays give what eager steps give, both times, and what the host read."""
    step = step_of(shape, capacity, session.device, trains=trains)
    record: Record = {"captured": not interpreted()}
    if not interpreted():
        with HostReads() as reads:  # where to look if the capture fails
            twin(step)()
        record["host_reads"] = reads.found
    try:
        error, replay = worst(step)
    except RuntimeError as refused:  # the reason why CUDA cannot capture it
        return record | {"passed": False, "error": str(refused).splitlines()[0]}
    eager = twin(step)
    record |= {"error": error, "passed": error <= TOLERANCE[step.x.dtype]}
    return record | {"seconds": timed({"eager": eager, "replayed": replay}, session.args.seconds)}


def graphs_part(session: Session) -> bool:
    """Capture every step, show the times, tell whether all replays were right."""
    table, right = Table("T D F E K", "capacity", "pass", "passed", "error", "eager, ms", "replayed, ms"), True
    steps = [(shape, False) for shape in DECODE] + [(shape, True) for shape in TRAIN]
    steps = [(SMALL[0], False), (SMALL[1], True)] if session.args.tiny else steps
    for shape, trains in steps:
        for name, capacity in CAPACITIES.items():
            about = {"shape": str(shape), "gated": shape.gated, "capacity": name}
            about["pass"] = "step" if trains else "forward"
            if session.late():
                session.write("graphs", {**about, "left_out": "no time is left"})
                continue
            record = tried(shape, capacity, session, trains=trains)
            session.write("graphs", about | record)
            times = [f"{1e3 * seconds:.3f}" for seconds in record.get("seconds", {}).values()]
            said = [about["shape"], name, about["pass"], record["passed"], record["error"], *times]
            table.add_row(*map(str, said))
            right = right and record["passed"]
    Console(width=200).print(table)
    return right
