"""SpectrumNet: a staged backbone that weighs the frequencies of its maps, after Dynamic Spectrum Mixer.

After the papers (arXiv 2309.06721 and its authors' 2608.18662): a discrete cosine transform of each channel's map, a
weight for each of K bands that a small network makes of the spectrum itself, and the transform back. The first paper's
stages, widths and norms are unknown to us: those of FocalNet stand here. Two things are ours: the weights of the bands
are the softmax times K, so that equal ones change nothing, and maps of fewer positions than bands have a band for each.

- any image size: patches and merges pad with zeros on the right and at the bottom;
- the feed-forward of every block comes from a factory, so that mixtures of experts need no subclass;
- four stage maps for dense tasks, mask token for masked image modelling, stochastic depth, gradient checkpointing.

Shape letters: B images, C channels, H W rows and columns, N positions or frequencies, K bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.models.attention import grid_places
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
)

# spectrum


def cosines(size: int, *, like: Tensor) -> Float[Tensor, "N N"]:
    """Return the orthonormal discrete cosine transform (DCT-II): a row for each frequency, a column for each place."""
    place = torch.arange(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    angles = math.pi / size * place[:, None] * (place + 0.5)
    rows = angles.cos() * math.sqrt(2 / size)
    return torch.cat((rows[:1] / math.sqrt(2), rows[1:])).to(like.dtype)


def zigzag(height: int, width: int, *, device: torch.device | None = None) -> Int[Tensor, " N"]:
    """Return the numbers of a map's places, row by row, along its diagonals: from low to high frequencies.

    Diagonals are walked in turns up and down, as in JPEG.
    """
    row, column = grid_places(height, width, device=device).unbind(1)
    diagonal = row + column
    along = torch.where(diagonal % 2 == 0, column, row)  # even diagonals go up, odd ones down
    return (diagonal * (height + width) + along).argsort()


def bands_of(positions: int, bands: int, *, device: torch.device | None = None) -> Int[Tensor, " N"]:
    """Return the band of each frequency in zigzag order: `bands` runs whose lengths differ by 1 at most."""
    return torch.arange(positions, device=device) * bands // positions


class SpectrumMixer(Mixer):
    """Weighs the frequencies of each channel by what its own spectrum is like.

    The spectrum in zigzag order is averaged in K bands, normalised, and passes a network K -> hidden -> K of all
    channels; its softmax, times K, are the weights of the bands. Then comes the transform back, and a linear layer.

    Args:
        width: C.
        bands: K.
        hidden: of the network.
        dropout: on what it returns.
    """

    def __init__(self, width: int, *, bands: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bands = bands
        self.enter = nn.Linear(width, width)
        self.norm = nn.LayerNorm(bands)
        self.up = nn.Linear(bands, hidden)
        self.down = nn.Linear(hidden, bands)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B H W C"]) -> Float[Tensor, "B H W _"]:
        height, width = x.shape[1:3]
        rows, columns = cosines(height, like=x), cosines(width, like=x)
        spectrum = _along(_along(apply(self.enter, x), rows, 1), columns, 2)
        order = zigzag(height, width, device=x.device)
        band = torch.empty_like(order).scatter(0, order, bands_of(len(order), self.bands, device=x.device))
        weights = self.weights(spectrum.flatten(1, 2), band)  # [B, K, C]
        spectrum = spectrum * weights.index_select(1, band).view(x.shape)
        y = _along(_along(spectrum, rows.t(), 1), columns.t(), 2)
        return self.dropout(apply(self.proj, y))

    def weights(self, spectrum: Float[Tensor, "B N C"], band: Int[Tensor, " N"]) -> Float[Tensor, "B K C"]:
        """Return the weight of each band of each channel; their mean over bands is 1. `band` is that of each row."""
        counts = spectrum.new_zeros(self.bands).index_add(0, band, spectrum.new_ones(len(band))).clamp(min=1)
        sums = spectrum.new_zeros(spectrum.shape[0], self.bands, spectrum.shape[2]).index_add(1, band, spectrum)
        means = (sums / counts[:, None]).mT  # [B, C, K]
        return apply(self.down, F.gelu(apply(self.up, self.norm(means)))).softmax(-1).mT * self.bands

    def multiply_adds(self, height: int, width: int, channels: int) -> float:
        positions = height * width
        transformed = 2 * positions * (height + width) * channels
        made = channels * (2 * self.bands * self.up.out_features + self.bands)
        return float(2 * positions * channels**2 + transformed + made + positions * channels)


def _along(x: Float[Tensor, "B H W C"], matrix: Float[Tensor, "N N"], dim: int) -> Float[Tensor, "B H W C"]:
    """Multiply one dimension of x by a matrix."""
    return (x.movedim(dim, -1) @ matrix.t()).movedim(-1, dim)


# model


@final
@dataclass(frozen=True)
class SpectrumNetConfig(DoublingConfig):
    """What a SpectrumNet is made of.

    Attributes:
        image_size: height and width, or both at once, that costs are counted for; forward takes any size.
        patch_size: side of a patch, pixels.
        in_channels: of the images.
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        bands: K, of each spectrum.
        band_hidden: hidden width of the network that weighs bands.
        mlp_ratio: hidden width of a feed-forward over its width.
        layer_scale: first value of learned scales of branches; none for no scales.
        drop_path: largest stochastic depth rate; it rises linearly from 0 over the blocks.
        dropout: after the patch embedding, mixing and each feed-forward.
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
    bands: int = 64
    band_hidden: int = 64
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    drop_path: float = 0.1
    dropout: float = 0.0
    mask_token: Annotated[bool, FromData] = False
    checkpointed: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "embed_dim", "bands", "band_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted an integer >= 1")
        for name in ("drop_path", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted a rate in [0, 1)")

    def build(self, *, ffn: FeedForwardFactory | None = None) -> SpectrumNet:
        return SpectrumNet(self, ffn=ffn)

    def ffn(self) -> FeedForwardFactory:
        """Return what makes the feed-forward of each block. Raises ValueError for experts in no block of it."""
        return feed_forwards(self.depths, self.mlp_ratio, experts=self.experts, dropout=self.dropout)


@final
class SpectrumNet(Pyramid):
    """The backbone: images to features.

    Args:
        config: sizes, rates and experts.
        ffn: makes the feed-forward of each block from (stage, block, width), instead of what the config says.
    """

    optional = frozenset({"embed.mask_token"})

    def __init__(self, config: SpectrumNetConfig, *, ffn: FeedForwardFactory | None = None) -> None:
        super().__init__()
        self.config, self.init_std, ffn = config, config.init_std, ffn or config.ffn()
        stages = range(len(config.depths))
        self.widths = tuple(config.width(stage) for stage in stages)
        self.strides = tuple(config.patch_size << stage for stage in stages)
        self.embed = PatchEmbedding(
            config.in_channels,
            config.embed_dim,
            config.patch_size,
            mask_token=config.mask_token,
            dropout=config.dropout,
        )
        self.stages = nn.ModuleList(_stage(config, stage, ffn) for stage in stages)
        self.norm = nn.LayerNorm(self.widths[-1])
        initialize(self, config.init_std)

    def map_size(self, stage: int) -> tuple[int, int]:
        return self.config.map_size(stage)


def _stage(config: SpectrumNetConfig, stage: int, ffn: FeedForwardFactory) -> Stage:
    width, before = config.width(stage), sum(config.depths[:stage])
    blocks = [
        MixerBlock(
            SpectrumMixer(width, bands=config.bands, hidden=config.band_hidden, dropout=config.dropout),
            width,
            ffn=ffn(stage, block, width),
            drop_path=drop_path_rate(config.drop_path, config.depths, stage, block),
            layer_depth=1 + before + block,
            layer_scale=config.layer_scale,
        )
        for block in range(config.depths[stage])
    ]
    last = stage == len(config.depths) - 1
    merge = nn.Identity() if last else PatchProjection(width, 2 * width, 2)
    return Stage(blocks, merge, checkpointed=config.checkpointed, layer_depth=before + config.depths[stage])


def spectrum_tiny(num_classes: int = 1000) -> Classifier:
    """Build a SpectrumNet of FocalNet-T's sizes: width 96, depths 2-2-6-2. The paper's own are unknown to us."""
    return Classifier(SpectrumNetConfig().build(), num_classes)
