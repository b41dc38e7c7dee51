"""The library's backbones under transformers' interfaces: image classification, and backbones for its heads.

What all of them share. Inside are the modules of `synchromesh.models`, under the names that a `Classifier` gives its
tensors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from synchromesh.compat.huggingface.backbones.dense import copies_of, dense_state
from synchromesh.models.features import Features
from synchromesh.models.initialize import initialize_own
from synchromesh.models.pyramid import Stage
from synchromesh.models.swin_v2 import SwinBlock
from synchromesh.models.vit import ViT
from synchromesh.models.window_attention import PositionBias
from synchromesh.moe.carry import carry
from synchromesh.moe.experts import WHOLE, Experts
from synchromesh.moe.record import aux_loss

Model = TypeVar("Model", bound="MoEPreTrainedModel")


@dataclass
class MoEImageClassifierOutput(ImageClassifierOutput):
    """What classification returns. aux_loss: that of the experts, which is in `loss`; hidden_states: stage maps."""

    aux_loss: Tensor | None = None


class MoEPreTrainedModel(PreTrainedModel):
    """What all of these models share: loading, saving, initialisation, recomputation, and their making from dense ones.

    A configuration says what the backbone is made of, by `settings()`, and what a dense model's one is with experts, by
    `from_dense(config, **fields)`.
    """

    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwinBlock", "MixerBlock", "ViTBlock"]  # noqa: RUF012
    accepts_loss_kwargs = False  # a Trainer divides the loss by its accumulation steps

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.backbone = config.settings().build()

    @classmethod
    def from_dense(cls: type[Model], dense: PreTrainedModel, **experts: Any) -> Model:
        """Make experts of a dense model's feed-forwards: each starts as a copy of the block's.

        The first output equals the dense model's: a token's weights sum to one, by `norm_topk_prob=True`.

        Args:
            dense: a transformers classifier, model or backbone of the family. experts: fields of the configuration.

        Raises:
            ValueError: a field or tensor that these models do not have, or a feed-forward that experts cannot copy.
        """
        config = cls.config_class.from_dense(dense.config, **experts)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        if any(config.moe_blocks) and (not config.norm_topk_prob or config.capacity_factor is not None):
            warnings.warn(
                "with norm_topk_prob=False or a capacity, the first output is not that of the dense model: experts are "
                "weighted below one, or drop tokens",
                stacklevel=2,
            )
        model = cls(config).train(dense.training)
        nn.Module.to(model, dense.dtype)
        model.load_state_dict(copies_of(model.state_dict(), dense_state(dense)), strict=False)
        return model

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
        initialize_own(module, self.backbone.init_std)
        if isinstance(module, PositionBias | SwinBlock):
            module.reset_buffers()


class MoEForImageClassification(MoEPreTrainedModel):
    """A backbone and a linear head on its pooled features."""

    def __init__(self, config: Any) -> None:
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


class MoEBackbone(BackboneMixin, MoEPreTrainedModel):
    """The maps of the stages, before merging and without the last normalisation.

    While training, the last map carries the experts' loss: its gradient joins in where the map's own comes back.
    """

    has_attentions = False

    def __init__(self, config: Any) -> None:
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
