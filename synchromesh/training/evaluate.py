"""Scores of a model over a set of images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from synchromesh.data.augment import normalize
from synchromesh.data.images import Images
from synchromesh.moe.record import record_load
from synchromesh.parallel.comm.grid import Grid
from synchromesh.training.agree import ALONE, loads_over_ranks, on_all, summed
from synchromesh.training.loader import Loading, Part, eval_batches
from synchromesh.types import LoadStats

DEAD_SHARE = 0.1  # of an expert's fair part 1/E


@dataclass(frozen=True)
class Evaluation:
    """What a model scored.

    Attributes:
        accuracy: share of images whose largest logit is their label's. loss: mean cross-entropy, nats.
        class_images: images of each class. class_right: of them, classified right.
        loads: per MoE layer, over all these images. seconds: taken. bad: unreadable files, left out.
    """

    accuracy: float
    loss: float
    class_images: Int[Tensor, " N"]
    class_right: Int[Tensor, " N"]
    loads: dict[str, LoadStats]
    seconds: float
    bad: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many images were scored."""
        return int(self.class_images.sum())


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate. loading: see `Loading`. batch_size: images. bf16: autocast."""

    loading: Loading = field(default_factory=Loading)
    batch_size: int = 256
    bf16: bool = False


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: Images,
    options: EvalOptions = EvalOptions(),
    *,
    between: Callable[[], None] = lambda: None,
    grid: Grid = ALONE,
) -> Evaluation:
    """Score a classifier in evaluation mode; its training mode comes back after. `between` is called after each batch.

    On several ranks each scores its part of every batch, and all get the numbers of all images.

    Raises:
        InputError: an image is unreadable and these options do not skip it.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    right = torch.zeros(len(images.classes), dtype=torch.int64)
    count, loss, bad = torch.zeros_like(right), torch.zeros((), dtype=torch.float64), []
    try:
        with record_load(model) as loads:
            part = Part(grid.rank, grid.size)
            for batch in eval_batches(images, options.batch_size, loading=options.loading, part=part):
                bad += batch.bad
                if len(batch.labels) == 0 and grid.size == 1:
                    continue  # among other ranks it takes part in their exchanges
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.bf16):
                    logits = model(normalize(batch.images.to(device), images.preprocess))
                logits = logits.float().cpu()
                loss += cross_entropy(logits, batch.labels, reduction="sum")
                hit = logits.argmax(1) == batch.labels
                count += batch.labels.bincount(minlength=len(count))
                right += batch.labels[hit].bincount(minlength=len(count))
                between()
    finally:
        model.train(was_training)
    sums = summed(grid, torch.cat([count, right]).to(device)).cpu()
    count, right = sums[: len(count)], sums[len(count) :]
    loss, loads = summed(grid, loss.to(device)).cpu(), loads_over_ranks(grid, loads)
    bad = [text for texts in on_all(grid, lambda: bad) for text in texts]
    total = max(1, int(count.sum()))
    seconds = time.perf_counter() - started
    return Evaluation(int(right.sum()) / total, float(loss) / total, count, right, loads, seconds, tuple(bad))


def dead_experts(loads: dict[str, LoadStats]) -> dict[str, list[int]]:
    """Name, per layer, the experts that got under 0.1 / E of its tokens; layers without such are left out.

    >>> from synchromesh.types import Plan
    >>> load = LoadStats(torch.tensor([99, 1]), torch.tensor(0), Plan())
    >>> dead_experts({"block": load})
    {'block': [1]}
    """
    found = {}
    for name, load in loads.items():
        tokens = load.tokens_per_expert
        few = (tokens < DEAD_SHARE / len(tokens) * tokens.sum()).nonzero()[:, 0].tolist()
        if few:
            found[name] = few
    return found
