"""The library's backbones under transformers' interfaces: image classification, and backbones for its heads.

Inside are the modules of `synchromesh.models`, under the names that a `Classifier` gives its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from synchromesh.compat.huggingface.backbones.configuration import (
    FocalNetMoEConfig,
    PVTMoEConfig,
    SettingsConfig,
    SpectrumNetMoEConfig,
    ViTMoEConfig,
)
from synchromesh.models.features import Features
from synchromesh.models.initialize import initialize_own
from synchromesh.models.pyramid import Stage
from synchromesh.models.vit import ViT
from synchromesh.moe.carry import carry
from synchromesh.moe.experts import WHOLE, Experts
from synchromesh.moe.record import aux_loss


def register_backbones() -> None:
    """Make transformers' AutoConfig, AutoModelForImageClassification and AutoBackbone know ViT, FocalNet, PVT, ..."""
    for config, classifier, backbone in FAMILIES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForImageClassification.register(config, classifier, exist_ok=True)
        AutoBackbone.register(config, backbone, exist_ok=True)


@dataclass
class MoEImageClassifierOutput(ImageClassifierOutput):
    """What classification returns. aux_loss: that of the experts, which is in `loss`; hidden_states: stage maps."""

    aux_loss: Tensor | None = None


class SettingsPreTrainedModel(PreTrainedModel):
    """What all of these models share: loading, saving, initialisation, recomputation."""

    config: SettingsConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixerBlock", "ViTBlock"]  # noqa: RUF012
    accepts_loss_kwargs = False  # a Trainer divides the loss by its accumulation steps

    def __init__(self, config: SettingsConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.backbone = config.settings().build()

    def save_pretrained(self, *arguments: Any, **named: Any) -> None:
        """Save as transformers does. Raises ValueError where experts are spread over ranks: each holds a part."""
        if any(isinstance(module, Experts) and module.cut != WHOLE for module in self.modules()):
            raise ValueError(
                "the experts are spread over ranks: write a checkpoint with synchromesh.parallel.store, and load it "
                "into a model on one rank"
            )
        super().save_pretrained(*arguments, **named)

    def _features(self, pixel_values: Tensor) -> Features:
        for module in self.backbone.modules():
            if isinstance(module, Stage | ViT):
                module.checkpointed = self.gradient_checkpointing
        return self.backbone(pixel_values)

    def _init_weights(self, module: nn.Module) -> None:
        initialize_own(module, self.config.init_std)  # pyright: ignore[reportAttributeAccessIssue]  # of all settings


class SettingsForImageClassification(SettingsPreTrainedModel):
    """A backbone and a linear head on its pooled features."""

    def __init__(self, config: SettingsConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.head = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> MoEImageClassifierOutput:
        """Return logits; with labels also their loss, the experts' included while training.

        Args:
            pixel_values: [B, C, H, W], of any size.
            labels: [B].
        """
        features = self._features(pixel_values)
        logits = self.head(features.pooled)
        loss = extra = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
            extra = aux_loss(self) if self.training else None
            loss = loss if extra is None else loss + extra.to(loss)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        maps = features.maps if wanted else None
        return MoEImageClassifierOutput(loss=loss, logits=logits, hidden_states=maps, aux_loss=extra)  # pyright: ignore[reportArgumentType]


class SettingsBackbone(BackboneMixin, SettingsPreTrainedModel):
    """The maps of the stages, before merging and without the last normalisation.

    While training, the last map carries the experts' loss: its gradient joins in where the map's own comes back.
    """

    has_attentions = False

    def __init__(self, config: SettingsConfig) -> None:
        super().__init__(config)
        if "stem" in self.out_features:
            raise ValueError("out_features has 'stem', wanted stages only: 'stage1' and so on")
        self.num_features = [self.backbone.widths[0], *self.backbone.widths]
        self.backbone.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  # no map passes it
        self.post_init()

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **_: Any
    ) -> BackboneOutput:
        """Return the maps [B, C, H, W] of the stages that `out_features` names."""
        maps = self._features(pixel_values).maps
        found = [x for name, x in zip(self.stage_names[1:], maps, strict=True) if name in self.out_features]
        if self.training and torch.is_grad_enabled() and self.config.aux_loss_in_backward:  # pyright: ignore[reportAttributeAccessIssue]
            found[-1] = carry(found[-1], aux_loss(self))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(feature_maps=tuple(found), hidden_states=maps if wanted else None)  # pyright: ignore[reportArgumentType]


class ViTMoEForImageClassification(SettingsForImageClassification):
    """A ViT with experts, as a classifier."""

    config_class = ViTMoEConfig


class ViTMoEBackbone(SettingsBackbone):
    """A ViT with experts, as a backbone of one map."""

    config_class = ViTMoEConfig


class FocalNetMoEForImageClassification(SettingsForImageClassification):
    """A FocalNet with experts, as a classifier."""

    config_class = FocalNetMoEConfig


class FocalNetMoEBackbone(SettingsBackbone):
    """A FocalNet with experts, as a backbone."""

    config_class = FocalNetMoEConfig


class PVTMoEForImageClassification(SettingsForImageClassification):
    """A PVT with experts, as a classifier."""

    config_class = PVTMoEConfig


class PVTMoEBackbone(SettingsBackbone):
    """A PVT with experts, as a backbone."""

    config_class = PVTMoEConfig


class SpectrumNetMoEForImageClassification(SettingsForImageClassification):
    """A SpectrumNet with experts, as a classifier."""

    config_class = SpectrumNetMoEConfig


class SpectrumNetMoEBackbone(SettingsBackbone):
    """A SpectrumNet with experts, as a backbone."""

    config_class = SpectrumNetMoEConfig


FAMILIES: tuple[tuple[type[SettingsConfig], type[SettingsForImageClassification], type[SettingsBackbone]], ...] = (
    (ViTMoEConfig, ViTMoEForImageClassification, ViTMoEBackbone),
    (FocalNetMoEConfig, FocalNetMoEForImageClassification, FocalNetMoEBackbone),
    (PVTMoEConfig, PVTMoEForImageClassification, PVTMoEBackbone),
    (SpectrumNetMoEConfig, SpectrumNetMoEForImageClassification, SpectrumNetMoEBackbone),
)
"""Configuration, classifier and backbone of each family."""
