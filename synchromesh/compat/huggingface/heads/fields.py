"""pyramid_fields: what transformers' configurations repeat of a backbone: widths, strides, numbers of maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synchromesh.models.features import Backbone

_SAYS_MAPS = ("out_features", "stage_names", "embed_dim", "patch_size")
_HYBRID = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")  # their encoders and decoders see the same maps


@dataclass(frozen=True)
class Levels:
    """The maps of a backbone that a head sees, the finest first.

    Attributes:
        widths: channels of each.
        strides: pixels of the image, along one side, for a position of each.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.widths)

    def last(self, count: int) -> Levels:
        """Return the coarsest ones, so many or all there are."""
        return Levels(self.widths[-count:], self.strides[-count:])


def levels_of(backbone: Any) -> Levels:
    """Return the maps of a backbone of ours, or of a transformers configuration that says them.

    Raises:
        ValueError: it says none, such as a configuration without patches and stages.
    """
    if isinstance(backbone, Backbone):
        return Levels(tuple(backbone.widths), tuple(backbone.strides))
    told = {name: getattr(backbone, name, None) for name in _SAYS_MAPS}
    missing = [name for name, value in told.items() if value is None]
    if missing:
        raise ValueError(
            f"a {type(backbone).__name__} does not say {missing}, wanted a backbone of this library or a configuration "
            "such as SwinV2MoEConfig"
        )
    # The stem has number 0 among the stages, and the size of the first one.
    steps = [max(0, list(backbone.stage_names).index(name) - 1) for name in backbone.out_features]
    return Levels(tuple(backbone.embed_dim << step for step in steps), tuple(backbone.patch_size << s for s in steps))


def pyramid_fields(backbone: Any, of: Any, *, width: int = 256, points: int = 4, extra: int = 1) -> dict[str, Any]:
    """Return the fields of a transformers configuration that follow from the maps of a backbone.

        config = SwinV2MoEConfig(out_features=["stage2", "stage3", "stage4"])
        RTDetrV2Config(backbone_config=config, **pyramid_fields(config, RTDetrV2Config))

    Args:
        backbone: of this library, a transformers configuration, or `Levels`.
        of: the class of the configuration; one that repeats nothing of its backbone gets no field.
        width: `encoder_hidden_dim` of RT-DETR, D-FINE and DEIMv2, in which their decoder gets the maps.
        points: that the decoder of D-FINE and DEIMv2 samples on each map.
        extra: maps that Deformable DETR makes itself, each half of the one before.

    Raises:
        ValueError: the backbone does not say its maps.
    """
    maps = backbone if isinstance(backbone, Levels) else levels_of(backbone)
    count, kind = len(maps), of.model_type
    if kind in _HYBRID:
        each = {"decoder_n_points": [points] * count}
        own = {"rt_detr_v2": {"decoder_n_levels": count}, "d_fine": each, "deimv2": each}
        return {
            "encoder_in_channels": list(maps.widths),
            "feat_strides": list(maps.strides),
            "encode_proj_layers": [count - 1],
            "decoder_in_channels": [width] * count,
            "num_feature_levels": count,
            **own.get(kind, {}),
        }
    if kind == "deformable_detr":
        return {"num_feature_levels": count + extra}
    if kind == "mask2former":
        return {"feature_strides": list(maps.strides), "common_stride": maps.strides[0]}
    if kind == "upernet":
        return _auxiliary(maps.widths)
    return {}


def _auxiliary(widths: Sequence[int]) -> dict[str, Any]:
    """Return UperNet's fields: its second head always sees the third map."""
    if len(widths) < 3:
        return {"use_auxiliary_head": False}
    return {"auxiliary_in_channels": widths[2]}
