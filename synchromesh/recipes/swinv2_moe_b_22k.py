"""swinv2_moe_b_22k: SwinV2-MoE-B with 32 experts from scratch on ImageNet-22K, with the paper's settings."""

from __future__ import annotations

import dataclasses

from synchromesh.models.swin_v2_moe import config_b
from synchromesh.recipes.swinv2_moe_s_22k import EXPERTS, swinv2_moe_s_22k
from synchromesh.training.config import TrainConfig


def swinv2_moe_b_22k() -> TrainConfig:
    """Return the pre-training recipe of the base model: wider, and with more stochastic depth."""
    model = dataclasses.replace(config_b(), experts=EXPERTS)
    return dataclasses.replace(swinv2_moe_s_22k(), name="swinv2_moe_b_22k", model=model)
