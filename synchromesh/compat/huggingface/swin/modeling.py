"""SwinV2-MoE under transformers' interfaces: image classification, and a backbone for its detectors and segmenters.

Inside are the modules of `synchromesh.models`, under the names that a `Classifier` gives its tensors.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from synchromesh.compat.huggingface.swin.configuration import SwinV2MoEConfig
from synchromesh.compat.huggingface.swin.weights import from_transformers
from synchromesh.models.features import Features
from synchromesh.models.initialize import initialize_own
from synchromesh.models.swin_v2 import SwinBlock, SwinStage, SwinV2
from synchromesh.models.window_attention import PositionBias
from synchromesh.moe.carry import carry
from synchromesh.moe.experts import WHOLE, Experts
from synchromesh.moe.record import aux_loss

Model = TypeVar("Model", bound="SwinV2MoEPreTrainedModel")


def register_swin() -> None:
    """Make transformers' AutoConfig, AutoModelForImageClassification and AutoBackbone know SwinV2-MoE."""
    AutoConfig.register(SwinV2MoEConfig.model_type, SwinV2MoEConfig, exist_ok=True)
    AutoModelForImageClassification.register(SwinV2MoEConfig, SwinV2MoEForImageClassification, exist_ok=True)
    AutoBackbone.register(SwinV2MoEConfig, SwinV2MoEBackbone, exist_ok=True)


@dataclass
class SwinV2MoEImageClassifierOutput(ImageClassifierOutput):
    """What classification returns. aux_loss: that of the experts, which is in `loss`; hidden_states: stage maps."""

    aux_loss: Tensor | None = None


class SwinV2MoEPreTrainedModel(PreTrainedModel):
    """What both models share: loading, saving, initialisation, recomputation."""

    config: SwinV2MoEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = SwinV2MoEConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwinBlock"]  # noqa: RUF012
    accepts_loss_kwargs = False  # a Trainer divides the loss by its accumulation steps

    def __init__(self, config: SwinV2MoEConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.backbone = SwinV2(config.swin())

    @classmethod
    def from_dense(cls: type[Model], dense: PreTrainedModel, **experts: Any) -> Model:
        """Make experts of a dense Swinv2's feed-forwards: each starts as a copy of the block's.

        The first output equals the dense model's: a token's weights sum to one, by `norm_topk_prob=True`.

        Args:
            dense: a transformers Swinv2 classifier, model or backbone. experts: fields of `SwinV2MoEConfig`.

        Raises:
            ValueError: a field or tensor that these models do not have.
        """
        config = SwinV2MoEConfig.from_dense(dense.config, **experts)  # pyright: ignore[reportArgumentType]
        if not config.norm_topk_prob or config.capacity_factor is not None:
            warnings.warn(
                "with norm_topk_prob=False or a capacity, the first output is not that of the dense model: experts are "
                "weighted below one, or drop tokens",
                stacklevel=2,
            )
        model = cls(config).train(dense.training)
        nn.Module.to(model, dense.dtype)
        state = from_transformers(dense.state_dict())
        whole = any(name.startswith("backbone.") for name in state)
        state = {name if whole else f"backbone.{name}": tensor for name, tensor in state.items()}
        own = model.state_dict()
        fits = {name: t.expand(own[name].shape) for name in own if (t := _copied(name, state)) is not None}
        left = [name for name in own if name not in fits and not name.startswith(("head.", "backbone.norm."))]
        if any(".router." not in name for name in left):
            raise ValueError(f"the dense model has nothing for {[name for name in left if '.router.' not in name][:3]}")
        model.load_state_dict(fits, strict=False)
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
        for stage in self.backbone.stages:
            assert isinstance(stage, SwinStage)
            stage.checkpointed = self.gradient_checkpointing
        return self.backbone(pixel_values)

    def _init_weights(self, module: nn.Module) -> None:
        initialize_own(module, self.config.initializer_range)
        if isinstance(module, PositionBias | SwinBlock):
            module.reset_buffers()


class SwinV2MoEForImageClassification(SwinV2MoEPreTrainedModel):
    """A backbone and a linear head on its pooled features."""

    def __init__(self, config: SwinV2MoEConfig) -> None:
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
    ) -> SwinV2MoEImageClassifierOutput:
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
        return SwinV2MoEImageClassifierOutput(loss=loss, logits=logits, hidden_states=maps, aux_loss=extra)  # pyright: ignore[reportArgumentType]


class SwinV2MoEBackbone(BackboneMixin, SwinV2MoEPreTrainedModel):
    """The maps of the stages, before merging and without the last normalisation, as transformers' Swinv2 gives them.

    While training, the last map carries the experts' loss: its gradient joins in where the map's own comes back.
    """

    has_attentions = False

    def __init__(self, config: SwinV2MoEConfig) -> None:
        super().__init__(config)
        if "stem" in self.out_features:
            raise ValueError("out_features has 'stem', wanted stages only: 'stage1' and so on")
        sizes = self.backbone.config
        self.num_features = [sizes.embed_dim, *(sizes.width(stage) for stage in range(len(sizes.depths)))]
        self.backbone.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]  # no map passes it
        self.post_init()

    @can_return_tuple
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **_: Any
    ) -> BackboneOutput:
        """Return the maps [B, C, H, W] of the stages that `out_features` names."""
        maps = self._features(pixel_values).maps
        found = [x for name, x in zip(self.stage_names[1:], maps, strict=True) if name in self.out_features]
        if self.training and torch.is_grad_enabled() and self.config.aux_loss_in_backward:
            found[-1] = carry(found[-1], aux_loss(self))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BackboneOutput(feature_maps=tuple(found), hidden_states=maps if wanted else None)  # pyright: ignore[reportArgumentType]


def _copied(name: str, dense: dict[str, Tensor]) -> Tensor | None:
    """Return what a dense model has for one of our tensors; experts are seen as copies of its feed-forward."""
    block, _, part = name.partition(".experts.")
    if not part:
        return dense.get(name)
    stem, bias, _ = part.partition("_bias")
    tensor = dense.get(f"{block}.{stem}.{'bias' if bias else 'weight'}")
    if tensor is None:
        return None
    return tensor.t() if part == "down" else tensor
