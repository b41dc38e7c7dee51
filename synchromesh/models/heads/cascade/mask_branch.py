"""Masks of regions: a small picture of each class in each region (Mask R-CNN, arXiv 1703.06870).

Shape letters: C channels, P regions, S side of a mask, N classes, M objects, H W rows and columns of an image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from synchromesh.models.heads.cascade.roi_align import roi_align

POINTS = 4  # of a target's bin along each side: enough for objects of a hundred pixels, which are four to a bin
PIXELS_AT_ONCE = 2**22  # of a mask that is pasted


class MaskHead(nn.Module):
    """Squares of features to masks of twice the side, one of each class."""

    def __init__(self, width: int, num_classes: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(convs))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.logits = nn.Conv2d(width, num_classes, 1)
        for layer in (*self.convs, self.upsample, self.logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "P C _ _"]) -> Float[Tensor, "P N S S"]:
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.logits(F.relu(self.upsample(x))).float()


def mask_loss(
    logits: Float[Tensor, "P N S S"],
    labels: Int[Tensor, " P"],
    objects: Int[Tensor, " P"],
    targets: Bool[Tensor, "P S S"],
) -> Float[Tensor, ""]:
    """Return the sum over objects of the mean, over the regions of an object, of the cross entropy of a pixel.

    Only the mask of the object's own class is taught. Each object counts alike, and its regions share its weight.
    mmdetection takes the mean over the regions of a batch: there an object with many regions counts more, and what a
    sum is divided by depends on what the model proposes. Here it is the number of objects, which parts of a batch and
    ranks can add up.
    """
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    error = F.binary_cross_entropy_with_logits(own, targets.to(own.dtype), reduction="none").mean((1, 2))
    _, of_object, regions = objects.unique(return_inverse=True, return_counts=True)
    return (error / regions[of_object]).sum()


@torch.no_grad()
def mask_targets(
    masks: Bool[Tensor, "M H W"], boxes: Float[Tensor, "P 4"], objects: Int[Tensor, " P"], *, side: int
) -> Bool[Tensor, "P S S"]:
    """Return the mask of each region's object inside of the region: bins of which it fills a half or more."""
    found = torch.zeros(len(boxes), side, side, dtype=torch.bool, device=boxes.device)
    for number in objects.unique().tolist():  # a mask at a time has the size of an image in float32
        here = (objects == number).nonzero()[:, 0]
        share = roi_align(
            masks[None, number : number + 1].float(), boxes[here], torch.zeros_like(here),
            stride=1, side=side, samples=POINTS,
        )  # fmt: skip
        found[here] = share[:, 0] >= 0.5
    return found


@torch.no_grad()
def pasted(
    probability: Float[Tensor, "P S S"], boxes: Float[Tensor, "P 4"], *, height: int, width: int
) -> Bool[Tensor, "P {height} {width}"]:
    """Return masks of images: the pixels with their centre inside of the box whose probability is above one half.

    Between the centres of a mask's bins it is interpolated, and zero lies around them. Boxes have an area and lie
    inside of the image; only their pixels are drawn, `PIXELS_AT_ONCE` at a time.
    """
    found = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    for mask, own, box in zip(found, probability, boxes, strict=True):
        left, top, right, bottom = box.tolist()
        columns = torch.arange(max(0, int(left)), min(width, int(right) + 1), device=boxes.device)
        rows = torch.arange(max(0, int(top)), min(height, int(bottom) + 1), device=boxes.device)
        x = ((columns + 0.5 - left) / (right - left) * 2 - 1).expand(1, 1, -1)
        for some in rows.split(max(1, PIXELS_AT_ONCE // max(1, len(columns)))):
            y = ((some + 0.5 - top) / (bottom - top) * 2 - 1)[None, :, None]
            grid = torch.stack(torch.broadcast_tensors(x, y), dim=3)
            drawn = F.grid_sample(own[None, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            mask[some[0] : some[-1] + 1, columns[0] : columns[-1] + 1] = drawn[0, 0] > 0.5
    return found
