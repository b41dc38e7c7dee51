"""Masks against the same rules as loops over regions, bins and pixels."""

import math

import pytest
import torch
from torch.nn import functional as F

from synchromesh.models.heads.cascade import mask_branch
from synchromesh.models.heads.cascade.mask_branch import MaskHead, mask_loss, mask_targets, pasted

SIDE = 4


def masks_of(count: int, height: int = 20, width: int = 24) -> torch.Tensor:
    """Discs."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width)[None] + 0.5
    centre, radius = torch.rand(count, 2) * 12 + 4, torch.rand(count) * 5 + 2
    return torch.stack([(x - c[0]) ** 2 + (y - c[1]) ** 2 < r**2 for c, r in zip(centre, radius, strict=True)])


def read(mask: torch.Tensor, y: float, x: float) -> float:
    """One point, bilinear between the centres of pixels; the border beyond them, zero further than a pixel off."""
    height, width = mask.shape
    y, x = y - 0.5, x - 0.5
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = math.floor(y), math.floor(x)
    corners = [(top, left), (top, min(left + 1, width - 1)), (min(top + 1, height - 1), left)]
    a, b, c = (float(mask[place]) for place in corners)
    d = float(mask[min(top + 1, height - 1), min(left + 1, width - 1)])
    dy, dx = y - top, x - left
    return (a * (1 - dx) + b * dx) * (1 - dy) + (c * (1 - dx) + d * dx) * dy


def test_a_target_is_the_bins_that_the_object_fills_by_half() -> None:
    masks = masks_of(3)
    boxes = torch.tensor([[3.2, 2, 15, 17], [0.0, 0, 24, 20], [8.0, 5, 9.5, 6], [18.0, 12, 24, 20], [5.0, 5, 14, 11]])
    objects = torch.tensor([0, 2, 0, 1, 2])
    found = mask_targets(masks, boxes, objects, side=SIDE)
    for got, box, number in zip(found, boxes.tolist(), objects.tolist(), strict=True):
        height, width = (box[3] - box[1]) / SIDE, (box[2] - box[0]) / SIDE
        steps = [(i + 0.5) / mask_branch.POINTS for i in range(mask_branch.POINTS)]
        for row in range(SIDE):
            for column in range(SIDE):
                points = [
                    read(masks[number], box[1] + (row + i) * height, box[0] + (column + j) * width)
                    for i in steps
                    for j in steps
                ]
                share = sum(points) / len(points)
                assert got[row, column] == (share >= 0.5) or share == pytest.approx(0.5, abs=1e-5)
    assert 0 < found.float().mean() < 1


def test_the_target_of_a_region_of_whole_pixels_is_the_mask_itself() -> None:
    masks = masks_of(1)
    found = mask_targets(masks, torch.tensor([[4.0, 4, 16, 16]]), torch.tensor([0]), side=12)
    assert torch.equal(found[0], masks[0, 4:16, 4:16])


def test_the_loss_is_a_mean_over_the_regions_of_each_object_of_its_own_class() -> None:
    logits = torch.randn(5, 3, SIDE, SIDE, requires_grad=True)
    labels, objects = torch.tensor([2, 0, 2, 2, 1]), torch.tensor([7, 4, 7, 7, 9])
    targets = torch.rand(5, SIDE, SIDE) < 0.5
    of_object: dict[int, list[float]] = {}
    for region in range(5):
        total = 0.0
        for row in range(SIDE):
            for column in range(SIDE):
                logit = logits[region, labels[region], row, column].item()
                total += math.log1p(math.exp(-logit if targets[region, row, column] else logit))
        of_object.setdefault(int(objects[region]), []).append(total / SIDE**2)
    expected = sum(sum(each) / len(each) for each in of_object.values())
    loss = mask_loss(logits, labels, objects, targets)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    taught = logits.grad.abs().sum((2, 3)) > 0
    assert torch.equal(taught, F.one_hot(labels, 3).bool())


def test_the_gradient_of_the_loss_is_that_of_differences() -> None:
    labels, objects = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 0])
    targets = torch.rand(3, SIDE, SIDE) < 0.5
    logits = torch.randn(3, 2, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, labels, objects, targets), (logits,), fast_mode=True)


def test_a_head_is_its_layers_one_after_the_other() -> None:
    head = MaskHead(4, 3, 2)
    x = torch.randn(2, 4, 5, 5)
    y = x
    for conv in head.convs:
        y = F.conv2d(y, conv.weight, conv.bias, padding=1).clamp(min=0)
    wide = torch.zeros(2, 4, 10, 10)
    for row in range(2):
        for column in range(2):
            weight = head.upsample.weight[:, :, row, column]
            wide[:, :, row::2, column::2] = torch.einsum("bihw,io->bohw", y, weight) + head.upsample.bias[:, None, None]
    expected = torch.einsum("bihw,oi->bohw", wide.clamp(min=0), head.logits.weight[:, :, 0, 0])
    torch.testing.assert_close(head(x), expected + head.logits.bias[:, None, None], atol=1e-4, rtol=1e-4)


def test_without_regions_every_parameter_gets_a_gradient() -> None:
    head, none = MaskHead(4, 3, 1), torch.zeros(0, dtype=torch.int64)
    targets = mask_targets(masks_of(1), torch.zeros(0, 4), none, side=10)
    mask_loss(head(torch.zeros(0, 4, 5, 5)), none, none, targets).backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def slow_paste(probability: torch.Tensor, box: list[float], height: int, width: int) -> torch.Tensor:
    """Every pixel by itself: where its centre falls in the mask, zero around its bins."""
    side = len(probability)
    padded = F.pad(probability, (1, 1, 1, 1))
    share = torch.zeros(height, width)
    for row in range(height):
        for column in range(width):
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * side + 0.5  # in bins of the padded mask, from its first one
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * side + 0.5
            if not (0 <= y < side + 1 and 0 <= x < side + 1):
                continue
            top, left, dy, dx = int(y), int(x), y % 1, x % 1
            upper = padded[top, left] * (1 - dx) + padded[top, left + 1] * dx
            lower = padded[top + 1, left] * (1 - dx) + padded[top + 1, left + 1] * dx
            share[row, column] = upper * (1 - dy) + lower * dy
    return share


@pytest.mark.parametrize("at_once", [2**22, 40, 1])
def test_a_mask_is_pasted_as_pixel_by_pixel(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_branch, "PIXELS_AT_ONCE", at_once)
    height, width = 17, 23
    probability = torch.rand(5, 6, 6)
    boxes = torch.tensor(
        [[3.3, 2.7, 18.2, 15.1], [0.0, 0, 23, 17], [22.5, 16.5, 23, 17], [5.0, 5, 5.2, 12], [7.0, 3, 8, 4]]
    )
    found = pasted(probability, boxes, height=height, width=width)
    for got, own, box in zip(found, probability, boxes.tolist(), strict=True):
        share = slow_paste(own, box, height, width)
        sure = (share - 0.5).abs() > 1e-4
        assert torch.equal(got[sure], share[sure] > 0.5)
    assert pasted(probability[:0], boxes[:0], height=3, width=2).shape == (0, 3, 2)


def test_the_target_of_a_box_pasted_into_it_is_about_the_mask_again() -> None:
    y, x = torch.arange(40)[:, None] + 0.5, torch.arange(50)[None] + 0.5
    mask = ((x - 24) ** 2 / 18**2 + (y - 21) ** 2 / 15**2 < 1)[None]
    box = torch.tensor([[6.0, 6, 42, 36]])
    target = mask_targets(mask, box, torch.tensor([0]), side=28)
    back = pasted(target.float(), box, height=40, width=50)
    assert (back & mask).sum() / (back | mask).sum() > 0.95
