"""Pyramid: what staged backbones share: residual blocks around a mixer and a feed-forward, stages, and their walk.

A backbone is an embedding, stages of blocks, a merge after each stage but the last, and a final norm. A block mixes
positions (window attention, focal modulation, a spectrum, ...) and then computes a feed-forward, each in a residual
branch. How a branch is normalised is a function, the feed-forward comes from a factory, the mixer from a subclass.

Shape letters: B images, C D channels, H W rows and columns.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from synchromesh.models.features import Backbone, BackboneConfig, Features, Place
from synchromesh.models.mixtures import multiply_adds_per_token, takes_mask
from synchromesh.torch_private import has_hooks, transformed

OwnConfig = TypeVar("OwnConfig", bound="PyramidConfig")

# settings


class PyramidConfig(BackboneConfig):
    """Settings of a pyramid whose maps halve from stage to stage, partial patches included.

    No dataclass of its own: a leaf declares these fields, in the order in which its files and its help have them.

    Attributes:
        image_size: height and width, or both at once, that costs are counted for.
        patch_size: pixels between two patches of the first stage.
        in_channels: of the images.
        depths: blocks of each stage.
        mask_token: whether there is a learned token for hidden patches.
    """

    image_size: Any
    patch_size: int
    in_channels: Any
    depths: tuple[int, ...]
    mask_token: Any

    def sized(self: OwnConfig, *, image_size: int, channels: int) -> OwnConfig:
        return dataclasses.replace(self, image_size=image_size, in_channels=channels)

    def hiding(self: OwnConfig) -> OwnConfig:
        return dataclasses.replace(self, mask_token=True)

    def map_size(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's map for an image of the configured size; partial patches count."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        unit = self.patch_size << stage
        return -(-height // unit), -(-width // unit)

    @abstractmethod
    def width(self, stage: int) -> int:
        """Channels of a stage."""


class DoublingConfig(PyramidConfig):
    """Settings of a pyramid whose width doubles from stage to stage; no dataclass of its own either.

    Attributes:
        embed_dim: width of the first stage.
    """

    embed_dim: int

    def width(self, stage: int) -> int:
        return self.embed_dim * 2**stage


# residual branches


class DropPath(nn.Module):
    """Drops a residual branch for whole images and scales up the rest (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def drop_path_rate(largest: float, depths: Sequence[int], stage: int, block: int) -> float:
    """Return the stochastic depth of one block: it rises linearly from 0 over the blocks of all stages."""
    return largest * (sum(depths[:stage]) + block) / max(1, sum(depths) - 1)


class LayerScale(nn.Module):
    """Multiplies each channel of a branch by a learned number that starts small (arXiv 2103.17239)."""

    undecayed = frozenset({"weight"})

    def __init__(self, width: int, first: float) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(torch.full((width,), first))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.first)

    def initialize(self, std: float) -> None:
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "*T C"]) -> Float[Tensor, "*T C"]:
        return x * self.weight


Branch = Callable[[Tensor], Tensor]
Residual = Callable[[Tensor, Branch, nn.Module, Branch], Tensor]
"""(x, branch, norm, end) -> x; ends or begins the branch with the norm; `end` scales and drops what it returns."""


def post_norm(x: Tensor, branch: Branch, norm: nn.Module, end: Branch) -> Tensor:
    """Residual step of SwinV2: x + end(norm(branch(x)))."""
    if not _adds_in_place(x, norm, end):
        return x + end(norm(branch(x)))
    # The norm in its own dtype: torch has no fast loops over two dtypes.
    return end(norm(branch(x).to(norm.weight.dtype)).to(x.dtype)).add_(x)  # pyright: ignore[reportCallIssue, reportArgumentType]


def pre_norm(x: Tensor, branch: Branch, norm: nn.Module, end: Branch) -> Tensor:
    """Residual step of Swin and ViT: x + end(branch(norm(x)))."""
    return x + end(branch(norm(x)))


def _adds_in_place(x: Tensor, norm: nn.Module, end: Branch) -> bool:
    """Tell whether nobody else holds what the branch returns: without gradients, where nothing looks on."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    plain = type(norm) is nn.LayerNorm and norm.weight is not None and not has_hooks(norm)
    return plain and isinstance(end, DropPath) and not has_hooks(end) and not transformed()


# embedding and merge


class Counted(nn.Module, ABC):
    """A module that says what it costs: an embedding, or a merge."""

    @abstractmethod
    def multiply_adds(self, height: int, width: int) -> float:
        """Return those of one map that it returns, of this size."""


class PatchProjection(Counted):
    """Cuts a map into patches that may overlap, and projects and normalises them; a stage's merge, too.

    Args:
        in_channels: of the map.
        width: of the patches.
        side: of a patch, if they do not overlap, and their stride.
        kernel: side of an overlapping patch; None for `side`.
        padding: on all four sides. Beyond it zeros fill up the right and the bottom to whole strides.
        norm_eps: of the norm.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        side: int,
        *,
        kernel: int | None = None,
        padding: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(in_channels, width, kernel or side, stride=side, padding=padding)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H2 W2 D"]:
        return self.patches(x.permute(0, 3, 1, 2))

    def patches(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H2 W2 D"]:
        """Return the patches of a map whose channels come first."""
        bottom, right = -x.shape[2] % self.side, -x.shape[3] % self.side
        x = F.pad(x, (0, right, 0, bottom)) if bottom or right else x
        return self.norm(self.proj(x).permute(0, 2, 3, 1))

    def multiply_adds(self, height: int, width: int) -> float:
        return float(height * width * (self.proj.weight.numel() + self.proj.out_channels))


class PatchEmbedding(PatchProjection):
    """Patches of images; hidden ones become the mask token.

    Args:
        in_channels, width, side, **shape: as those of `PatchProjection`.
        mask_token: whether there is one.
        dropout: on what it returns.
    """

    layer_depth = 0
    undecayed = frozenset({"mask_token"})

    def __init__(
        self, in_channels: int, width: int, side: int, *, mask_token: bool, dropout: float = 0.0, **shape: Any
    ) -> None:
        super().__init__(in_channels, width, side, **shape)
        self.in_channels = in_channels
        self.mask_token = nn.Parameter(torch.zeros(width)) if mask_token else None
        self.dropout = nn.Dropout(dropout)

    def initialize(self, std: float) -> None:
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=std)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # of images, channels first
        self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B L"] | None = None
    ) -> Float[Tensor, "B H2 W2 D"]:
        if images.shape[1] != self.in_channels:
            raise ValueError(f"images have {images.shape[1]} channels, wanted {self.in_channels}: [B, C, H, W]")
        x = self.patches(images)
        return self.dropout(x if hidden is None else with_hidden(x, hidden, self.mask_token))


# block


class Block(nn.Module, ABC):
    """Mixes positions, then computes a feed-forward, each in a residual branch. A subclass adds its mixer first.

    Attributes:
        residual: how a branch is normalised and added.
        norm1, norm2: of the branches.
        ffn: the feed-forward.
        drop_path: of both branches.
        layer_depth: from 1 at the first block, for rates that fall from layer to layer.
    """

    residual: Residual
    norm1: nn.LayerNorm
    ffn: nn.Module
    norm2: nn.LayerNorm
    drop_path: DropPath
    layer_depth: int

    def forward(
        self, x: Float[Tensor, "B ... C"], mask: Bool[Tensor, "B ..."] | None = None
    ) -> Float[Tensor, "B ... C"]:
        """Run the block; where mask is False there is no picture: mixers see zeros there, experts nothing."""
        ffn = self.ffn
        if mask is not None:
            x = x.where(mask[..., None], 0)
            ffn = partial(ffn, mask=mask) if takes_mask(ffn) else ffn
        first, second = self.ends()
        x = self.residual(x, self.mix, self.norm1, first)
        return self.residual(x, ffn, self.norm2, second)

    @abstractmethod
    def mix(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... _"]:
        """Return what each position takes from the others."""

    def ends(self) -> tuple[Branch, Branch]:
        """Return what scales and drops the two branches."""
        return self.drop_path, self.drop_path

    @abstractmethod
    def mixing(self, height: int, width: int, channels: int) -> float:
        """Return the multiply-adds of `mix` for one map of this size."""

    def multiply_adds(self, height: int, width: int, channels: int) -> float:
        """Return those of one map of this size: mixer, two norms, feed-forward."""
        positions = height * width
        own = 2 * positions * channels + positions * multiply_adds_per_token(self.ffn)
        return self.mixing(height, width, channels) + own


class Mixer(nn.Module, ABC):
    """Mixes the positions of a map, [B, H, W, C] -> [B, H, W, C]."""

    @abstractmethod
    def multiply_adds(self, height: int, width: int, channels: int) -> float:
        """Return those of one map of this size."""


class MixerBlock(Block):
    """A block around any mixer, with or without learned scales of its branches.

    Args:
        mixer: mixes positions.
        width: C.
        ffn: the feed-forward.
        residual: `pre_norm` or `post_norm`.
        drop_path: its rate.
        layer_depth: of the block.
        norm_eps: of the norms.
        layer_scale: first value of the scales; None for none.
    """

    def __init__(
        self,
        mixer: Mixer,
        width: int,
        *,
        ffn: nn.Module,
        residual: Residual = pre_norm,
        drop_path: float = 0.0,
        layer_depth: int = 1,
        norm_eps: float = 1e-5,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.residual, self.layer_depth = residual, layer_depth
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)
        self.scale1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.scale2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def mix(self, x: Float[Tensor, "B ... C"]) -> Float[Tensor, "B ... _"]:
        return self.mixer(x)

    def ends(self) -> tuple[Branch, Branch]:
        return self._end(self.scale1), self._end(self.scale2)

    def mixing(self, height: int, width: int, channels: int) -> float:
        assert isinstance(self.mixer, Mixer)
        scaled = 0 if self.scale1 is None else 2 * height * width * channels
        return self.mixer.multiply_adds(height, width, channels) + scaled

    def _end(self, scale: nn.Module | None) -> Branch:
        return self.drop_path if scale is None else lambda x: self.drop_path(scale(x))


# stage


class Stage(nn.Module):
    """Blocks of one width, then what turns their map into the next stage's input.

    Args:
        blocks: of the stage.
        merge: of the map after them; `nn.Identity` in the last stage.
        checkpointed: whether training recomputes blocks in backward instead of keeping their insides.
        layer_depth: of the merge.
    """

    def __init__(self, blocks: Iterable[nn.Module], merge: nn.Module, *, checkpointed: bool, layer_depth: int) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(blocks)
        self.merge = merge
        self.layer_depth = layer_depth

    def forward(
        self, x: Float[Tensor, "B H W C"], mask: Bool[Tensor, "B H W"] | None = None
    ) -> tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H2 W2 D"]]:
        """Return the map after the blocks, and what goes into the next stage."""
        x = run_blocks(self.blocks, x, mask, checkpointed=self.checkpointed and self.training)
        x = x if mask is None else x.where(mask[..., None], 0)
        return x, self.merge(x)


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, *more: Tensor | None, checkpointed: bool
) -> Float[Tensor, "B ... C"]:
    """Run blocks one after the other, each with the same further inputs; recomputed in backward if asked."""
    for block in blocks:
        if checkpointed and torch.is_grad_enabled():
            x = checkpoint(block, x, *more, use_reentrant=False)
        else:
            x = block(x, *more)
    return x


# model


class Pyramid(Backbone):
    """A backbone of stages, each of which has a map.

    Attributes:
        embed: images, and which patches are hidden, to the first map, channels last.
        stages: `Stage`s.
        norm: of the last map.
    """

    embed: Counted
    stages: nn.ModuleList
    norm: nn.Module

    @abstractmethod
    def map_size(self, stage: int) -> tuple[int, int]:
        """Return height and width of a stage's map for an image of the configured size."""

    def block_size(self, stage: int) -> tuple[int, int]:
        """Return height and width of what the blocks of a stage see: its map, if they see no more."""
        return self.map_size(stage)

    def multiply_adds(self) -> float:
        sizes = [self.map_size(stage) for stage in range(len(self.widths))]
        work = self.embed.multiply_adds(*sizes[0]) + sizes[-1][0] * sizes[-1][1] * self.widths[-1]
        for number, (stage, width) in enumerate(zip(self.stages, self.widths, strict=True)):
            assert isinstance(stage, Stage)
            work += sum(b.multiply_adds(*self.block_size(number), width) for b in stage.blocks if isinstance(b, Block))
            if isinstance(stage.merge, Counted):
                work += stage.merge.multiply_adds(*sizes[number + 1])
        return work

    def feed_forwards(self) -> Iterator[Place]:
        for number, stage in enumerate(self.stages):
            height, width = self.block_size(number)
            for block in stage.get_submodule("blocks").children():
                yield Place(number, block.get_submodule("ffn"), height * width, self.widths[number])

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        hidden: Bool[Tensor, "B L"] | None = None,
        mask: Bool[Tensor, ...] | None = None,
    ) -> Features:
        """Return the features of images of any size.

        Args:
            images: normalised pixels.
            hidden: patches that the mask token replaces, row by row.
            mask: [B, H, W], True for pixels of a picture, False for what fills a batch of pictures of several sizes up.
                A position with no pixel of a picture is 0 in every map; no expert sees it, no loss or load counts it.

        Raises:
            ValueError: wrong channels; hidden patches without a mask token, or not one flag per patch; a mask of
                another size, or a picture without a pixel.
        """
        x = self.embed(images, hidden)
        here = None if mask is None else _positions(_checked_mask(mask, images), self.strides[0])
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            here = here if here is None or number == 0 else _positions(here, 2)
            before, x = stage(x, here)
            maps.append(before.permute(0, 3, 1, 2))
        return self.features(self.norm(x), tuple(maps), here)

    def features(
        self, last: Float[Tensor, "B ... C"], maps: tuple[Tensor, ...], here: Bool[Tensor, "B H W"] | None
    ) -> Features:
        """Return what stands for the image beside its maps: the mean over the positions that hold a picture."""
        if here is None:
            return Features(pooled=last.mean((1, 2)), last=last, maps=maps)
        last = last.where(here[..., None], 0)
        pooled = last.sum((1, 2)) / here.sum((1, 2))[:, None].to(last.dtype)
        return Features(pooled=pooled, last=last, maps=maps)


def with_hidden(
    x: Float[Tensor, "B H W C"], hidden: Bool[Tensor, "B L"], mask_token: Float[Tensor, " C"] | None
) -> Float[Tensor, "B H W C"]:
    """Put the mask token in place of hidden patches. Raises ValueError without one, or for another number of flags."""
    if mask_token is None:
        raise ValueError("patches are hidden but the model has no mask token: build it with mask_token=True")
    if hidden.shape != (x.shape[0], x.shape[1] * x.shape[2]):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, wanted {(x.shape[0], x.shape[1] * x.shape[2])}")
    return torch.where(hidden.view(*x.shape[:3], 1), mask_token.to(x.dtype), x)


def _positions(mask: Bool[Tensor, "B H W"], side: int) -> Bool[Tensor, "B H2 W2"]:
    """Return which squares of `side` have any True in them, the map being padded with False."""
    mask = F.pad(mask, (0, -mask.shape[2] % side, 0, -mask.shape[1] % side))
    return mask.unflatten(2, (-1, side)).unflatten(1, (-1, side)).any(4).any(2)


def _checked_mask(mask: Tensor, images: Tensor) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"got a mask of {mask.dtype} {tuple(mask.shape)} for images {tuple(images.shape)}, wanted torch.bool "
            "[B, H, W], True for pixels of a picture"
        )
    if not mask.flatten(1).any(1).all():
        raise ValueError("got a mask that leaves a picture without a pixel, wanted one in each at least: drop others")
    return mask
