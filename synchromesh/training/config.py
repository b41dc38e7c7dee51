"""TrainConfig: everything that determines a run. A recipe returns one, the command line overrides it, JSON keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import tyro

from synchromesh.adapt.adapting import Adapting
from synchromesh.errors import at_least
from synchromesh.models.features import BackboneConfig
from synchromesh.training.average import Averaging
from synchromesh.training.loader import Loading
from synchromesh.training.optim import Optim
from synchromesh.training.precision import Precision
from synchromesh.training.task import Task
from synchromesh.training.trackers import MLflow, TensorBoard, Tracking, Wandb
from synchromesh.types import Plan

# Has a shorter name among the options of `train`, --nproc and --tensorboard: help tells that one alone.
Elsewhere = tyro.conf.Suppress


class Freeze(Enum):
    """What is not trained."""

    NOTHING = "nothing"
    MOE = "moe"  # routers and experts: best for detection in the paper, table 10
    BACKBONE = "backbone"  # all but the head: a linear probe


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        weights: a run folder (of an adapted run: its model, made plain), a checkpoint folder, a .safetensors file, or a
            file that torch.load reads with weights_only=True; none for random weights. The whole backbone must be in
            it; heads may stay random.
        freeze: what stays as it was.
        partial: take what fits, also where a part of the backbone is missing and stays random: at most half of it, and
            nothing of what is frozen.
        adapt: what of the model becomes something else once the weights are there, and trains as that (docs/adapt.md);
            the twin stays as it is. None for nothing.
    """

    weights: Path | None = None
    freeze: Freeze = Freeze.NOTHING
    partial: bool = False
    adapt: Adapting | None = None


@dataclass(frozen=True)
class Keep:
    """How often the run writes; no field changes the numbers.

    Attributes:
        log_steps: steps between two lines of metrics.
        evaluate_epochs: epochs between two evaluations.
        checkpoint_seconds: time between checkpoints, besides those at evaluations.
        checkpoint_steps: steps between further checkpoints; 0 for none.
        best: also keep the checkpoint of the best evaluation; off where the score is a test that must not choose.
        tensorboard: also write TensorBoard events.
        wandb: also write to Weights & Biases.
        mlflow: also write to MLflow.
        device: such as 'cpu' or 'cuda:1'; None takes the first GPU, or the CPU where there is none.
        ranks: processes to train with on this machine, where torchrun or SLURM started none.
    """

    log_steps: int = 20
    evaluate_epochs: int = 1
    checkpoint_seconds: float = 120.0
    checkpoint_steps: int = 0
    best: bool = True
    tensorboard: Annotated[bool, Elsewhere] = False
    wandb: Wandb | None = None
    mlflow: MLflow | None = None
    device: str | None = None
    ranks: Annotated[int, Elsewhere] = 1

    @property
    def trackings(self) -> tuple[Tracking, ...]:
        """Where the numbers go besides metrics.jsonl."""
        own = (TensorBoard() if self.tensorboard else None, self.wandb, self.mlflow)
        return tuple(one for one in own if one is not None)

    def __post_init__(self) -> None:
        at_least("keep.", self, log_steps=1, evaluate_epochs=1, checkpoint_seconds=0.0, checkpoint_steps=0, ranks=1)


@dataclass(frozen=True)
class Parallelism:
    """How ranks share the experts; every setting gives the same numbers. See docs/parallelism.md, docs/tuning.md.

    Attributes:
        adaptive: let every layer find its best plan while it trains, where the next six settings say no other.
        gather: ranks that all-gather (pool) their parts of the experts in each step, the FSDP shard degree of experts;
            0 pools just the shards of an expert.
        near: these ranks are neighbours in rank order; else they are as far from each other as possible.
        chunks: the overlap degree: pieces whose all-to-all runs during the compute of others.
        two_level: hierarchical (2DH) all-to-all: inside nodes, then between them.
        regather: all-gather weights again in backward instead of keeping them (reshard after forward).
        deduplicate: send one row of a token to each rank that holds some of its experts, not one for each choice.
        cluster: whose profile tells what to try first: a name of `synchromesh plan --help`, or a file.
        known: run folder or plans.json to begin with, of an earlier run on as many ranks.
        replay: run folder or plans.json whose plans are repeated step by step, for the same numbers bit for bit.
    """

    adaptive: bool = True
    gather: int = 0
    near: bool = True
    chunks: int = 1
    two_level: bool = False
    regather: bool = False
    deduplicate: bool = False
    cluster: str | None = None
    known: Path | None = None
    replay: Path | None = None

    def __post_init__(self) -> None:
        at_least("parallelism.", self, gather=0, chunks=1)

    def plan(self) -> Plan | None:
        """Return the plan; None leaves the choice to the strategy."""
        named = ("near", "chunks", "two_level", "regather", "deduplicate")
        said = {name: getattr(self, name) for name in named}
        plan = Plan(max(1, self.gather), **said)
        return None if self.gather == 0 and plan == Plan() else plan


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        name: of the recipe.
        task: what the model is trained for, and on which data.
        model: the backbone; what follows from the data, such as the size of images, is set by the task.
        twin: a second backbone trained after it in the same way, for comparison; none for no twin.
        optim: the optimizer and its schedule.
        ema: average the weights over the steps, and score, keep and predict with the average; none for the weights.
        start: what training starts from.
        epochs: passes over the training data.
        batch_size: samples per optimizer step.
        eval_batch_size: samples per batch of evaluations.
        folds: for cross-validation, equal parts of the training data, of which one is scored on instead of the test
            data; 0 for the data as they are split.
        fold: which part is scored on, from 0.
        patience: evaluations in a row without a better headline number after which training ends early; 0 for never.
        accumulate: equal parts each batch is cut into, to fit into memory.
        bf16: autocast to bfloat16.
        fp16: autocast to float16 instead, with a scaled loss; steps whose gradients overflow are left out.
        channels_last: keep the channels of a pixel side by side in memory, which convolutions on GPUs like.
        compile: compile the blocks of the model with torch.compile.
        seed: of everything random.
        loading: how samples are read.
        keep: how often the run writes.
        parallelism: how ranks share the experts.
    """

    name: str
    task: Annotated[Task, tyro.conf.arg(name="")]  # no prefix on the command line: its settings are options of the run
    model: BackboneConfig
    twin: BackboneConfig | None = None
    optim: Optim = field(default_factory=Optim)
    ema: Averaging | None = None
    start: Start = field(default_factory=Start)
    epochs: int = 90
    batch_size: int = 128
    eval_batch_size: int = 256
    folds: int = 0
    fold: int = 0
    patience: int = 0
    accumulate: int = 1
    bf16: bool = True
    fp16: bool = False
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    loading: Loading = field(default_factory=Loading)
    keep: Keep = field(default_factory=Keep)
    parallelism: Parallelism = field(default_factory=Parallelism)

    def __post_init__(self) -> None:
        at_least("", self, epochs=1, batch_size=1, eval_batch_size=1, accumulate=1, seed=0)
        at_least("", self, folds=0, fold=0, patience=0)
        if self.folds == 1 or self.fold >= max(1, self.folds):
            raise ValueError(
                f"got fold {self.fold} of {self.folds} folds, wanted 2 folds or more, and a fold from 0 to below that"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        object.__setattr__(self, "model", self.task.sized(self.model))  # the data know how large images are
        object.__setattr__(self, "twin", None if self.twin is None else self.task.sized(self.twin))

    @property
    def precision(self) -> Precision:
        """How the model is called."""
        dtype = torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else None
        return Precision(dtype, self.channels_last)
