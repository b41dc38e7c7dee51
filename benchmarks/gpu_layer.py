"""A whole layer, router and host included, and where its time goes: `benchmarks/gpu.py --part layer profile`.

layer: inference and training steps (forward, backward, AdamW) of an `MoE`, eager; inference also as a replayed CUDA
graph and compiled to one graph by inductor, beside the time of reading the weights in use. profile: the microseconds of
each GPU kernel of one forward and backward, by torch.profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_graphs import Step, captured, step_of, twin
from gpu_problem import DECODE, LARGE, SWIN, TINY, Shape, fused, problem_of, timed, weights_in_use
from gpu_session import Record, Session, clocks
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from synchromesh.kernels.tiles import interpreted
from synchromesh.moe.capacity import Dropless


def compiled(step: Step) -> Callable[[], object]:
    """Return the same step on a layer that inductor has compiled to one graph."""
    layer = torch.compile(step.layer, fullgraph=True)
    return Step(layer, step.optimizer, step.x, step.dy)


def ways(step: Step, *, trains: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "eager", step
    if interpreted():
        return
    if not trains:
        yield "replayed", captured(twin(step))[0]
        yield "compiled", compiled(twin(step))


def layer_of(shape: Shape, session: Session, *, trains: bool) -> Record:
    """Time one layer in each way that works; of one that does not, its reason."""
    step = step_of(shape, Dropless(), session.device, trains=trains)
    runs: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name, run in ways(step, trains=trains):
        try:
            run()
            runs[name] = run
        except Exception as error:  # noqa: BLE001  a way that fails is told of, the others are timed
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if not trains:
        runs["bytes"] = partial(torch.amax, weights_in_use(problem_of(shape, "balanced", session.device)))
    return {"seconds": timed(runs, session.args.seconds), "failed": failed, **clocks()}


def layer_part(session: Session) -> bool:
    """Time whole layers: decoding first, then SwinV2-MoE-B's, then large ones."""
    table = Table("T D F E K", "pass", "eager, ms", "replayed, ms", "compiled, ms", "bytes, ms", "failed")
    steps = [(shape, False) for shape in DECODE] + [(shape, trains) for shape in SWIN for trains in (False, True)]
    steps += [(shape, True) for shape in LARGE[:1]]
    for shape, trains in [(TINY[0], False), (TINY[1], True)] if session.args.tiny else steps:
        about = {"shape": str(shape), "gated": shape.gated, "pass": "step" if trains else "forward"}
        if session.late():
            session.write("layer", {**about, "left_out": "no time is left"})
            continue
        record = layer_of(shape, session, trains=trains)
        session.write("layer", about | record)
        ms = [f"{1e3 * record['seconds'][n]:.3f}" if n in record["seconds"] else "-" for n in NAMES]
        table.add_row(about["shape"], about["pass"], *ms, ", ".join(record["failed"]) or "-")
    Console(width=160).print(table)
    return True


NAMES = ("eager", "replayed", "compiled", "bytes")


def profile_part(session: Session) -> bool:
    """Write down what each kernel of a forward and backward takes, on the large shapes and SwinV2-MoE's."""
    activity = ProfilerActivity.CPU if session.device == "cpu" else ProfilerActivity.CUDA
    for shape in TINY[:1] if session.args.tiny else [*LARGE, *SWIN]:
        about = {"shape": str(shape), "gated": shape.gated}
        if session.late():
            session.write("profile", {**about, "left_out": "no time is left"})
            continue
        p = problem_of(shape, "balanced", session.device)
        run = partial(p.run, fused(p), backward=True)
        for _ in range(1 if interpreted() else 3):
            run()
        with profile(activities=[activity]) as prof:
            run()
        kernels = {event.key: spent(event, session.device) for event in prof.key_averages()}
        most = sorted(kernels.items(), key=lambda each: -each[1])[:30]
        session.write("profile", about | {"microseconds": dict(most)})
    return True


def spent(event: object, device: str) -> float:
    """Return the microseconds of an event of the profiler, on the device it runs on."""
    return float(getattr(event, "self_cpu_time_total" if device == "cpu" else "self_device_time_total"))
