"""What a planned step is run by: a command line where a recipe has the model, else a script with its command line."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from synchromesh.compat.hf_config import auto_class
from synchromesh.models.shapes import IMPORTS, in_python
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.planner import Planned
from synchromesh.types import Plan, Workload

SCRIPT = "planned.py"
RECIPES = {"swinv2_moe_b": "swinv2_moe_b_22k", "swinv2_moe_s": "swinv2_moe_s_22k"}


@dataclass(frozen=True)
class Asked:
    """What was planned, as the command must repeat it.

    Attributes:
        model: the name of one of our models, the folder of a Hugging Face one, or the work of a single layer.
        cluster: the profile.
        experts: E, where it is not the model's own.
        k: choices, where they are not the model's own.
        capacity: f of FixedCapacity, where it is not the model's own.
        training: whether there is a backward.
    """

    model: str | Path | Workload
    cluster: str
    experts: int | None = None
    k: int | None = None
    capacity: float | None = None
    training: bool = True


def to_paste(planned: Planned, asked: Asked) -> str | None:
    """Return what runs a planned step, or the fastest that fits in its place; None where nothing does."""
    fitting = [one for one in (planned, *planned.would_fit) if one.refused is None and one.arrangement.stages == 1]
    if not fitting:
        return None
    one = fitting[0]
    own = one.arrangement
    by_recipe = isinstance(asked.model, str) and asked.training and one.nesting.copies == 1 and not own.sharded
    if by_recipe:
        return f"{torchrun(one.ranks)} -m -- synchromesh.cli {shlex.join(_train(one, asked))}"
    return f"# {SCRIPT}: {torchrun(one.ranks)} {SCRIPT}\n" + "\n".join(_script(one, asked))


def torchrun(ranks: Ranks) -> str:
    """Return how torchrun starts so many ranks; with several nodes it is given on each, HOST being the first.

    >>> torchrun(Ranks(8, 8))
    'torchrun --standalone --nproc-per-node 8'
    """
    if ranks.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {ranks.per_node}"
    nodes = f"torchrun --nnodes {ranks.nodes} --nproc-per-node {ranks.per_node}"
    return f"{nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29400"


def _plan_of_all(one: Planned) -> Plan | None:
    """Return the plan of all layers; None where they have several."""
    plans = {layer.plan for layer in one.layers}
    return plans.pop() if len(plans) == 1 else None


def _train(one: Planned, asked: Asked) -> list[str]:
    assert isinstance(asked.model, str)
    said = ["train", RECIPES[asked.model], "--data", "DATA", "--run", f"runs/{asked.model}"]
    said += ["--batch-size", str(one.batch * one.ranks.size)]
    said += ["--accumulate", str(one.arrangement.accumulate)] if one.arrangement.accumulate > 1 else []
    said += ["--model.checkpointed"] if one.arrangement.recomputed else []
    said += ["--model.experts.num-experts", str(asked.experts)] if asked.experts else []
    said += ["--model.experts.k", str(asked.k)] if asked.k else []
    said += ["--model.experts.capacity.factor", f"{asked.capacity:g}"] if asked.capacity is not None else []
    return said + _parallelism(_plan_of_all(one), asked.cluster)


def _parallelism(plan: Plan | None, cluster: str) -> list[str]:
    """Return the options of a plan; layers with several, or with an even wire, find theirs from the profile."""
    if plan is None or not plan.ragged:
        return ["--parallelism.cluster", cluster]
    said = ["--parallelism.gather", str(plan.gather)]
    said += [] if plan.near else ["--parallelism.no-near"]
    said += ["--parallelism.chunks", str(plan.chunks)] if plan.chunks > 1 else []
    said += ["--parallelism.two-level"] if plan.two_level else []
    said += ["--parallelism.regather"] if plan.regather else []
    return said + (["--parallelism.deduplicate"] if plan.deduplicate else [])


def _script(one: Planned, asked: Asked) -> Iterator[str]:
    plan, nesting = _plan_of_all(one), one.nesting
    plan = plan if plan is None or plan.ragged or isinstance(asked.model, Workload) else None
    shared = "FullySharded" if one.arrangement.sharded else "Replicated"
    how = ["Adaptive", "Council"] if plan is None else ["Plan", "Sharded"]
    yield "import torch"
    yield "from torch.distributed.device_mesh import init_device_mesh"
    yield from _imports(asked)
    yield f"from synchromesh import {', '.join(sorted(['Grid', shared, 'parallelize', *how]))}"
    yield "from synchromesh.parallel.comm.job import joined"
    yield from ["from synchromesh.planning.cluster import load_profile"] if plan is None else []
    yield ""
    yield "with joined():"
    yield '    device = "cuda" if torch.cuda.is_available() else "cpu"'
    yield f'    mesh = init_device_mesh(device, ({nesting.copies}, {nesting.size}), mesh_dim_names=("data", "expert"))'
    yield f'    grid = Grid.from_mesh(mesh["expert"], ranks_per_node={nesting.grid.per_node})'
    if plan is None:
        yield f"    council, profile = Council(grid), load_profile({asked.cluster!r})"
        strategy = "lambda: Adaptive(grid, council=council, profile=profile)"
    else:
        strategy = f"lambda: Sharded(grid, plan={_constructor(plan)})"
    yield from (f"    {line}" for line in _model(one, asked))
    yield "    model.to(device)"
    if isinstance(asked.model, Path):
        yield f"    parallelize_experts(model, grid, strategy={strategy})"
    if nesting.copies > 1:
        yield f'    strategy, outer = {strategy}, Grid.from_mesh(mesh["data"])'
        yield f"    run = parallelize(model, grid, shared={shared}(), outer=outer, strategy=strategy)"
    else:
        yield f"    run = parallelize(model, grid, shared={shared}(), strategy={strategy})"
    parts = one.arrangement.accumulate
    if parts > 1:
        yield f"    # each step: {parts} parts of {one.batch // parts} samples, then optimizer.step()"


def _constructor(plan: Plan) -> str:
    """Return the Python of a plan.

    >>> _constructor(Plan(gather=2, near=False))
    'Plan(gather=2, near=False)'
    """
    plain, said = Plan(), []
    for name in ("gather", "near", "chunks", "two_level", "ragged", "regather", "deduplicate"):
        value = getattr(plan, name)
        said += [f"{name}={value}"] if value != getattr(plain, name) else []
    return f"Plan({', '.join(said)})"


def _imports(asked: Asked) -> Iterator[str]:
    if isinstance(asked.model, Path):
        yield f"from transformers import {auto_class(asked.model)}"
        yield "from synchromesh.compat.huggingface import parallelize_experts"
    elif isinstance(asked.model, Workload):
        fixed = [] if asked.capacity is None else ["FixedCapacity"]
        yield f"from synchromesh import {', '.join(sorted([*fixed, 'MoE', 'TopKRouter', _experts(asked.model)]))}"
    else:
        yield from IMPORTS


def _model(one: Planned, asked: Asked) -> Iterator[str]:
    recomputed = one.arrangement.recomputed
    if isinstance(asked.model, Path):
        yield f'model = {auto_class(asked.model)}.from_pretrained({str(asked.model)!r}, dtype="auto")'
        yield from ["model.gradient_checkpointing_enable()"] if recomputed else []
    elif isinstance(asked.model, Workload):
        work = asked.model
        router = f"TopKRouter({work.width}, {work.experts}, k={work.choices})"
        experts = f"{_experts(work)}({work.experts}, {work.width}, hidden={work.hidden})"
        rows = one.layers[0].kind.tokens  # all ranks know the capacity of so many beforehand
        fixed = "" if asked.capacity is None else f", capacity=FixedCapacity({asked.capacity:g}, tokens={rows})"
        yield f"model = MoE({router}, {experts}{fixed})"
    else:
        yield from in_python(asked.model, experts=asked.experts, k=asked.k, recomputed=recomputed)


def _experts(work: Workload) -> str:
    return "GatedMLPExperts" if work.matrices == 3 else "MLPExperts"
