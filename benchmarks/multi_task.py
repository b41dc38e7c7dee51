"""Four dense tasks of one backbone on composed scenes: what learns of it, and how it compares with a model for each.

A line of JSON for every model that was trained. The trunk first learns SimMIM on photographs; every arm starts from it,
with the same batches, steps and heads. Single-task models are tuned in full, one for each task; `change` is the mean
relative change against them.

    python benchmarks/multi_task.py --steps 300 --pretrain 300
    python benchmarks/multi_task.py --experts 8      # the trunk a mixture, single-task models too
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import nn

from synchromesh import Dropless, MoE, aux_loss, seeds
from synchromesh.adapt.adaptation import adapt, matching
from synchromesh.adapt.low_rank import LowRank
from synchromesh.adapt.mtlora import MTLoRA
from synchromesh.adapt.polyhistor import Polyhistor, PolyhistorLite
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.multi_task import mean_relative_change
from synchromesh.models.heads.multi_task import MultiTaskModel
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SWIN_MOE, SwinV2Config
from synchromesh.tasks.dense_kinds import WORKS, DenseKind
from synchromesh.tasks.multi_task import ALL, MultiTask
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.simmim import SimMIM
from synchromesh.training.task import Run, Splits, Task

PRETEXT = SimMIM(cell=8)
TASK = MultiTask(
    PixelData(ComposedScenes(fewest=2, most=4, smallest=16, largest=32), PRETEXT.data.preprocess), width=24
)
SWIN = SwinV2Config(
    image_size=64,
    in_channels=3,
    embed_dim=32,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=8,
    drop_path=0.0,
    style=SWIN_MOE,
)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Args:
    """How much to do.

    Attributes:
        steps: of each arm.
        pretrain: steps of the pretext.
        batch: pictures of a step.
        seed: of everything.
        test: scenes to score on.
        tasks: which; classes want more steps than the others before they are better than the background everywhere.
        rank: of shared updates.
        experts: in the last block of the trunk, one for each token; 0 for a dense trunk.
        arms: only these; all by default.
        out: file to append to.
    """

    steps: int = 300
    pretrain: int = 300
    batch: int = 8
    seed: int = 0
    test: int = 100
    tasks: tuple[DenseKind, ...] = ALL
    rank: int = 8
    experts: int = 0
    arms: tuple[str, ...] = ()
    out: Path = Path(__file__).parent / "results" / "multi_task.jsonl"


def arms(rank: int, names: tuple[str, ...], *, mixture: bool) -> dict[str, Callable[[nn.Module], Any]]:
    """Return what each arm does to a model before it learns; one more for a mixture of experts."""
    linears = matching(
        ("backbone.*.qkv", "backbone.*.proj", "backbone.*.up", "backbone.*.down", "backbone.*.reduction")
    )

    def has_matrices(name: str, module: nn.Module) -> bool:
        return isinstance(module, MoE) or (isinstance(module, nn.Linear) and linears(name, module))

    made = {
        "full tuning": lambda model: None,
        "heads only": lambda model: model.backbone.requires_grad_(False),
        "plain LoRA": lambda model: (
            model.backbone.requires_grad_(False),
            adapt(model, has_matrices, LowRank(rank, 4.0)),
        ),
        "MTLoRA": lambda model: adapt(model, "backbone", MTLoRA(names, rank=rank, task_rank=4)),
        "MTLoRA, norms and embedding frozen": lambda model: adapt(
            model, "backbone", MTLoRA(names, rank=rank, task_rank=4, also=())
        ),
        "Polyhistor": lambda model: adapt(model, "backbone", Polyhistor(names)),
        "Polyhistor-Lite": lambda model: adapt(model, "backbone", PolyhistorLite(names)),
    }
    if mixture:
        each = MTLoRA(names, rank=rank, task_rank=4, per_expert=True)
        made["MTLoRA, factors of each expert"] = lambda model: adapt(model, "backbone", each)
    return made


def trained(model: nn.Module, task: Task, splits: Splits, args: Args, steps: int, rate: float) -> float:
    """Train by AdamW with a cosine, batch i the same one for every arm; return the processor seconds."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer, started = torch.optim.AdamW(own, lr=rate, weight_decay=0.05, betas=(0.9, 0.99)), time.process_time()
    model.train()
    run = Run(model, model)
    for step in range(steps):
        draws = [
            lambda step=step, i=i: seeds.numpy_generator(args.seed, seeds.CROP, step, i) for i in range(args.batch)
        ]
        samples = [splits.train.read((step * args.batch + i) % len(splits.train), draw) for i, draw in enumerate(draws)]
        rng = seeds.numpy_generator(args.seed, seeds.AUGMENT, step)
        batch = task.prepare(samples, splits.facts, CPU, rng)
        counts, terms = task.counts(batch), task.loss(run, batch)
        loss = sum(term.weight * term.total / max(1, counts[name]) for name, term in terms.items())
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.zero_grad()
        (loss + aux_loss(model)).backward()
        nn.utils.clip_grad_norm_(own, 5.0)
        optimizer.step()
    return time.process_time() - started


def scored(model: nn.Module, task: MultiTask, splits: Splits, test: int) -> list[float]:
    """Return the number of each task on so many scenes."""
    scorer, run = task.scorer(splits.facts), Run(model.eval(), model)
    with torch.no_grad():
        for start in range(0, test, 25):
            samples = [splits.test.read(i) for i in range(start, min(start + 25, test))]
            scorer.add(run, task.prepare(samples, splits.facts, CPU, None))
    found = scorer.scores([scorer.state()]).numbers
    return [found[WORKS[kind].number.name] for kind in task.tasks]


def swin_of(args: Args) -> SwinV2Config:
    if not args.experts:
        return SWIN
    experts = ExpertsConfig(num_experts=args.experts, blocks=((), (1,)), capacity=Dropless(), dropout=0.0)
    return dataclasses.replace(SWIN, experts=experts)


def trunk(args: Args) -> dict[str, torch.Tensor]:
    """Return the weights of a backbone that learned the pretext."""
    splits = PRETEXT.splits(seed=args.seed)
    with seeds.torch_seeded(CPU, args.seed, seeds.INIT):
        model = PRETEXT.build(PRETEXT.sized(swin_of(args)), splits.facts)
    trained(model, PRETEXT, splits, args, args.pretrain, 3e-3)
    return {name: p for name, p in model.get_submodule("backbone").state_dict().items() if name != "embed.mask_token"}


def main(args: Args) -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(("git", "rev-parse", "--short", "HEAD"), capture_output=True, text=True, check=True).stdout
    args.out.parent.mkdir(exist_ok=True)
    weights, splits = trunk(args), TASK.splits(seed=args.seed)

    def begun(task: MultiTask) -> MultiTaskModel:
        with seeds.torch_seeded(CPU, args.seed, seeds.INIT, 1):
            model = task.build(swin_of(args), splits.facts)
        assert isinstance(model, MultiTaskModel)
        model.backbone.load_state_dict(weights)
        return model

    names, every = tuple(kind.value for kind in args.tasks), MultiTask(TASK.data, tasks=args.tasks, width=TASK.width)
    single, better = [], [WORKS[kind].number.more_is_better for kind in args.tasks]

    def say(arm: str, model: nn.Module, task: MultiTask, seconds: float) -> list[float]:
        found = scored(model, task, splits, args.test)
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        heads = sum(p.numel() for p in model.get_submodule("heads").parameters())
        line = {
            "arm": arm, "seed": args.seed, "steps": args.steps, "pretrain": args.pretrain, "batch": args.batch,
            "experts": args.experts,
            "learns": learns, "of_backbone": learns - heads, "cpu_seconds": round(seconds, 1), "commit": commit.strip(),
            "scores": dict(zip([WORKS[kind].number.name for kind in task.tasks], found, strict=True)),
        }  # fmt: skip
        if task is every:
            line["change"] = mean_relative_change(found, single, better)
        print(json.dumps(line), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return found

    for kind in args.tasks:
        task = MultiTask(TASK.data, tasks=(kind,), width=TASK.width)
        model = begun(task)
        single += say(f"alone: {kind.value}", model, task, trained(model, task, splits, args, args.steps, 2e-3))
    for arm, change in arms(args.rank, names, mixture=args.experts > 0).items():
        if not args.arms or arm in args.arms:
            model = begun(every)
            change(model)
            say(arm, model, every, trained(model, every, splits, args, args.steps, 2e-3))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
