"""digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, in well under a minute on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.data.augment import Affine, Augment
from synchromesh.data.images import Preprocess
from synchromesh.data.sources import ScikitDigits
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.recipes.demo import experts
from synchromesh.tasks.classification import Classification, Data
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.optim import Optim


def digits() -> TrainConfig:
    """Return a small recipe for a quick look."""
    swin = SwinV2Config(
        embed_dim=32, depths=(1, 2), num_heads=(2, 4), patch_size=2, window_size=4, drop_path=0.05, init_std=0.1
    )
    return TrainConfig(
        name="digits",
        task=Classification(
            data=Data(ScikitDigits(), Preprocess(image_size=8, channels=1, mean=(0.3,), std=(0.37,))),
            augment=Augment(affine=Affine(rotate=8.0, zoom=0.08, shift=0.06)),
            label_smoothing=0.05,
        ),
        model=dataclasses.replace(swin, experts=dataclasses.replace(experts(), num_experts=4, blocks=((), (1,)))),
        optim=Optim(
            lr=2e-3, warmup_lr=0.0, final_lr=1e-5, lr_batch=64, warmup_epochs=2.0, weight_decay=0.05, betas=(0.9, 0.99)
        ),
        epochs=30,
        batch_size=64,
        keep=Keep(best=False),
    )


def digits_dense() -> TrainConfig:
    """Return the same without experts: what `emoe_demo` and `upcycle_demo` make experts of."""
    mixture = digits()
    return dataclasses.replace(mixture, name="digits_dense", model=dataclasses.replace(mixture.model, experts=None))
