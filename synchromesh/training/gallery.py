"""Pictures of the samples that a model did worst and best on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import on_first
from synchromesh.training.durable import write_atomically
from synchromesh.training.evaluate import Evaluation
from synchromesh.training.run_folder import PICTURES
from synchromesh.training.task import Ask, Run, Splits, Task


@torch.no_grad()
def draw_gallery(
    task: Task, model: nn.Module, splits: Splits, found: Evaluation, folder: Path, grid: Grid
) -> dict[str, str]:
    """Write pictures of an evaluation's worst and best samples; return their captions by the names of the files.

    All ranks call it and run the model on the same samples; the first one writes. A caption is the task's verdict,
    where it has one, and in a line of its own which sample it is.
    """
    chosen = [("worst", i, index) for i, index in enumerate(found.worst)]
    chosen += [("best", i, index) for i, index in enumerate(found.best) if index not in found.worst]
    samples = _read(splits, [index for _, _, index in chosen])
    if not samples:
        return {}
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    answers = task.predict(Run(model, model), task.prepare(samples, splits.facts, device, None), splits.facts, Ask())
    model.train(was_training)

    def write() -> dict[str, str]:
        captions = {}
        for (kind, place, index), sample, answer in zip(chosen, samples, answers, strict=True):
            name, picture = f"{kind}-{place + 1}.png", task.draw(sample, answer)
            if picture is None:
                continue
            (folder / PICTURES).mkdir(exist_ok=True)
            write_atomically(folder / PICTURES / name, picture)
            place_of = f"{kind} {place + 1}: test {task.unit} number {index}"
            captions[name] = "\n".join(said for said in (task.verdict(answer), place_of) if said)
        return captions

    return on_first(grid, write)


def _read(splits: Splits, indices: list[int]) -> list[Any]:
    samples = []
    for index in indices:
        try:
            samples.append(splits.test.read(index))
        except InputError:  # it has become unreadable since it was scored: there is nothing to show
            return []
    return samples
