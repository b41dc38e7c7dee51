"""demo: a SwinV2-MoE with 8 experts, and its dense twin, learn 4,000 MNIST digits in minutes on a laptop's CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.data.augment import Affine, Augment
from synchromesh.data.images import Preprocess
from synchromesh.data.sources import MnistDigits
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2_moe import DEMO, DEMO_EXPERTS
from synchromesh.moe.losses import LoadBalance, OverRanks
from synchromesh.tasks.classification import Classification, Data
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim

# 28 x 28 pixels are shown as 32 x 32: maps of 8 x 8 and 4 x 4 positions then need no padding to fill their windows.
PREPROCESS = Preprocess(image_size=32, channels=1, mean=(0.1307,), std=(0.3081,))


def demo() -> TrainConfig:
    """Return the recipe of `make demo`: the last epoch counts, nothing is chosen on the test images."""
    return TrainConfig(
        name="demo",
        task=Classification(
            data=Data(MnistDigits(), PREPROCESS),
            augment=Augment(affine=Affine(rotate=12.0, shear=8.0, zoom=0.15, shift=0.08)),
            label_smoothing=0.05,
        ),
        model=dataclasses.replace(DEMO, experts=experts()),
        twin=DEMO,
        optim=Optim(
            lr=2e-3,
            warmup_lr=0.0,
            final_lr=1e-5,
            lr_batch=64,
            warmup_epochs=2.0,
            weight_decay=0.05,
            betas=(0.9, 0.99),
        ),
        epochs=30,
        batch_size=128,
        bf16=False,  # at these widths the casts cost more than the products gain
        keep=Keep(evaluate_epochs=5, best=False, ranks=2),
    )


def experts() -> ExpertsConfig:
    """Return the experts of the demo, whose load is kept even over the whole batch, whatever the ranks."""
    return dataclasses.replace(DEMO_EXPERTS, losses=(OverRanks(LoadBalance(0.01)),))
