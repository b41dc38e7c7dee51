"""depth_demo: a SwinV2-MoE and its dense twin measure the distances of a motorcycle, in minutes on a laptop's CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.data.colors import RandomColors
from synchromesh.data.images import Preprocess
from synchromesh.data.moves import Fit, RandomMoves
from synchromesh.data.pixel_sources import ReaderPair
from synchromesh.data.stereo_pair import StereoPair
from synchromesh.models.heads.depth import DepthFPN, LogDifference
from synchromesh.recipes.demo import experts
from synchromesh.recipes.detect_demo import SWIN
from synchromesh.tasks.depth import Depth
from synchromesh.tasks.pixels import PixelData
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim

SHARE = 0.7  # of the picture's width that is learnt from


def depth_demo() -> TrainConfig:
    """Return the recipe: crops of the left 70 % of one picture to learn from, two squares of the rest to score on.

    What it knows is this one garage: numbers show that the parts work together,
    and nothing about other pictures.
    """
    data = PixelData(
        ReaderPair(StereoPair("train", SHARE), StereoPair("test", SHARE, side=220)),
        preprocess=Preprocess(image_size=96, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3),
        fit=Fit(size=(96, 96)),
        # Crops show squares of 160 to 290 pixels, those to score on 220: enough to tell what stands before what.
        moves=RandomMoves(sizes=((96, 96),), scale=(1.8, 3.2)),
        colors=RandomColors(invert=0.0, permute=0.0),
    )
    return TrainConfig(
        name="depth_demo",
        task=Depth(data, DepthFPN(width=64, nearest=1.5, farthest=6.0, loss=LogDifference())),
        model=dataclasses.replace(SWIN, experts=experts()),
        twin=SWIN,
        optim=Optim(
            lr=1e-3,
            warmup_lr=0.0,
            final_lr=1e-5,
            lr_batch=16,
            warmup_epochs=2.0,
            weight_decay=0.05,
            betas=(0.9, 0.99),
        ),
        epochs=16,
        batch_size=16,
        eval_batch_size=8,
        bf16=False,
        keep=Keep(evaluate_epochs=4, best=False, ranks=2),
    )
