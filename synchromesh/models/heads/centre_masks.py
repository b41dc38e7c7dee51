"""Masks for the dense head: each object brings the weights of a small network that finds its pixels (CondInst).

A map of few channels is made once for an image. At the position of an object's centre the head says the weights of
three 1 x 1 convolutions, which see this map and how far each of its positions is from the object (arXiv 2003.05664).

Shape letters: B images, M objects, C channels of the map, K numbers of an object's network, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synchromesh.models.heads.pyramid import PositionNorm

CHANNELS = 8  # of the map, and of what is between an object's layers
FINER = 2  # times as many positions as the map along each side: masks are learnt at this size
# Inputs and outputs of an object's layers; the first one sees the offset (x, y) besides the map.
LAYERS = ((CHANNELS + 2, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, 1))
NUMBERS = sum((seen + 1) * said for seen, said in LAYERS)  # of an object's network: weights and biases
SMALL = 1e-3  # in the overlap's quotient, so that an empty mask has a loss
AT_ONCE = 16  # masks of a whole image in memory at a time, in evaluation


@dataclass(frozen=True)
class Networks:
    """The networks of some objects of one or several images.

    Attributes:
        numbers: weights, then biases, layer after layer.
        centre: x and y of the position that said them, in pixels.
        reach: pixels that count as one in the offset from there.
    """

    numbers: Float[Tensor, "M K"]
    centre: Float[Tensor, "M 2"]
    reach: Float[Tensor, " M"]

    def chosen(self, which: Tensor | slice) -> Networks:
        """Return some of them."""
        return Networks(self.numbers[which], self.centre[which], self.reach[which])


class MaskMap(nn.Module):
    """Maps of a pyramid, summed at the finest one's stride, to the map that all objects of an image share."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(levels))
        self.norm = PositionNorm(width)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.out = nn.Conv2d(width, CHANNELS, 1)

    def forward(self, maps: Sequence[Float[Tensor, "B D _ _"]]) -> Float[Tensor, "B C H W"]:
        size = maps[0].shape[-2:]
        total = self.sides[0](maps[0])
        for side, x in zip(list(self.sides)[1:], maps[1:], strict=True):
            total = total + F.interpolate(side(x), size=size, mode="bilinear", align_corners=False)
        return self.out(F.relu(self.smooth(F.relu(self.norm(total))))).float()


def mask_logits(
    shared: Float[Tensor, "B C H W"], image: Int[Tensor, " M"], networks: Networks, stride: int
) -> Float[Tensor, "M H W"]:
    """Return the logits of each object's pixels at the positions of the map, in float32.

    Args:
        shared: the maps.
        image: which image each object is in.
        networks: of the objects.
        stride: pixels between two positions of the map.
    """
    with torch.autocast(shared.device.type, enabled=False):
        x = torch.cat([_offsets(shared, networks, stride), shared[image].float()], dim=1).flatten(2)
        start, numbers = 0, networks.numbers.float()
        for place, (seen, said) in enumerate(LAYERS):
            weights = numbers[:, start : start + seen * said].reshape(-1, said, seen)
            start += seen * said
            x = weights @ x + numbers[:, start : start + said, None]
            start += said
            x = x if place == len(LAYERS) - 1 else x.relu()
    return x[:, 0].unflatten(1, shared.shape[-2:])


def mask_loss(
    shared: Float[Tensor, "B C H W"],
    image: Int[Tensor, " M"],
    networks: Networks,
    masks: Bool[Tensor, "M _ _"],
    stride: int,
) -> Float[Tensor, ""]:
    """Return the sum over the objects of 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)), p the probability, t the truth.

    Both have `FINER` times as many positions as the map along each side; t is whether most of a position's pixels are
    the object's. Without objects it is 0, with gradients.
    """
    if not len(image):
        return shared.sum() * 0 + networks.numbers.sum() * 0
    finer = min(FINER, stride)
    probability = _finer(mask_logits(shared, image, networks, stride), finer).sigmoid()
    truth = targets(masks, probability.shape[-2:], stride // finer)
    both = (probability * truth).sum((1, 2))
    whole = probability.square().sum((1, 2)) + truth.sum((1, 2))
    return (1 - (2 * both + SMALL) / (whole + SMALL)).sum()


@torch.no_grad()
def found_masks(
    shared: Float[Tensor, "C H W"], networks: Networks, size: Int[Tensor, " 2"], stride: int
) -> Bool[Tensor, "M _ _"]:
    """Return the pixels of the objects of one image, in the image without its padding: probability above one half."""
    height, width = size.tolist()
    found = torch.zeros(len(networks.reach), height, width, dtype=torch.bool, device=shared.device)
    for start in range(0, len(found), AT_ONCE):
        few = slice(start, start + AT_ONCE)
        own = networks.chosen(few)
        image = torch.zeros(len(own.reach), dtype=torch.int64, device=shared.device)
        logits = _finer(mask_logits(shared[None], image, own, stride), stride)
        found[few] = logits[:, :height, :width] > 0
    return found


@torch.no_grad()
def targets(masks: Bool[Tensor, "M _ _"], size: Sequence[int], pixels: int) -> Float[Tensor, "M H W"]:
    """Return masks with so many positions, each of `pixels` x `pixels`: 1 where half of them or more are the object's.

    Pixels beyond the image are none of an object.
    """
    height, width = size
    bottom, right = height * pixels - masks.shape[1], width * pixels - masks.shape[2]
    share = F.avg_pool2d(F.pad(masks.float(), (0, right, 0, bottom))[:, None], pixels)[:, 0]
    return (share >= 0.5).float()


def _offsets(shared: Float[Tensor, "B C H W"], networks: Networks, stride: int) -> Float[Tensor, "M 2 H W"]:
    """Return how far, right and down, each position is from each object, in its reach."""
    height, width = shared.shape[-2:]
    x, y = (
        ((torch.arange(many, device=shared.device) + 0.5) * stride - networks.centre[:, dim, None])
        / networks.reach[:, None]
        for many, dim in ((width, 0), (height, 1))
    )
    shape = (len(x), height, width)
    return torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=1)


def _finer(logits: Float[Tensor, "M H W"], times: int) -> Float[Tensor, "M H2 W2"]:
    return F.interpolate(logits[:, None], scale_factor=times, mode="bilinear", align_corners=False)[:, 0]
