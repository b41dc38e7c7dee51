"""upcycle_demo: a dense SwinV2 of digits, made a SwinV2-MoE of copies of its blocks; in a minute on a CPU."""

from __future__ import annotations

from synchromesh.adapt.adapting import Adapting
from synchromesh.adapt.upcycle import Upcycle
from synchromesh.recipes.emoe_demo import LAST_STAGE, turned_digits
from synchromesh.training.config import TrainConfig


def upcycle_demo() -> TrainConfig:
    """Return the recipe: 8 half experts, of which a token takes 2, the cost of the dense twin that is trained on.

    Both start from what `digits_dense` learned of upright digits.
    """
    return turned_digits("upcycle_demo", Adapting(Upcycle(num_experts=8, k=2, slices=2, noise=0.1), select=LAST_STAGE))
