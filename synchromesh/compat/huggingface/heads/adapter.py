"""FeatureMaps: a backbone of ours where transformers' models look for one of theirs.

The backbone itself stands outside, in the attribute `backbone` of our model, where weights of pre-training load by its
own names; it runs first, and inside of the transformers model its features are shown.

Shape letters: B images, H W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from synchromesh.compat.huggingface.heads.fields import Levels
from synchromesh.models.features import Features


class FeaturesConfig(BackboneConfigMixin, PreTrainedConfig):
    """Tells transformers' models which maps they will be shown.

    Attributes:
        widths: channels of each map.
        strides: pixels for a position of each.
    """

    model_type = "synchromesh_features"

    def __init__(self, widths: tuple[int, ...] = (), strides: tuple[int, ...] = (), **fields: Any) -> None:
        self.widths, self.strides = list(widths), list(strides)
        self.stage_names = [f"stage{number}" for number in range(1, len(widths) + 1)]
        self.set_output_features_output_indices(out_features=list(self.stage_names) or None, out_indices=None)
        super().__init__(**{name: value for name, value in fields.items() if not name.startswith("out_")})


class FeatureMaps(BackboneMixin, PreTrainedModel):
    """The maps that it is shown, normalised: the last one by the backbone, the others by a layer norm at each position.

    A norm of each position alone, unlike one of a whole map, does not see padding. Maps stay as they lie, channels
    last: laid out anew, UperNet on a CPU took 1.2 times as long in training and 1.6 times in inference.

    Attributes:
        features: what the backbone saw; None outside of `showing`.
    """

    config: FeaturesConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = FeaturesConfig
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__(config)
        self.num_features = config.widths
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in config.widths[:-1])
        self.features: Features | None = None
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BackboneOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the maps [B, C, H, W]; `pixel_values` are not looked at."""
        assert self.features is not None
        shown = self.features.maps[len(self.features.maps) - len(self.config.widths) :]
        finer = [_normalised(x, norm) for x, norm in zip(shown, self.norms, strict=False)]
        last = self.features.last.permute(0, 3, 1, 2)
        return BackboneOutput(feature_maps=(*finer, last))  # pyright: ignore[reportArgumentType]

    @contextmanager
    def showing(self, features: Features) -> Iterator[None]:
        """Show features to what calls this inside of the block."""
        self.features = features
        try:
            yield
        finally:
            self.features = None


def features_config(levels: Levels) -> FeaturesConfig:
    """Return the configuration that stands for a backbone; transformers knows its class from now on."""
    AutoConfig.register(FeaturesConfig.model_type, FeaturesConfig, exist_ok=True)
    AutoBackbone.register(FeaturesConfig, FeatureMaps, exist_ok=True)
    return FeaturesConfig(levels.widths, levels.strides)


def place_of(network: nn.Module) -> str:
    """Return the name of the `FeatureMaps` inside of a transformers model."""
    (name,) = (name for name, module in network.named_modules() if isinstance(module, FeatureMaps))
    return name


def asked(network: nn.Module, place: str, features: Features, **inputs: Any) -> Any:
    """Return what a transformers model says of features; `place` is that of its `FeatureMaps`."""
    maps = network.get_submodule(place)
    assert isinstance(maps, FeatureMaps)
    with maps.showing(features):
        return network(**inputs)


def is_picture(images: Float[Tensor, "B C H W"], sizes: Int[Tensor, "B 2"]) -> Bool[Tensor, "B H W"]:
    """Tell which pixels are an image's, and not padding."""
    rows = torch.arange(images.shape[2], device=images.device)[None] < sizes[:, :1]
    columns = torch.arange(images.shape[3], device=images.device)[None] < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def touched(module: nn.Module) -> Float[Tensor, ""]:
    """Return 0, in float32, with a gradient of zero for every parameter: ranks average gradients of all of them.

    But for what FSDP2 has cut again by now: it does without.
    """
    here = (p for p in module.parameters() if p.requires_grad and p.numel() and not isinstance(p, DTensor))
    ones = [p.flatten()[:1].float() for p in here]
    return torch.cat(ones).sum() * 0 if ones else torch.zeros(())


def in_float32(value: Any) -> Any:
    """Return tensors of half precision inside of lists, tuples and dictionaries as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.itemsize < 4 else value
    if isinstance(value, (list, tuple)):
        return type(value)(in_float32(one) for one in value)
    if isinstance(value, Mapping):
        return {name: in_float32(one) for name, one in value.items()}
    return value


def _normalised(x: Float[Tensor, "B C H W"], norm: nn.Module) -> Float[Tensor, "B C H W"]:
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
