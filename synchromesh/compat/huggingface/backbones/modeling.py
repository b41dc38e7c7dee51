"""ViT, FocalNet, PVT and SpectrumNet with experts under transformers' interfaces."""

from __future__ import annotations

from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification

from synchromesh.compat.huggingface.backbones.configuration import (
    FocalNetMoEConfig,
    PVTMoEConfig,
    SettingsConfig,
    SpectrumNetMoEConfig,
    ViTMoEConfig,
)
from synchromesh.compat.huggingface.image_models import MoEBackbone, MoEForImageClassification


def register_backbones() -> None:
    """Make transformers' AutoConfig, AutoModelForImageClassification and AutoBackbone know ViT, FocalNet, PVT, ..."""
    for config, classifier, backbone in FAMILIES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, classifier, exist_ok=True)
        AutoBackbone.register(config, backbone, exist_ok=True)


class ViTMoEForImageClassification(MoEForImageClassification):
    """A ViT with experts, as a classifier."""

    config_class = ViTMoEConfig


class ViTMoEBackbone(MoEBackbone):
    """A ViT with experts, as a backbone of one map."""

    config_class = ViTMoEConfig


class FocalNetMoEForImageClassification(MoEForImageClassification):
    """A FocalNet with experts, as a classifier."""

    config_class = FocalNetMoEConfig


class FocalNetMoEBackbone(MoEBackbone):
    """A FocalNet with experts, as a backbone."""

    config_class = FocalNetMoEConfig


class PVTMoEForImageClassification(MoEForImageClassification):
    """A PVT with experts, as a classifier."""

    config_class = PVTMoEConfig


class PVTMoEBackbone(MoEBackbone):
    """A PVT with experts, as a backbone."""

    config_class = PVTMoEConfig


class SpectrumNetMoEForImageClassification(MoEForImageClassification):
    """A SpectrumNet with experts, as a classifier."""

    config_class = SpectrumNetMoEConfig


class SpectrumNetMoEBackbone(MoEBackbone):
    """A SpectrumNet with experts, as a backbone."""

    config_class = SpectrumNetMoEConfig


FAMILIES: tuple[tuple[type[SettingsConfig], type[MoEForImageClassification], type[MoEBackbone]], ...] = (
    (ViTMoEConfig, ViTMoEForImageClassification, ViTMoEBackbone),
    (FocalNetMoEConfig, FocalNetMoEForImageClassification, FocalNetMoEBackbone),
    (PVTMoEConfig, PVTMoEForImageClassification, PVTMoEBackbone),
    (SpectrumNetMoEConfig, SpectrumNetMoEForImageClassification, SpectrumNetMoEBackbone),
)
"""Configuration, classifier and backbone of each family."""
