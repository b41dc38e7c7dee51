"""The recipes by the names that the command line knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from synchromesh.recipes.demo import demo
from synchromesh.recipes.digits import digits
from synchromesh.recipes.few_shot import few_shot
from synchromesh.recipes.finetune_1k import finetune_1k
from synchromesh.recipes.swinv2_moe_b_22k import swinv2_moe_b_22k
from synchromesh.recipes.swinv2_moe_s_22k import swinv2_moe_s_22k
from synchromesh.training.config import TrainConfig

RECIPES: Mapping[str, Callable[[], TrainConfig]] = MappingProxyType(
    {
        "demo": demo,
        "digits": digits,
        "swinv2_moe_s_22k": swinv2_moe_s_22k,
        "swinv2_moe_b_22k": swinv2_moe_b_22k,
        "finetune_1k": finetune_1k,
        "few_shot": few_shot,
    }
)
