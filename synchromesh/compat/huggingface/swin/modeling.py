"""SwinV2-MoE under transformers' interfaces: image classification, and a backbone for its detectors and segmenters."""

from __future__ import annotations

from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification

from synchromesh.compat.huggingface.image_models import MoEBackbone, MoEForImageClassification
from synchromesh.compat.huggingface.swin.configuration import SwinV2MoEConfig


def register_swin() -> None:
    """Make transformers' AutoConfig, AutoModelForImageClassification and AutoBackbone know SwinV2-MoE."""
    AutoConfig.register(SwinV2MoEConfig.model_type, SwinV2MoEConfig, exist_ok=True)
    AutoModelForImageClassification.register(SwinV2MoEConfig, SwinV2MoEForImageClassification, exist_ok=True)
    AutoBackbone.register(SwinV2MoEConfig, SwinV2MoEBackbone, exist_ok=True)


class SwinV2MoEForImageClassification(MoEForImageClassification):
    """A SwinV2 with experts, as a classifier."""

    config_class = SwinV2MoEConfig


class SwinV2MoEBackbone(MoEBackbone):
    """A SwinV2 with experts, as a backbone: maps as transformers' Swinv2 gives them."""

    config_class = SwinV2MoEConfig
