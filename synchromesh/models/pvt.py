"""PVT: a staged backbone whose positions attend to a shrunken map (arXiv 2102.12122; version 2: arXiv 2106.13797).

- queries of all positions, keys and values of squares of them, put together by a convolution, or of 7 x 7 means;
- version 1 has learned positions for each stage and a class token in the last; version 2 has overlapping patches and a
  depthwise convolution in each feed-forward instead, and pools the mean;
- any image size: patches of version 1 pad with zeros on the right and at the bottom, positions are resized;
- the feed-forward of every block comes from a factory, so that mixtures of experts need no subclass. Experts stand in
  the place of the whole feed-forward, convolution included; a class token is one of their tokens.

Shape letters: B images, C D channels, H W rows and columns, N M positions, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Annotated, Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.models.attention import dot_product_attention
from synchromesh.models.features import Features, FromData
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.initialize import initialize
from synchromesh.models.linear import apply
from synchromesh.models.mixtures import FeedForward, FeedForwardFactory, feed_forwards
from synchromesh.models.pyramid import (
    Mixer,
    MixerBlock,
    PatchEmbedding,
    PatchProjection,
    Pyramid,
    PyramidConfig,
    Stage,
    drop_path_rate,
    run_blocks,
)

POOLED = 7  # side of the map that keys and values of linear attention are made of


class PVTVersion(Enum):
    """Which of the designs."""

    V1 = "v1"
    V2 = "v2"
    V2_LINEAR = "v2_linear"  # keys and values of 7 x 7 means, so that cost grows linearly with the image


@final
@dataclass(frozen=True)
class PVTConfig(PyramidConfig):
    """What a PVT is made of.

    Attributes:
        image_size: height and width, or both at once, that learned positions are laid out for; forward takes any size.
        in_channels: of the images.
        version: which of the designs.
        patch_size: pixels between two patches of the first stage; each next stage halves the map.
        widths: of the stages.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        reductions: side of the squares that keys and values are made of, for each stage; 1 for every position.
        mlp_ratios: hidden width of a feed-forward over its width, for each stage.
        qkv_bias: whether queries, keys and values have biases.
        drop_path: largest stochastic depth rate; it rises linearly from 0 over the blocks.
        dropout: after embeddings, attention and each feed-forward.
        attention_dropout: on attention weights.
        mask_token: whether there is a learned token for hidden patches (masked image modelling).
        checkpointed: whether training recomputes blocks in backward instead of keeping their insides.
        init_std: standard deviation of the first weights.
        norm_eps: of the norms.
        experts: the mixtures of experts in some blocks; none for a dense model.
    """

    image_size: Annotated[int | tuple[int, int], FromData] = 224
    in_channels: Annotated[int, FromData] = 3
    version: PVTVersion = PVTVersion.V2
    patch_size: int = 4
    widths: tuple[int, ...] = (32, 64, 160, 256)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0)
    qkv_bias: bool = True
    drop_path: float = 0.1
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mask_token: Annotated[bool, FromData] = False
    checkpointed: bool = False
    init_std: float = 0.02
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name in ("widths", "num_heads", "reductions", "mlp_ratios"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, wanted one value for each of the {stages} stages of depths "
                    f"{self.depths}"
                )
        for name in ("patch_size", "in_channels", *("widths", "num_heads", "reductions")):
            value = getattr(self, name)
            if (min(value) if isinstance(value, tuple) else value) < 1:
                raise ValueError(f"{name} is {value}, wanted integers >= 1")
        for name in ("drop_path", "dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a rate in [0, 1)")
        for stage, (width, heads) in enumerate(zip(self.widths, self.num_heads, strict=True)):
            if width % heads:
                raise ValueError(f"stage {stage} has width {width}, which {heads} heads do not divide")
        if self.version is PVTVersion.V1 and self.reductions[-1] != 1:
            raise ValueError(f"reductions is {self.reductions}, wanted 1 at the end: a class token is in no square")

    def build(self, *, ffn: FeedForwardFactory | None = None) -> PVT:
        return PVT(self, ffn=ffn)

    def ffn(self) -> FeedForwardFactory:
        """Return what makes the feed-forward of each block. Raises ValueError for experts in no block of it."""
        plain = partial(ConvFeedForward, relu=self.version is PVTVersion.V2_LINEAR)
        return feed_forwards(
            self.depths,
            self.mlp_ratios,
            experts=self.experts,
            dropout=self.dropout,
            plain=FeedForward if self.version is PVTVersion.V1 else plain,
        )

    def width(self, stage: int) -> int:
        return self.widths[stage]

    def patches(self, stage: int) -> dict[str, Any]:
        """Return the shape of a stage's patches, as `PatchProjection` takes it."""
        side = self.patch_size if stage == 0 else 2
        overlapping = {} if self.version is PVTVersion.V1 else {"kernel": 2 * side - 1, "padding": side - 1}
        return {"side": side, "norm_eps": self.norm_eps, **overlapping}


# parts of a block


class ReducedAttention(Mixer):
    """Attention of all positions to squares of them.

    Args:
        config: sizes and rates.
        stage: from 0.
    """

    def __init__(self, config: PVTConfig, stage: int) -> None:
        super().__init__()
        width, self.num_heads = config.widths[stage], config.num_heads[stage]
        self.linear = config.version is PVTVersion.V2_LINEAR
        self.side = 1 if self.linear else config.reductions[stage]
        self.attention_dropout = config.attention_dropout
        self.q = nn.Linear(width, width, bias=config.qkv_bias)
        self.kv = nn.Linear(width, 2 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        reduced = self.linear or self.side > 1
        self.reduce = nn.Conv2d(width, width, self.side, stride=self.side) if reduced else None
        self.norm = nn.LayerNorm(width, eps=config.norm_eps) if reduced else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... _"]:
        tokens = x.flatten(1, -2)
        seen = tokens if self.reduce is None else self._reduced(x)
        q = apply(self.q, tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = apply(self.kv, seen).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = dot_product_attention(q, k, v, dropout=self.attention_dropout if self.training else 0.0)
        y = self.dropout(apply(self.proj, y))
        return y.view(*x.shape[:-1], y.shape[-1])  # adapted, it may be wider

    def multiply_adds(self, height: int, width: int, channels: int) -> float:
        positions, seen, own = height * width, height * width, 0
        if self.reduce is not None:
            seen = POOLED**2 if self.linear else max(1, height // self.side) * max(1, width // self.side)
            own = seen * (self.reduce.weight.numel() + channels)  # with its norm
        projected = 2 * (positions + seen) * channels**2
        return float(own + projected + 2 * positions * seen * channels)

    def _reduced(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B M C"]:
        assert self.reduce is not None
        assert self.norm is not None
        map_first = x.permute(0, 3, 1, 2)
        if self.linear:
            y = self.reduce(F.adaptive_avg_pool2d(map_first, POOLED))
            return F.gelu(self.norm(y.flatten(2).transpose(1, 2)))
        # A square that does not fit at the right or the bottom is left out; a map smaller than one is filled up.
        short = [max(0, self.side - side) for side in map_first.shape[2:]]
        map_first = F.pad(map_first, (0, short[1], 0, short[0])) if any(short) else map_first
        return self.norm(self.reduce(map_first).flatten(2).transpose(1, 2))


class ConvFeedForward(nn.Module):
    """The feed-forward of version 2: down(gelu(convolution(up(x)))), the convolution 3 x 3 and of each channel apart.

    Args:
        width: of x.
        hidden: between.
        down_bias: whether the last layer has a bias.
        dropout: on hidden numbers and on what it returns.
        relu: whether hidden numbers pass a relu before the convolution.
    """

    def __init__(
        self, width: int, hidden: int, *, down_bias: bool = True, dropout: float = 0.0, relu: bool = False
    ) -> None:
        super().__init__()
        self.relu = relu
        self.up = nn.Linear(width, hidden)
        self.convolution = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.down = nn.Linear(hidden, width, bias=down_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        y = apply(self.up, x)
        y = self.convolution((F.relu(y) if self.relu else y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.dropout(apply(self.down, self.dropout(F.gelu(y))))


# embedding and merge


class PlacedPatches(nn.Module):
    """Adds learned positions to a map, resized where it has another size.

    Args:
        size: height and width that positions are learned for.
        width: C.
        dropout: on the sum.
    """

    undecayed = frozenset({"positions"})

    def __init__(self, size: tuple[int, int], width: int, *, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(*size, width))
        self.dropout = nn.Dropout(dropout)

    def initialize(self, std: float) -> None:
        nn.init.trunc_normal_(self.positions, std=std)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W C"]:
        return self.dropout(x + self._resized(x.shape[1], x.shape[2]))

    def _resized(self, height: int, width: int) -> Float[Tensor, "H W C"]:
        if self.positions.shape[:2] == (height, width):
            return self.positions
        first = F.interpolate(self.positions.permute(2, 0, 1)[None], size=(height, width), mode="bilinear")
        return first[0].permute(1, 2, 0)


class PVTEmbedding(PatchEmbedding):
    """Patches of images, with their positions in version 1."""

    def __init__(self, config: PVTConfig) -> None:
        super().__init__(
            config.in_channels,
            config.widths[0],
            **config.patches(0),
            mask_token=config.mask_token,
            dropout=0.0 if config.version is PVTVersion.V1 else config.dropout,
        )
        self.place = _placed(config, 0)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of images, channels first
        self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B H2 W2 D"]:
        return self.place(super().forward(images, hidden))


class PVTMerge(PatchProjection):
    """A stage's map to the patches of the next: normalised first in version 2, with positions in version 1."""

    def __init__(self, config: PVTConfig, stage: int) -> None:
        super().__init__(config.widths[stage], config.widths[stage + 1], **config.patches(stage + 1))
        old = config.version is PVTVersion.V1
        self.before = nn.Identity() if old else nn.LayerNorm(config.widths[stage], eps=config.norm_eps)
        self.place = _placed(config, stage + 1)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 D"]:
        return self.place(super().forward(self.before(x)))

    def multiply_adds(self, height: int, width: int) -> float:
        normed = 0 if isinstance(self.before, nn.Identity) else 4 * self.proj.in_channels
        return super().multiply_adds(height, width) + height * width * normed


def _placed(config: PVTConfig, stage: int) -> nn.Module:
    if config.version is not PVTVersion.V1:
        return nn.Identity()
    return PlacedPatches(config.map_size(stage), config.widths[stage], dropout=config.dropout)


class ClassStage(Stage):
    """The last stage of version 1: its blocks see a class token before the positions of the map."""

    undecayed = frozenset({"class_token", "class_position"})

    def __init__(self, config: PVTConfig, blocks: list[nn.Module], *, layer_depth: int) -> None:
        super().__init__(blocks, nn.Identity(), checkpointed=config.checkpointed, layer_depth=layer_depth)
        self.class_token = nn.Parameter(torch.zeros(config.widths[-1]))
        self.class_position = nn.Parameter(torch.zeros(config.widths[-1]))

    def initialize(self, std: float) -> None:
        nn.init.trunc_normal_(self.class_token, std=std)
        nn.init.trunc_normal_(self.class_position, std=std)

    def forward(
        self, x: Float[Tensor, "B H W C"], mask: Bool[Tensor, "B H W"] | None = None
    ) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B N C"]]:
        """Return the map after the blocks, and the whole sequence."""
        size, own = x.shape[1:3], (self.class_token + self.class_position).to(x.dtype).expand(len(x), 1, -1)
        tokens = torch.cat((own, x.flatten(1, 2)), 1)
        here = None if mask is None else F.pad(mask.flatten(1), (1, 0), value=True)
        tokens = run_blocks(self.blocks, tokens, here, checkpointed=self.checkpointed and self.training)
        after = tokens[:, 1:].unflatten(1, size)
        return (after if mask is None else after.where(mask[..., None], 0)), tokens


# model


@final
class PVT(Pyramid):
    """The backbone: images to features.

    Args:
        config: sizes, rates, version and experts.
        ffn: makes the feed-forward of each block from (stage, block, width), instead of what the config says. Those of
            the last stage of version 1 see [B, N, width], all others [B, H, W, width].
    """

    optional = frozenset({"embed.mask_token"})

    def __init__(self, config: PVTConfig, *, ffn: FeedForwardFactory | None = None) -> None:
        super().__init__()
        self.config, self.init_std, ffn = config, config.init_std, ffn or config.ffn()
        stages = range(len(config.depths))
        self.widths = config.widths
        self.strides = tuple(config.patch_size << stage for stage in stages)
        self.embed = PVTEmbedding(config)
        self.stages = nn.ModuleList(_stage(config, stage, ffn) for stage in stages)
        self.norm = nn.LayerNorm(self.widths[-1], eps=config.norm_eps)
        initialize(self, config.init_std)

    def map_size(self, stage: int) -> tuple[int, int]:
        return self.config.map_size(stage)

    def block_size(self, stage: int) -> tuple[int, int]:
        height, width = self.config.map_size(stage)
        return (1, height * width + 1) if isinstance(self.stages[stage], ClassStage) else (height, width)

    def features(
        self, last: Float[Tensor, "B ... C"], maps: tuple[Tensor, ...], here: Bool[Tensor, "B H W"] | None
    ) -> Features:
        if self.config.version is not PVTVersion.V1:
            return super().features(last, maps, here)
        after = last[:, 1:].unflatten(1, maps[-1].shape[2:])
        return Features(last[:, 0], after if here is None else after.where(here[..., None], 0), maps)


def _stage(config: PVTConfig, stage: int, ffn: FeedForwardFactory) -> Stage:
    width, before = config.widths[stage], sum(config.depths[:stage])
    blocks: list[nn.Module] = [
        MixerBlock(
            ReducedAttention(config, stage),
            width,
            ffn=ffn(stage, block, width),
            drop_path=drop_path_rate(config.drop_path, config.depths, stage, block),
            layer_depth=1 + before + block,
            norm_eps=config.norm_eps,
        )
        for block in range(config.depths[stage])
    ]
    depth, last = before + config.depths[stage], stage == len(config.depths) - 1
    if last and config.version is PVTVersion.V1:
        return ClassStage(config, blocks, layer_depth=depth)
    merge = nn.Identity() if last else PVTMerge(config, stage)
    return Stage(blocks, merge, checkpointed=config.checkpointed, layer_depth=depth)


# published sizes


def pvt_v1(num_classes: int = 1000, *, depths: tuple[int, ...] = (2, 2, 2, 2)) -> Classifier:
    """Build a PVT of version 1: Tiny, Small (3-4-6-3), Medium (3-4-18-3) or Large (3-8-27-3)."""
    config = PVTConfig(version=PVTVersion.V1, widths=(64, 128, 320, 512), depths=depths)
    return Classifier(config.build(), num_classes)


def pvt_v2_b0(num_classes: int = 1000) -> Classifier:
    """Build PVTv2-B0: widths from 32 to 256, depths 2-2-2-2."""
    return Classifier(PVTConfig().build(), num_classes)


def pvt_v2(
    num_classes: int = 1000,
    *,
    depths: tuple[int, ...] = (3, 4, 6, 3),
    mlp_ratios: tuple[float, ...] = (8.0, 8.0, 4.0, 4.0),
    linear: bool = False,
) -> Classifier:
    """Build a larger PVTv2: B1 (2-2-2-2), B2, B3 (3-4-18-3), B4 (3-8-27-3) or B5 (3-6-40-3, ratios of 4)."""
    config = PVTConfig(
        version=PVTVersion.V2_LINEAR if linear else PVTVersion.V2,
        widths=(64, 128, 320, 512),
        depths=depths,
        mlp_ratios=mlp_ratios,
    )
    return Classifier(config.build(), num_classes)
