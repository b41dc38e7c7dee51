"""summary.json: what a finished run reports, by people's and programs' names."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from synchromesh.training.architecture import ModelSize
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import dead_experts
from synchromesh.training.loop import Outcome
from synchromesh.training.metrics import drop_rate, load_shares


@dataclass(frozen=True)
class Finished:
    """One trained model of a run."""

    outcome: Outcome
    size: ModelSize

    def numbers(self, prefix: str) -> dict[str, Any]:
        """Return its part of the summary, each name with the prefix.

        test_accuracy: share. test_loss: nats. train_seconds: wall time of all training, with evaluations and
        checkpoints. images_per_second: trained, in steps. parameters, active_parameters: counts. bad_images,
        test_bad_images: unreadable ones left out, in all epochs and in the last evaluation. plans: by layer, how many
        training forwards ran by each plan; empty where it was fixed.
        """
        now, found = self.outcome.standing, self.outcome.evaluation
        values = {
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "train_seconds": round(now.seconds, 2),
            "images_per_second": round(now.trained_images / max(1e-9, now.step_seconds), 1),
            "evaluated_images_per_second": round(found.images / found.seconds, 1),
            "parameters": self.size.parameters,
            "active_parameters": self.size.active,
            "steps": now.step,
            "bad_images": now.bad_images,
            "test_bad_images": len(found.bad),
            "best_accuracy": now.best,
            "best_step": now.best_step,
            "plans": self.outcome.plans,
        }
        return {prefix + name: value for name, value in values.items()}


def summarize(config: TrainConfig, main: Finished, twin: Finished | None, *, device: torch.device) -> dict[str, Any]:
    """Return the contents of summary.json; the twin's numbers begin with dense_."""
    loads = main.outcome.evaluation.loads
    dead = dead_experts(loads)
    return {
        "recipe": config.name,
        "seed": config.seed,
        "epochs": config.epochs,
        "test_images": main.outcome.evaluation.images,
        **main.numbers(""),
        "dead_experts": sum(len(experts) for experts in dead.values()),
        "dead_experts_by_layer": dead,
        "test_drop_rate": drop_rate(loads),
        "test_load": load_shares(loads),
        **({} if twin is None else twin.numbers("dense_")),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "synchromesh": version("synchromesh"),
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's product name, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
