"""MixedAE: mixtures of pictures, taken apart again and drawn as wholes (CVPR 2023).

After the paper: the positions and the temperature of the contrast are recalled. The paper's segment embeddings are left
out, since the decoder here sees the tokens of one picture at a time, and there is nothing to tell apart.

Shape letters: B groups, G pictures of a group, M mixtures of it, C channels, H W pixels, L patches, P their numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.export import register_dataclass

from synchromesh.models.attention import SelfAttention
from synchromesh.models.homologous_attention import HomologousAttention
from synchromesh.models.initialize import initialize
from synchromesh.models.patches import mixed, patches_of, pictures_of, places_of_sources
from synchromesh.models.vit import Tokens, ViT, ViTBlock
from synchromesh.models.vit_decoder import ViTDecoderConfig

PLAIN_BLOCKS = 1  # the first ones keep plain attention


@dataclass(frozen=True)
class Restored:
    """What a model makes of mixtures.

    Attributes:
        drawn: all patches of every picture of each mixture, normalised.
        projected: one row for each place of each mixture, to be contrasted.
        tokens: what the encoder says of it.
    """

    drawn: Float[Tensor, "B M G L P"]
    projected: Float[Tensor, "B M L D"]
    tokens: Float[Tensor, "B M L D2"]


register_dataclass(Restored)


class MixedAutoencoder(nn.Module):
    """Encoder of mixtures with homologous attention, and a decoder of each picture from its part of a mixture.

    Args:
        backbone: the encoder; blocks after the first get homologous attention, whose weights are theirs.
        decoder: without cross-attention.
        channels: of the images.
        ratio: share of the keys that a query attends to; 1 for plain attention.
        projection: width of the rows that are contrasted.
    """

    def __init__(
        self, backbone: ViT, decoder: ViTDecoderConfig, channels: int, *, ratio: float, projection: int
    ) -> None:
        super().__init__()
        if decoder.cross:
            raise ValueError("the decoder has cross-attention, and there is no second view: wanted cross=False")
        attend_homologously(backbone, ratio)
        self.backbone, self.init_std = backbone, decoder.init_std
        self.decoder = decoder.build(backbone)
        self.pixels = nn.Linear(decoder.width, backbone.strides[0] ** 2 * channels)
        self.projector = nn.Linear(backbone.widths[-1], projection)
        initialize(self.pixels, self.init_std)
        initialize(self.projector, self.init_std)

    def forward(self, images: Float[Tensor, "B G C H W"], sources: Int[Tensor, "B M L"]) -> Restored:
        """Mix the pictures of each group, and restore them.

        Args:
            images: normalised pixels.
            sources: picture that each place of each mixture is taken from.
        """
        groups, group = images.shape[:2]
        count, side = sources.shape[1], self.backbone.strides[0]
        grid = (images.shape[3] // side, images.shape[4] // side)
        patches = patches_of(images.flatten(0, 1), side).unflatten(0, (groups, group))
        shown = pictures_of(mixed(patches, sources).flatten(0, 1), side, grid)
        seen = self.backbone.encode(shown)
        drawn = self.pixels(self.decoder(_apart(seen, sources.flatten(0, 1), group)))
        tokens = seen.x[:, seen.class_tokens :]
        return Restored(
            drawn.flatten(1, 2).unflatten(0, (groups, count, group)),
            self.projector(tokens).unflatten(0, (groups, count)),
            tokens.unflatten(0, (groups, count)),
        )


def attend_homologously(backbone: ViT, ratio: float) -> None:
    """Give all blocks of a ViT but the first homologous attention, with their own weights."""
    for block in list(backbone.blocks)[PLAIN_BLOCKS:]:
        assert isinstance(block, ViTBlock)
        if isinstance(block.attention, SelfAttention):
            block.register_module("attention", HomologousAttention(block.attention, ratio))


def same_source(sources: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Return which places of each mixture are taken from the same picture."""
    return sources[:, :, None] == sources[:, None]


def _apart(seen: Tokens, sources: Int[Tensor, "B L"], group: int) -> Tokens:
    """Return the tokens of each picture of each mixture, as of as many images; class tokens are of all of them."""
    places = places_of_sources(sources, group).flatten(0, 1)
    whole = seen.x.repeat_interleave(group, 0)
    extra = seen.class_tokens
    own = whole[:, extra:].gather(1, places[..., None].expand(-1, -1, whole.shape[2]))
    return Tokens(torch.cat((whole[:, :extra], own), 1), places, seen.grid, extra)
