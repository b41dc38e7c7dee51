"""MaskNetwork: transformers' Mask2Former or MaskFormer, what it says of features, and what it loses.

Shape letters: B images, Q queries, N classes, M objects of an image, H W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    DetrConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
)

from synchromesh.compat.huggingface.heads.adapter import asked, features_config, place_of, touched
from synchromesh.compat.huggingface.heads.boxes import query_weight
from synchromesh.compat.huggingface.heads.fields import Levels, levels_of, pyramid_fields
from synchromesh.compat.huggingface.heads.masks import Mask2Former, MaskFormer
from synchromesh.models.features import Backbone, Features


@dataclass(frozen=True)
class Said:
    """What the queries of one layer say.

    Attributes:
        classes: logits of each class, and of none at the end.
        masks: logits, of the stride of the finest map.
    """

    classes: Float[Tensor, "B Q _"]
    masks: Float[Tensor, "B Q _ _"]


@dataclass(frozen=True)
class Target:
    """What is true of one image.

    Attributes:
        labels: classes of its objects.
        masks: their pixels, 0 or 1, in the image with its padding.
    """

    labels: Int[Tensor, " M"]
    masks: Float[Tensor, "M H W"]


@final
class MaskNetwork(nn.Module):
    """A transformers model that sees a backbone's features."""

    def __init__(self, backbone: Backbone, num_classes: int, settings: Mask2Former | MaskFormer) -> None:
        super().__init__()
        if settings.width % 32:
            kind = type(settings).__name__
            raise ValueError(f"width is {settings.width}, wanted a multiple of 32: {kind} has norms of 32 groups")
        self.settings = settings
        levels = levels_of(backbone).last(settings.levels)
        make = _mask2former if isinstance(settings, Mask2Former) else _maskformer
        self.network = make(settings, levels, num_classes)  # pyright: ignore[reportArgumentType]
        self.place = place_of(self.network)

    def forward(self, features: Features, images: Float[Tensor, "B C H W"]) -> list[Said]:
        """Return what each layer says, the last one at the end."""
        more = {} if isinstance(self.settings, Mask2Former) else {"output_hidden_states": True}
        said = asked(self.network, self.place, features, pixel_values=images, output_auxiliary_logits=True, **more)
        before = [Said(each["class_queries_logits"], each["masks_queries_logits"]) for each in said.auxiliary_logits]
        return [*before, Said(said.class_queries_logits, said.masks_queries_logits)]

    def sums(self, said: Sequence[Said], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Return the losses of all layers by name, in float32, as sums with a gradient for every parameter.

        That of classes is a mean, times the weights of all queries in hundredths. transformers gives means over the
        masks of the batch; here its criterion is asked for sums. Where what is said is not finite, so are the losses.
        """
        zero = touched(self)
        if not targets:
            return {"class_loss": zero, "mask_loss": zero}
        with torch.autocast(zero.device.type, enabled=False):
            layers = [Said(each.classes.float(), each.masks.float()) for each in (said[-1], *said[:-1])]
            if not all(bool(each.classes.isfinite().all() & each.masks.isfinite().all()) for each in layers):
                bad = layers[0].masks.sum() * torch.nan
                return {"class_loss": bad, "mask_loss": bad}
            parts = [self._layer_sums(each, targets) for each in layers]
        classes, masks = (torch.stack(each).sum() for each in zip(*parts, strict=True))
        return {"class_loss": classes * self._weight(targets) + zero, "mask_loss": masks + zero}

    def nothing(self, features: Features) -> dict[str, Tensor]:
        """Return the losses of a batch without images."""
        zero = features.last.float().sum() * 0
        return {name: value + zero for name, value in self.sums([], []).items()}

    def _weight(self, targets: Sequence[Target]) -> int:
        settings, objects = self.settings, sum(len(each.labels) for each in targets)
        return query_weight(objects, len(targets), queries=settings.queries, no_object=settings.no_object_weight)

    def _layer_sums(self, said: Said, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        criterion: Any = self.network.criterion
        masks, labels = [each.masks for each in targets], [each.labels for each in targets]
        indices = criterion.matcher(said.masks, said.classes, masks, labels)
        of_masks = criterion.loss_masks(said.masks, masks, indices, 1)
        of_classes = criterion.loss_labels(said.classes, labels, indices)["loss_cross_entropy"]
        settings = self.settings
        pair = of_masks["loss_mask"] * settings.mask_weight + of_masks["loss_dice"] * settings.dice_weight
        return of_classes * settings.class_weight, pair


def _mask2former(settings: Mask2Former, levels: Levels, num_classes: int) -> Mask2FormerForUniversalSegmentation:
    if len(levels) < 3:
        raise ValueError(f"the backbone has {len(levels)} maps for Mask2Former, wanted three at least: use MaskFormer")
    config = Mask2FormerConfig(
        **pyramid_fields(levels, Mask2FormerConfig),
        **_common(settings, num_classes),
        feature_size=settings.width,
        mask_feature_size=settings.width,
        hidden_dim=settings.width,
        encoder_feedforward_dim=settings.encoder_ffn,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers + 1,  # what the queries say before the first layer counts as one
        num_attention_heads=settings.heads,
        dropout=settings.dropout,
        dim_feedforward=settings.ffn,
        num_queries=settings.queries,
        train_num_points=settings.points,
        use_auxiliary_loss=True,
        class_weight=settings.class_weight,
    )
    # Set afterwards: given above, it would be warned of as a backbone that transformers does not know.
    config.backbone_config = features_config(levels)
    return Mask2FormerForUniversalSegmentation(config)


def _maskformer(settings: MaskFormer, levels: Levels, num_classes: int) -> MaskFormerForInstanceSegmentation:
    if len(levels) < 2:
        raise ValueError(f"the backbone has {len(levels)} map for MaskFormer, wanted two at least")
    no_other: dict[str, Any] = {"backbone_config": features_config(levels), "use_timm_backbone": False}
    decoder = DetrConfig(
        **no_other,
        num_queries=settings.queries,
        d_model=settings.width,
        decoder_layers=settings.decoder_layers,
        decoder_attention_heads=settings.heads,
        encoder_attention_heads=settings.heads,
        decoder_ffn_dim=settings.ffn,
        dropout=settings.dropout,
    )
    config = MaskFormerConfig(
        **_common(settings, num_classes),
        fpn_feature_size=settings.width,
        mask_feature_size=settings.width,
        decoder_config=decoder,
        use_auxiliary_loss=True,
        cross_entropy_weight=settings.class_weight,
    )
    config.backbone_config = features_config(levels)
    return MaskFormerForInstanceSegmentation(config)


def _common(settings: Mask2Former | MaskFormer, num_classes: int) -> dict[str, Any]:
    names = ("mask_weight", "dice_weight", "no_object_weight")
    return {"num_labels": num_classes, **{name: getattr(settings, name) for name in names}}
