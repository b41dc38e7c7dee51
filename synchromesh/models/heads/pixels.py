"""Pixels: a head that reconstructs the picture from a backbone's last map (SimMIM, arXiv 2111.09886)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.models.features import Backbone


class PixelDecoder(nn.Module):
    """A backbone that sees hidden patches as a token, and one linear layer from each position to its pixels.

    Args:
        backbone: with a mask token.
        channels: of the images.
    """

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        self.backbone, self.stride = backbone, backbone.strides[-1]
        self.decoder = nn.Conv2d(backbone.widths[-1], self.stride**2 * channels, 1)

    def forward(
        self, images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Return the images as the head draws them, cut off at their own border.

        Args:
            images: normalised.
            hidden: pixels that are not seen; a patch that holds one is hidden as a whole.
        """
        patches = None if hidden is None else hidden_positions(hidden, self.backbone.strides[0])
        last = self.backbone(images, patches).last
        # Each position's stride^2 * channels numbers become its square of pixels.
        drawn = shuffled(self.decoder(last.permute(0, 3, 1, 2).contiguous()), self.stride)
        return drawn[:, :, : images.shape[2], : images.shape[3]]


def shuffled(x: Float[Tensor, "B _ H W"], side: int) -> Float[Tensor, "B _ _ _"]:
    """Return the same as `pixel_shuffle`, whose backward refuses a batch without images, such as a rank may have."""
    batch, _, height, width = x.shape
    channels = x.shape[1] // side**2
    apart = x.view(batch, channels, side, side, height, width).permute(0, 1, 4, 2, 5, 3)
    return apart.reshape(batch, channels, height * side, width * side)


def hidden_positions(hidden: Bool[Tensor, "B H W"], stride: int) -> Bool[Tensor, "B L"]:
    """Return which positions of a map see a hidden pixel, row by row; at the border a position may see fewer."""
    short = [-side % stride for side in (hidden.shape[2], hidden.shape[1])]
    padded = nn.functional.pad(hidden, (0, short[0], 0, short[1]))
    rows, columns = padded.shape[1] // stride, padded.shape[2] // stride
    return padded.view(len(hidden), rows, stride, columns, stride).any(4).any(2).flatten(1)


def masked_l1(
    drawn: Float[Tensor, "B C H W"], images: Float[Tensor, "B C H W"], hidden: Bool[Tensor, "B H W"]
) -> Float[Tensor, ""]:
    """Return the sum of |drawn - image| over the hidden pixels and channels, in float32 or wider."""
    wide = torch.promote_types(drawn.dtype, torch.float32)
    return ((drawn.to(wide) - images.to(wide)).abs() * hidden[:, None]).sum()
