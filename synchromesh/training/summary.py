"""summary.json: what a finished run reports, by people's and programs' names."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from synchromesh.models.twin import Twin
from synchromesh.moe.experts import experts_in
from synchromesh.moe.layer import MoE
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import dead_experts
from synchromesh.training.job import Outcome
from synchromesh.training.metrics import drop_rate, load_shares
from synchromesh.training.task import Task


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model.

    Attributes:
        parameters: all of them.
        active: those that one token passes through.
    """

    parameters: int
    active: int


def model_size(model: nn.Module) -> ModelSize:
    """Count parameters; of E experts a token passes k. A twin that follows the model is not counted."""
    twins = {part for twin in model.modules() if isinstance(twin, Twin) for part in twin.modules()}
    own = [module for module in model.modules() if module not in twins]
    total = active = sum(p.numel() for p in {p for module in own for p in module.parameters(recurse=False)})
    for module in own:
        if isinstance(module, MoE):
            count = sum(p.numel() for p in module.experts.parameters())
            experts, k = experts_in(module.experts).num_experts, getattr(module.router, "k", 1)
            active -= count * (experts - k) // experts
    return ModelSize(total, active)


@dataclass(frozen=True)
class Finished:
    """One trained model of a run.

    Attributes:
        outcome: of its training.
        size: of the model.
        pictures: captions of the files in its folder of pictures, by name.
    """

    outcome: Outcome
    size: ModelSize
    pictures: dict[str, str]

    def numbers(self, task: Task, prefix: str) -> dict[str, Any]:
        """Return its part of the summary, each name with the prefix.

        test_NAME                  each number of the task
        best_NAME, best_step       the best value of its headline, and the step it was reached at
        train_seconds              wall time of all training, with evaluations and checkpoints
        UNIT_per_second            trained, in the time of steps alone
        evaluated_UNIT_per_second  in the last evaluation
        steps                      of the optimizer
        bad_UNIT, test_bad_UNIT    unreadable ones left out, in all epochs and in the last evaluation
        plans                      by layer, how many training forwards ran by each plan; empty if it was fixed
        pictures                   captions by file
        """
        now, found, unit = self.outcome.standing, self.outcome.evaluation, task.unit
        values = {
            **{f"test_{name}": value for name, value in found.scores.numbers.items()},
            "train_seconds": round(now.seconds, 2),
            f"{unit}_per_second": round(now.samples / max(1e-9, now.step_seconds), 1),
            f"evaluated_{unit}_per_second": round(found.samples / found.seconds, 1),
            "parameters": self.size.parameters,
            "active_parameters": self.size.active,
            "steps": now.step,
            f"bad_{unit}": now.bad,
            f"test_bad_{unit}": len(found.bad),
            f"best_{task.numbers[0].name}": now.best,
            "best_step": now.best_step,
            "plans": self.outcome.plans,
            "pictures": self.pictures,
        }
        return {prefix + name: value for name, value in values.items()}


def summarize(config: TrainConfig, main: Finished, twin: Finished | None, *, device: torch.device) -> dict[str, Any]:
    """Return the contents of summary.json; the twin's numbers begin with dense_."""
    found, task = main.outcome.evaluation, config.task
    dead = dead_experts(found.loads)
    return {
        "recipe": config.name,
        "task": type(task).__name__,
        "seed": config.seed,
        "epochs": config.epochs,
        f"test_{task.unit}": found.samples,
        **main.numbers(task, ""),
        "dead_experts": sum(len(experts) for experts in dead.values()),
        "dead_experts_by_layer": dead,
        "test_drop_rate": drop_rate(found.loads),
        "test_load": load_shares(found.loads),
        **({} if twin is None else twin.numbers(task, "dense_")),
        "panels": [encode(panel) for panel in task.panels(found.scores)],
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "synchromesh": version("synchromesh"),
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's product name, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
