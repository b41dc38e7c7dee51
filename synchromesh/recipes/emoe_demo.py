"""emoe_demo: a dense SwinV2 that knows upright digits learns turned ones, split into experts; in a minute on a CPU."""

from __future__ import annotations

from pathlib import Path

from synchromesh.adapt.adapting import Adapting
from synchromesh.adapt.split import SplitFFN
from synchromesh.recipes.digits import digits, digits_dense
from synchromesh.tasks.classification import Classification
from synchromesh.tasks.turned_images import TurnedImages
from synchromesh.training.config import Keep, Start, TrainConfig
from synchromesh.training.optim import Optim

LAST_STAGE = ("backbone.stages.1.*.ffn",)


def emoe_demo() -> TrainConfig:
    """Return the recipe; it starts from what `digits_dense` learned, and so does its dense twin, which is not split.

    The closing table has both at the angles that they learned from, and at others.
    """
    return turned_digits("emoe_demo", Adapting(SplitFFN(num_experts=16, k=8), select=LAST_STAGE))


def turned_digits(name: str, adapting: Adapting, weights: Path | None = Path("runs/digits_dense")) -> TrainConfig:
    """Return what a dense model of digits becomes, trained on turned ones beside the model as it was."""
    upright, dense = digits(), digits_dense().model
    assert isinstance(upright.task, Classification)
    return TrainConfig(
        name=name,
        task=TurnedImages(upright.task.data),
        model=dense,
        twin=dense,
        optim=Optim(
            lr=1e-3, warmup_lr=0.0, final_lr=1e-5, lr_batch=64, warmup_epochs=0.5, weight_decay=0.05, betas=(0.9, 0.99)
        ),
        start=Start(weights=weights, adapt=adapting),
        epochs=10,
        batch_size=64,
        bf16=False,  # at these widths the casts cost more than the products gain
        keep=Keep(evaluate_epochs=2, best=False),
    )
