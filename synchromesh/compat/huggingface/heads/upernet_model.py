"""The model of UperNet: transformers' own heads between our backbone and the seam of `SemanticModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from synchromesh.compat.huggingface.heads.adapter import FeatureMaps, features_config, touched
from synchromesh.compat.huggingface.heads.fields import levels_of, pyramid_fields
from synchromesh.compat.huggingface.heads.upernet import Norms, UperNet
from synchromesh.models.features import Backbone
from synchromesh.models.heads.semantic import IGNORE, SemanticModel, enlarged, summed_cross_entropy


@final
class UperNetSegmenter(SemanticModel):
    """A backbone, and a transformers UperNet that sees its features."""

    def __init__(self, backbone: Backbone, num_classes: int, settings: UperNet) -> None:
        super().__init__()
        self.backbone, self.settings, self.num_classes = backbone, settings, num_classes
        levels = levels_of(backbone).last(settings.levels)
        fields = {**pyramid_fields(levels, UperNetConfig), "num_labels": num_classes}
        config = UperNetConfig(
            **fields,
            backbone_config=features_config(levels),
            hidden_size=settings.width,
            pool_scales=list(settings.pool_scales),
            auxiliary_channels=settings.auxiliary_width,
            auxiliary_loss_weight=settings.auxiliary_weight,
        )
        self.network = UperNetForSemanticSegmentation(config)
        if settings.norms is Norms.GROUP:
            _group_norms(self.network)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        ignore: int = IGNORE,
    ) -> Mapping[str, Tensor] | Float[Tensor, "B _ H W"]:
        self._check(len(images))
        maps = self.network.backbone
        assert isinstance(maps, FeatureMaps)
        with maps.showing(self.backbone(images)):
            seen = maps(images).feature_maps
        logits = enlarged(self.network.decode_head(seen), images)
        if labels is None:
            return logits
        first = summed_cross_entropy(logits, labels, ignore=ignore)
        second = self.network.auxiliary_head
        other = first * 0 if second is None else _loss_of(second(seen), images, labels, ignore)
        return {"cross_entropy": first + touched(self.network), "auxiliary_cross_entropy": other}

    def _check(self, images: int) -> None:
        if self.training and images == 1 and self.settings.norms is Norms.BATCH:
            raise ValueError(
                "UperNet with batch norms got 1 image while training, wanted 2 at least, for statistics of what is "
                "pooled to one position: give larger batches, or norms=Norms.GROUP"
            )


def _loss_of(small: Tensor, images: Tensor, labels: Tensor, ignore: int) -> Tensor:
    return summed_cross_entropy(enlarged(small, images), labels, ignore=ignore)


def _group_norms(network: nn.Module) -> None:
    """Put a group norm in the place of each batch norm."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(groups_for(child.num_features), child.num_features))


def groups_for(width: int) -> int:
    """Return how many groups: 32 at most, of four channels at least, since a map may have one position."""
    return math.gcd(width, math.gcd(32, max(1, width // 4)))
