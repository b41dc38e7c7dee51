"""FocalNet: a staged backbone without attention, which modulates each position by its context (arXiv 2203.11926).

- focal modulation: depthwise convolutions see ever larger surroundings, gates weigh them and the mean of the map, and
  the sum multiplies each position's own query;
- norms before or after a branch, learned scales of branches, convolutions that overlap as embedding and merge;
- any image size: patches and merges pad with zeros on the right and at the bottom;
- the feed-forward of every block comes from a factory, so that mixtures of experts need no subclass;
- four stage maps for dense tasks, mask token for masked image modelling, stochastic depth, gradient checkpointing.

Shape letters: B images, C D channels, H W rows and columns, L patches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.features import FromData
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.initialize import initialize
from synchromesh.models.linear import apply
from synchromesh.models.mixtures import FeedForwardFactory, feed_forwards
from synchromesh.models.pyramid import (
    DoublingConfig,
    Mixer,
    MixerBlock,
    PatchEmbedding,
    PatchProjection,
    Pyramid,
    Stage,
    drop_path_rate,
    post_norm,
    pre_norm,
)


@final
@dataclass(frozen=True)
class FocalNetConfig(DoublingConfig):
    """What a FocalNet is made of.

    Attributes:
        image_size: height and width, or both at once, that costs are counted for; forward takes any size.
        patch_size: side of a patch, pixels; 4 for overlapping patches.
        in_channels: of the images.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        focal_levels: depthwise convolutions of the blocks of each stage.
        focal_windows: side of the first of them; each next one is larger by 2.
        mlp_ratio: hidden width of a feed-forward over its width.
        conv_embed: whether embedding (7 x 7, stride 4) and merges (3 x 3, stride 2) overlap.
        post_norm: whether branches end with their norms instead of beginning with them.
        modulator_norm: whether what was modulated is normalised before the last projection.
        mean_modulator: whether contexts are averaged over the levels instead of summed.
        layer_scale: first value of learned scales of branches; none for no scales.
        drop_path: largest stochastic depth rate; it rises linearly from 0 over the blocks.
        dropout: after the patch embedding, modulation and each feed-forward.
        mask_token: whether there is a learned token for hidden patches (masked image modelling).
        checkpointed: whether training recomputes blocks in backward instead of keeping their insides.
        init_std: standard deviation of the first weights.
        experts: the mixtures of experts in some blocks; none for a dense model.
    """

    image_size: Annotated[int | tuple[int, int], FromData] = 224
    patch_size: int = 4
    in_channels: Annotated[int, FromData] = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    focal_levels: tuple[int, ...] = (2, 2, 2, 2)
    focal_windows: tuple[int, ...] = (3, 3, 3, 3)
    mlp_ratio: float = 4.0
    conv_embed: bool = False
    post_norm: bool = False
    modulator_norm: bool = False
    mean_modulator: bool = False
    layer_scale: float | None = None
    drop_path: float = 0.1
    dropout: float = 0.0
    mask_token: Annotated[bool, FromData] = False
    checkpointed: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        stages = len(self.depths)
        if len(self.focal_levels) != stages or len(self.focal_windows) != stages:
            raise ValueError(
                f"focal_levels is {self.focal_levels} and focal_windows {self.focal_windows}, wanted one value for "
                f"each of the {stages} stages of depths {self.depths}"
            )
        for name in ("patch_size", "in_channels", "embed_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted an integer >= 1")
        if min(self.focal_levels) < 1 or any(side < 1 or side % 2 == 0 for side in self.focal_windows):
            raise ValueError(
                f"focal_levels is {self.focal_levels} and focal_windows {self.focal_windows}, wanted levels >= 1 and "
                "odd sides"
            )
        for name in ("drop_path", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a rate in [0, 1)")
        if self.conv_embed and self.patch_size != 4:
            raise ValueError(f"patch_size is {self.patch_size}, wanted 4: overlapping patches have a stride of 4")

    def build(self, *, ffn: FeedForwardFactory | None = None) -> FocalNet:
        return FocalNet(self, ffn=ffn)

    def ffn(self) -> FeedForwardFactory:
        """Return what makes the feed-forward of each block. Raises ValueError for experts in no block of it."""
        return feed_forwards(self.depths, self.mlp_ratio, experts=self.experts, dropout=self.dropout)


class FocalModulation(Mixer):
    """Multiplies each position's query by a gated sum of what ever larger surroundings hold.

    Args:
        width: C.
        levels: depthwise convolutions, each on what the one before saw.
        window: side of the first; each next one is larger by 2.
        mean: whether contexts are averaged instead of summed.
        norm: whether the product is normalised before the last projection.
        dropout: on what it returns.
    """

    def __init__(
        self, width: int, *, levels: int, window: int, mean: bool = False, norm: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width, self.levels, self.mean = width, levels, mean
        self.enter = nn.Linear(width, 2 * width + levels + 1)
        self.focal = nn.ModuleList(
            nn.Conv2d(width, width, window + 2 * level, padding=(window + 2 * level) // 2, groups=width, bias=False)
            for level in range(levels)
        )
        self.context = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width) if norm else None
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W _"]:
        query, context, gates = apply(self.enter, x).split((self.width, self.width, self.levels + 1), -1)
        context, gates = context.permute(0, 3, 1, 2), gates.permute(0, 3, 1, 2)
        total = torch.zeros_like(context[:, :, :1, :1])
        for level, convolution in enumerate(self.focal):
            context = F.gelu(convolution(context))
            total = total + context * gates[:, level : level + 1]
        total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, self.levels :]
        total = total / (self.levels + 1) if self.mean else total
        y = query * apply(self.context, total.permute(0, 2, 3, 1))
        return self.dropout(apply(self.proj, y if self.norm is None else self.norm(y)))

    def multiply_adds(self, height: int, width: int, channels: int) -> float:
        convolved = sum(convolution.get_parameter("weight").numel() for convolution in self.focal)
        dense = self.enter.weight.numel() + self.context.weight.numel() + self.proj.weight.numel()
        # One product of each level and of the mean with its gate, one of context and query.
        gated = (self.levels + 2) * channels + (0 if self.norm is None else channels)
        return float(height * width * (convolved + dense + gated))


@final
class FocalNet(Pyramid):
    """The backbone: images to features.

    Args:
        config: sizes, rates, style and experts.
        ffn: makes the feed-forward of each block from (stage, block, width), instead of what the config says.
    """

    optional = frozenset({"embed.mask_token"})

    def __init__(self, config: FocalNetConfig, *, ffn: FeedForwardFactory | None = None) -> None:
        super().__init__()
        self.config, self.init_std, ffn = config, config.init_std, ffn or config.ffn()
        stages = range(len(config.depths))
        self.widths = tuple(config.width(stage) for stage in stages)
        self.strides = tuple(config.patch_size << stage for stage in stages)
        shape = {"kernel": 7, "padding": 2} if config.conv_embed else {}
        self.embed = PatchEmbedding(
            config.in_channels,
            config.embed_dim,
            config.patch_size,
            mask_token=config.mask_token,
            dropout=config.dropout,
            **shape,
        )
        self.stages = nn.ModuleList(_stage(config, stage, ffn) for stage in stages)
        self.norm = nn.LayerNorm(self.widths[-1])
        initialize(self, config.init_std)

    def map_size(self, stage: int) -> tuple[int, int]:
        return self.config.map_size(stage)


def _stage(config: FocalNetConfig, stage: int, ffn: FeedForwardFactory) -> Stage:
    width, before = config.width(stage), sum(config.depths[:stage])
    blocks = [
        MixerBlock(
            _modulation(config, stage),
            width,
            ffn=ffn(stage, block, width),
            residual=post_norm if config.post_norm else pre_norm,
            drop_path=drop_path_rate(config.drop_path, config.depths, stage, block),
            layer_depth=1 + before + block,
            layer_scale=config.layer_scale,
        )
        for block in range(config.depths[stage])
    ]
    last = stage == len(config.depths) - 1
    shape = {"kernel": 3, "padding": 1} if config.conv_embed else {}
    merge = nn.Identity() if last else PatchProjection(width, 2 * width, 2, **shape)
    return Stage(blocks, merge, checkpointed=config.checkpointed, layer_depth=before + config.depths[stage])


def _modulation(config: FocalNetConfig, stage: int) -> FocalModulation:
    return FocalModulation(
        config.width(stage),
        levels=config.focal_levels[stage],
        window=config.focal_windows[stage],
        mean=config.mean_modulator,
        norm=config.modulator_norm,
        dropout=config.dropout,
    )


# published sizes


def focalnet_tiny(num_classes: int = 1000, *, levels: int = 2) -> Classifier:
    """Build FocalNet-T: width 96, depths 2-2-6-2; 2 levels are its small receptive field (srf), 3 its large one."""
    return _classifier(96, (2, 2, 6, 2), levels, num_classes)


def focalnet_small(num_classes: int = 1000, *, levels: int = 2) -> Classifier:
    """Build FocalNet-S: width 96, depths 2-2-18-2; levels as in `focalnet_tiny`."""
    return _classifier(96, (2, 2, 18, 2), levels, num_classes)


def focalnet_base(num_classes: int = 1000, *, levels: int = 2) -> Classifier:
    """Build FocalNet-B: width 128, depths 2-2-18-2; levels as in `focalnet_tiny`."""
    return _classifier(128, (2, 2, 18, 2), levels, num_classes)


def focalnet_large(num_classes: int = 21842, *, levels: int = 3) -> Classifier:
    """Build FocalNet-L as pre-trained on ImageNet-22K: width 192, overlapping patches, post-norm, scales of branches.

    3 levels begin with windows of 5; 4 levels with windows of 3, and average their contexts.
    """
    return _large(192, levels, num_classes)


def focalnet_xlarge(num_classes: int = 21842, *, levels: int = 3) -> Classifier:
    """Build FocalNet-XL as pre-trained on ImageNet-22K: width 256, otherwise as `focalnet_large`."""
    return _large(256, levels, num_classes)


def focalnet_huge(num_classes: int = 21842, *, levels: int = 3) -> Classifier:
    """Build FocalNet-H as pre-trained on ImageNet-22K: width 352, norm in the modulation, windows from 3 on."""
    config = dataclasses.replace(_wide(352, levels, window=3), modulator_norm=True)
    return Classifier(config.build(), num_classes)


def _classifier(embed_dim: int, depths: tuple[int, ...], levels: int, num_classes: int) -> Classifier:
    config = FocalNetConfig(embed_dim=embed_dim, depths=depths, focal_levels=(levels,) * 4, drop_path=0.2)
    return Classifier(config.build(), num_classes)


def _large(embed_dim: int, levels: int, num_classes: int) -> Classifier:
    config = _wide(embed_dim, levels, window=5 if levels < 4 else 3)
    return Classifier(dataclasses.replace(config, mean_modulator=levels > 3).build(), num_classes)


def _wide(embed_dim: int, levels: int, *, window: int) -> FocalNetConfig:
    return FocalNetConfig(
        embed_dim=embed_dim,
        depths=(2, 2, 18, 2),
        focal_levels=(levels,) * 4,
        focal_windows=(window,) * 4,
        conv_embed=True,
        post_norm=True,
        layer_scale=1e-4,
        drop_path=0.5,
    )
