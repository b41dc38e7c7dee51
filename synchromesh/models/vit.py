"""ViT: one grid of patches, in which every position attends to every other (arXiv 2010.11929).

- class token or the mean of the patches, learned or 2-D rotary positions (arXiv 2104.09864, as in 2211.10408);
- any image size: patches pad with zeros on the right and at the bottom, learned positions are resized;
- the feed-forward of every block comes from a factory, so that mixtures of experts need no subclass;
- hidden patches become a mask token (SimMIM), or only visible ones are encoded at all (`encode`, as MAE, 2111.06377).

Shape letters: B images, C channels, H W rows and columns of patches, L patches, N tokens: patches and class token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synchromesh.models.attention import SelfAttention, grid_places, rotation_of
from synchromesh.models.features import Backbone, BackboneConfig, Features, FromData, Place
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.initialize import initialize
from synchromesh.models.mixtures import FeedForwardFactory, feed_forwards, multiply_adds_per_token
from synchromesh.models.pyramid import DropPath, drop_path_rate, pre_norm, run_blocks


class Pooling(Enum):
    """What stands for the whole image."""

    CLASS_TOKEN = "class_token"
    MEAN = "mean"


class Positions(Enum):
    """How tokens know where they are."""

    LEARNED = "learned"
    ROTARY = "rotary"  # turns queries and keys by row and column


@final
@dataclass(frozen=True)
class ViTConfig(BackboneConfig):
    """What a ViT is made of.

    Attributes:
        image_size: height and width, or both at once, that learned positions are laid out for; forward takes any size.
        patch_size: side of a patch, pixels.
        in_channels: of the images.
        width: of the tokens.
        depth: number of blocks.
        num_heads: attention heads of each.
        mlp_ratio: hidden width of a feed-forward over its width.
        qkv_bias: whether queries, keys and values have biases.
        pooling: what stands for the whole image; a class token is one more token of each sequence.
        positions: how tokens know where they are.
        rotary_base: of the slowest turns of rotary positions.
        drop_path: largest stochastic depth rate; it rises linearly from 0 over the blocks.
        dropout: after the embedding, attention and each feed-forward.
        attention_dropout: on attention weights.
        mask_token: whether there is a learned token for hidden patches (masked image modelling).
        checkpointed: whether training recomputes blocks in backward instead of keeping their insides.
        init_std: standard deviation of the first weights.
        norm_eps: of the norms.
        experts: the mixtures of experts in some blocks, which are one stage; none for a dense model.
    """

    image_size: Annotated[int | tuple[int, int], FromData] = 224
    patch_size: int = 16
    in_channels: Annotated[int, FromData] = 3
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    pooling: Pooling = Pooling.CLASS_TOKEN
    positions: Positions = Positions.LEARNED
    rotary_base: float = 100.0
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mask_token: Annotated[bool, FromData] = False
    checkpointed: bool = False
    init_std: float = 0.02
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted an integer >= 1")
        for name in ("drop_path", "dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a rate in [0, 1)")
        check_heads(self.width, self.num_heads, rotary=self.positions is Positions.ROTARY)
        if min(self.grid) < 1:
            raise ValueError(f"image_size {self.image_size} is empty, wanted pixels")

    def build(self, *, ffn: FeedForwardFactory | None = None) -> ViT:
        return ViT(self, ffn=ffn)

    def sized(self, *, image_size: int, channels: int) -> ViTConfig:
        return dataclasses.replace(self, image_size=image_size, in_channels=channels)

    def hiding(self) -> ViTConfig:
        return dataclasses.replace(self, mask_token=True)

    def ffn(self) -> FeedForwardFactory:
        """Return what makes the feed-forward of each block. Raises ValueError for experts in no block of it."""
        return feed_forwards((self.depth,), self.mlp_ratio, experts=self.experts, dropout=self.dropout)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width of an image of the configured size; partial patches count."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return -(-height // self.patch_size), -(-width // self.patch_size)

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.num_heads

    @property
    def class_tokens(self) -> int:
        """Tokens of a sequence that are no patches: 1 or 0."""
        return int(self.pooling is Pooling.CLASS_TOKEN)


def check_heads(width: int, num_heads: int, *, rotary: bool) -> None:
    """Raise ValueError unless heads divide the width, and rotary positions a head."""
    if width % num_heads:
        raise ValueError(f"the width is {width}, which {num_heads} heads do not divide")
    if rotary and width // num_heads % 4:
        raise ValueError(f"heads have {width // num_heads} channels, wanted a multiple of 4 for rotary positions")


@dataclass(frozen=True)
class Tokens:
    """The tokens of some patches of images.

    Attributes:
        x: after the last norm, the class token first where there is one.
        places: number of the patch that each token is of, row by row, without the class token; None for all in order.
        grid: rows and columns of patches.
        class_tokens: how many tokens come before those of patches.
    """

    x: Float[Tensor, "B N C"]
    places: Int[Tensor, "B P"] | None
    grid: tuple[int, int]
    class_tokens: int


# embedding


class TokenEmbedding(nn.Module):
    """Cuts images into patches and projects them; adds a class token and learned positions where there are any."""

    layer_depth = 0
    undecayed = frozenset({"mask_token", "class_token", "positions"})

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, extra = config.width, config.class_tokens
        self.patch_size, self.in_channels = config.patch_size, config.in_channels
        self.grid, self.extra = config.grid, extra
        self.proj = nn.Conv2d(config.in_channels, width, config.patch_size, stride=config.patch_size)
        learned = config.positions is Positions.LEARNED
        count = extra + self.grid[0] * self.grid[1]
        self.class_token = nn.Parameter(torch.zeros(width)) if extra else None
        self.positions = nn.Parameter(torch.zeros(count, width)) if learned else None
        self.mask_token = nn.Parameter(torch.zeros(width)) if config.mask_token else None
        self.dropout = nn.Dropout(config.dropout)

    def initialize(self, std: float) -> None:
        for learned in (self.class_token, self.positions, self.mask_token):
            if learned is not None:
                nn.init.trunc_normal_(learned, std=std)

    def forward(
        self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B N C2"], tuple[int, int]]:
        """Return tokens, the class token first, and rows and columns of the patches."""
        if images.shape[1] != self.in_channels:
            raise ValueError(f"images have {images.shape[1]} channels, wanted {self.in_channels}: [B, C, H, W]")
        bottom, right = -images.shape[2] % self.patch_size, -images.shape[3] % self.patch_size
        images = F.pad(images, (0, right, 0, bottom)) if bottom or right else images
        x = self.proj(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        x = x if hidden is None else self._hide(x, hidden)
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), 1)
        return self.dropout(x if self.positions is None else x + self._positions(grid)), grid

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "N C"]:
        assert self.positions is not None
        if grid == self.grid:
            return self.positions
        own, patches = self.positions.split((self.extra, len(self.positions) - self.extra))
        square = patches.unflatten(0, self.grid).permute(2, 0, 1)[None]
        square = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
        return torch.cat((own, square[0].flatten(1).t()))

    def _hide(self, x: Tensor, hidden: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("patches are hidden but the model has no mask token: build it with mask_token=True")
        check_hidden(hidden, x)
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)


def check_hidden(hidden: Tensor, patches: Tensor) -> None:
    """Raise ValueError unless there is one flag for each patch [B, L, C]."""
    if hidden.shape != patches.shape[:2]:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, wanted {tuple(patches.shape[:2])}")


# block


class ViTBlock(nn.Module):
    """Attention to all positions and feed-forward, each in a residual branch that begins with a norm."""

    def __init__(self, config: ViTConfig, block: int, *, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = SelfAttention(
            config.width,
            config.num_heads,
            qkv_bias=config.qkv_bias,
            dropout=config.attention_dropout,
            output_dropout=config.dropout,
        )
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path_rate(config.drop_path, (config.depth,), 0, block))
        self.layer_depth = 1 + block

    def forward(
        self, x: Float[Tensor, "B N C"], rotation: Float[Tensor, "2 *B 1 N d"] | None = None
    ) -> Float[Tensor, "B N C"]:
        x = pre_norm(x, lambda y: self.attention(y, rotation), self.norm1, self.drop_path)
        return pre_norm(x, self.ffn, self.norm2, self.drop_path)

    def multiply_adds(self, tokens: int) -> float:
        """Return those of one sequence: attention, two norms, feed-forward."""
        width = self.attention.proj.in_features
        return self.attention.multiply_adds(tokens) + tokens * (2 * width + multiply_adds_per_token(self.ffn))


# model


@final
class ViT(Backbone):
    """The backbone: images to features of one map.

    Args:
        config: sizes, rates, positions and experts.
        ffn: makes the feed-forward of each block from (0, block, width), instead of what the config says.
    """

    optional = frozenset({"embed.mask_token"})

    def __init__(self, config: ViTConfig, *, ffn: FeedForwardFactory | None = None) -> None:
        super().__init__()
        self.config, self.init_std, ffn = config, config.init_std, ffn or config.ffn()
        self.widths, self.strides, self.checkpointed = (config.width,), (config.patch_size,), config.checkpointed
        self.embed = TokenEmbedding(config)
        self.blocks = nn.ModuleList(
            ViTBlock(config, block, ffn=ffn(0, block, config.width)) for block in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        initialize(self, config.init_std)

    def forward(self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None) -> Features:
        """Return the features of images of any size; the mask token stands for hidden patches.

        Raises:
            ValueError: wrong channels; hidden patches without a mask token, or not one flag per patch.
        """
        x, grid = self.embed(images, hidden)
        x = self._run(x, self._rotation(grid, None, x))
        last = self.norm(x)
        extra = self.config.class_tokens
        maps, patches = (part[:, extra:].unflatten(1, grid) for part in (x, last))
        pooled = last[:, 0] if extra else last.mean(1)
        return Features(pooled=pooled, last=patches, maps=(maps.permute(0, 3, 1, 2),))

    def encode(self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None) -> Tokens:
        """Return the tokens of the visible patches, the only ones that blocks see.

        Args:
            images: normalised pixels.
            hidden: patches that are left out, row by row; as many in each image. None for none.

        Raises:
            ValueError: not one flag per patch, or another number of them in some image.
        """
        x, grid = self.embed(images)
        extra, places = self.config.class_tokens, None
        if hidden is not None:
            check_hidden(hidden, x[:, extra:])
            places = visible_places(hidden)
            patches = x[:, extra:].gather(1, places[..., None].expand(-1, -1, x.shape[2]))
            x = torch.cat((x[:, :extra], patches), 1)
        return Tokens(self.norm(self._run(x, self._rotation(grid, places, x))), places, grid, extra)

    def _run(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        return run_blocks(self.blocks, x, rotation, checkpointed=self.checkpointed and self.training)

    def _rotation(self, grid: tuple[int, int], places: Tensor | None, like: Tensor) -> Tensor | None:
        config = self.config
        if config.positions is Positions.LEARNED:
            return None
        return token_rotation(grid, places, config.class_tokens, config.head_width, config.rotary_base, like)

    def multiply_adds(self) -> float:
        config = self.config
        patches = config.grid[0] * config.grid[1]
        tokens = patches + config.class_tokens
        work = patches * config.width * config.in_channels * config.patch_size**2 + tokens * config.width
        return work + sum(block.multiply_adds(tokens) for block in self.blocks if isinstance(block, ViTBlock))

    def feed_forwards(self) -> Iterator[Place]:
        tokens = self.config.grid[0] * self.config.grid[1] + self.config.class_tokens
        for block in self.blocks:
            yield Place(0, block.get_submodule("ffn"), tokens, self.config.width)


def visible_places(hidden: Bool[Tensor, "B L"]) -> Int[Tensor, "B P"]:
    """Return the numbers of the patches that are not hidden. Raises ValueError unless each image has as many."""
    counts = (~hidden).sum(1)
    if len(counts) and not (counts == counts[0]).all():
        raise ValueError(
            f"images have from {int(counts.min())} to {int(counts.max())} visible patches, wanted as many in each: "
            "one batch is one tensor"
        )
    return (~hidden).nonzero()[:, 1].view(len(hidden), int(counts[0]) if len(counts) else 0)


def token_rotation(
    grid: tuple[int, int],
    places: Int[Tensor, "B P"] | None,
    class_tokens: int,
    head_width: int,
    base: float,
    like: Tensor,
) -> Float[Tensor, "2 *B 1 N d"]:
    """Return the turns of tokens like these: of patches by row and column of the grid, none of a class token."""
    at = grid_places(*grid, device=like.device)[None]
    at = at if places is None else at[0][places]
    rotation = rotation_of(at, head_width, base, dtype=torch.promote_types(like.dtype, torch.float32))
    if not class_tokens:
        return rotation
    still = torch.stack((rotation.new_ones(()), rotation.new_zeros(())))  # cosine and sine of no turn
    still = still.view(2, 1, 1, 1, 1).expand(2, at.shape[0], 1, class_tokens, head_width)
    return torch.cat((still, rotation), -2)


# published sizes


def vit_tiny(num_classes: int = 1000, *, image_size: int = 224) -> Classifier:
    """Build ViT-Ti/16 (DeiT's, arXiv 2012.12877): width 192, 3 heads."""
    return _classifier(192, 12, 3, image_size, num_classes)


def vit_small(num_classes: int = 1000, *, image_size: int = 224) -> Classifier:
    """Build ViT-S/16 (DeiT's, arXiv 2012.12877): width 384, 6 heads."""
    return _classifier(384, 12, 6, image_size, num_classes)


def vit_base(num_classes: int = 1000, *, image_size: int = 224) -> Classifier:
    """Build ViT-B/16: width 768, 12 heads."""
    return _classifier(768, 12, 12, image_size, num_classes)


def vit_large(num_classes: int = 1000, *, image_size: int = 224) -> Classifier:
    """Build ViT-L/16: width 1,024, 24 blocks, 16 heads."""
    return _classifier(1024, 24, 16, image_size, num_classes)


def _classifier(width: int, depth: int, num_heads: int, image_size: int, num_classes: int) -> Classifier:
    config = ViTConfig(image_size=image_size, width=width, depth=depth, num_heads=num_heads, drop_path=0.1)
    return Classifier(config.build(), num_classes)
