"""spdf_demo: a SwinV2 of which three quarters of the matrices stay zero, and its dense twin; in a minute on a CPU."""

from __future__ import annotations

import dataclasses

from synchromesh.adapt.adapting import Adapting
from synchromesh.adapt.sparse import StaticSparsity
from synchromesh.recipes.emoe_demo import turned_digits
from synchromesh.training.config import TrainConfig

MATRICES = ("*.attention.qkv", "*.attention.proj", "*.ffn.up", "*.ffn.down")


def spdf_demo() -> TrainConfig:
    """Return the recipe, sparse pre-training from random weights.

    Dense tuning goes on from it: --run runs/spdf_dense --start.weights runs/spdf_demo --start.adapt none
    """
    config = turned_digits("spdf_demo", Adapting(StaticSparsity(0.75), select=MATRICES), weights=None)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=2e-3, warmup_epochs=2.0), epochs=20)
