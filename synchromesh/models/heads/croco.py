"""CroCo v2: hidden patches of a view drawn from the few visible ones and a second view (arXiv 2210.10716, 2211.10408).

Shape letters: B pairs, C channels, H W pixels, L patches, P numbers of a patch.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.models.features import Backbone
from synchromesh.models.initialize import initialize
from synchromesh.models.patches import pictures_of
from synchromesh.models.vit import ViT
from synchromesh.models.vit_decoder import ViTDecoderConfig

BOUND = 3.0  # a and b of the paper's bounded scales for stereo


def as_vit(backbone: Backbone, why: str) -> ViT:
    """Return the backbone as a ViT, the only one whose blocks see some patches alone. Raises ValueError."""
    if not isinstance(backbone, ViT):
        raise ValueError(f"{why} encodes some patches alone, got a {type(backbone).__name__}: wanted a ViTConfig")
    return backbone


class CrossViewDecoder(nn.Module):
    """One encoder for both views, a decoder whose blocks attend to the second one, and a linear layer to pixels.

    Args:
        backbone: the encoder.
        decoder: with cross-attention.
        channels: of the images.
    """

    def __init__(self, backbone: ViT, decoder: ViTDecoderConfig, channels: int) -> None:
        super().__init__()
        if not decoder.cross:
            raise ValueError("the decoder has no cross-attention, by which it sees the second view: wanted cross=True")
        self.backbone, self.init_std = backbone, decoder.init_std
        self.decoder = decoder.build(backbone)
        self.pixels = nn.Linear(decoder.width, backbone.strides[0] ** 2 * channels)
        initialize(self.pixels, self.init_std)

    def forward(
        self,
        first: Float[Tensor, "B C H W"],
        second: Float[Tensor, "B C H W"] | None,
        hidden: Bool[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L P"]:
        """Return all patches of the first view as the head draws them, each normalised.

        Args:
            first: normalised pixels.
            second: the same of the other view, all of which is seen; None for none.
            hidden: patches of the first view that nobody sees, as many of each.
        """
        seen = self.backbone.encode(first, hidden)
        other = None if second is None else self.backbone.encode(second)
        return self.pixels(self.decoder(seen, other)).flatten(1, 2)


class DisparityDecoder(nn.Module):
    """Encoder and decoder of `CrossViewDecoder` on two whole views, and a linear layer to disparities and scales.

    Args:
        backbone: the encoder.
        decoder: with cross-attention.
        unit: pixels of disparity for an output of 1.
    """

    def __init__(self, backbone: ViT, decoder: ViTDecoderConfig, unit: float) -> None:
        super().__init__()
        if not decoder.cross:
            raise ValueError("the decoder has no cross-attention, by which it sees the second view: wanted cross=True")
        self.backbone, self.init_std, self.unit = backbone, decoder.init_std, unit
        self.decoder = decoder.build(backbone)
        self.decoder.mask_token.requires_grad_(False)  # nothing is hidden: ranks would wait for its gradient
        self.disparity = nn.Linear(decoder.width, 2 * backbone.strides[0] ** 2)
        initialize(self.disparity, self.init_std)

    def forward(self, first: Float[Tensor, "B C H W"], second: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 2 H W"]:
        """Return the disparity of each pixel of the first view, and the log of its error's scale, both in pixels."""
        found = self.decoder(self.backbone.encode(first), self.backbone.encode(second))
        grid = (found.shape[1], found.shape[2])
        drawn = pictures_of(self.disparity(found).flatten(1, 2), self.backbone.strides[0], grid)
        drawn = drawn[:, :, : first.shape[2], : first.shape[3]].to(torch.promote_types(drawn.dtype, torch.float32))
        return torch.stack((drawn[:, 0] * self.unit, bounded_log_scale(drawn[:, 1])), 1)


def bounded_log_scale(x: Float[Tensor, "*B"], bound: float = BOUND) -> Float[Tensor, "*B"]:
    """Return log s = 2 a (sigmoid(x / a) - 1/2), so that e^-a < s < e^a."""
    return 2 * bound * (torch.sigmoid(x / bound) - 0.5)


def laplacian(found: Float[Tensor, "B 2 H W"], disparity: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """Return the sum of |e| / s + log s over pixels of known disparity, which is above 0."""
    known = disparity > 0
    error = (found[:, 0] - disparity).abs()
    return torch.where(known, error * torch.exp(-found[:, 1]) + found[:, 1], 0).sum()
