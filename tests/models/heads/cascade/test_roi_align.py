"""RoIAlign against its definition, written as loops over boxes, bins and points."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from synchromesh.models.heads.cascade import roi_align as module
from synchromesh.models.heads.cascade.roi_align import level_of, pyramid_roi_align, roi_align

STRIDES = (4, 8, 16)


def read(channel: Tensor, y: float, x: float) -> float:
    """One point of a map, bilinear; cells have their centres at whole numbers here."""
    height, width = channel.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = math.floor(y), math.floor(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * channel[top, left] + dx * channel[top, right]
    lower = (1 - dx) * channel[below, left] + dx * channel[below, right]
    return float((1 - dy) * upper + dy * lower)


def slow(maps: Tensor, box: Tensor, image: int, stride: float, side: int, samples: int) -> Tensor:
    left, top, right, bottom = (value / stride - 0.5 for value in box.tolist())
    width, height = (right - left) / side, (bottom - top) / side
    found = torch.zeros(maps.shape[1], side, side, dtype=maps.dtype)
    for channel in range(maps.shape[1]):
        for row in range(side):
            for column in range(side):
                for i in range(samples):
                    for j in range(samples):
                        y = top + row * height + (i + 0.5) * height / samples
                        x = left + column * width + (j + 0.5) * width / samples
                        found[channel, row, column] += read(maps[image, channel], y, x) / samples**2
    return found


# Inside; over every border; far outside; one cell; a thousandth of one; without area; around everything.
BOXES = torch.tensor(
    [
        [5.0, 3, 21, 30],
        [-9.0, -6, 12, 9],
        [30.0, 20, 50, 40],
        [300.0, 300, 340, 340],
        [8.0, 8, 12, 12],
        [9.1, 9.1, 9.104, 9.104],
        [7.0, 7, 7, 7],
        [-20.0, -20, 80, 90],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (1, 5)], ids=str)
def test_it_is_the_mean_of_points_as_the_loops_take_it(size: tuple[int, int], samples: int) -> None:
    maps = torch.randn(2, 2, *size, dtype=torch.float64)
    image = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0])
    found = roi_align(maps, BOXES, image, stride=4, side=3, samples=samples)
    for got, box, own in zip(found, BOXES, image.tolist(), strict=True):
        torch.testing.assert_close(got, slow(maps, box, own, 4, 3, samples), atol=1e-9, rtol=1e-9)


def test_a_box_of_one_cell_reads_that_cell() -> None:
    maps = torch.randn(1, 3, 5, 5)
    box = torch.tensor([[8.0, 4, 12, 8]])
    got = roi_align(maps, box, torch.tensor([0]), stride=4, side=1, samples=1)
    torch.testing.assert_close(got[0, :, 0, 0], maps[0, :, 1, 2])


def test_its_gradient_is_that_of_differences_and_none_reaches_the_boxes() -> None:
    maps = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    boxes, image = BOXES[:5].clone().requires_grad_(), torch.tensor([0, 1, 1, 0, 1])
    assert torch.autograd.gradcheck(lambda x: roi_align(x, boxes, image, stride=4, side=2, samples=2), (maps,))
    roi_align(maps, boxes, image, stride=4, side=2, samples=2).sum().backward()
    assert boxes.grad is None


def test_float32_grids_are_fine_enough_for_maps_of_large_pictures() -> None:
    maps = torch.randn(1, 2, 90, 334, dtype=torch.float64)
    boxes = torch.rand(20, 4, dtype=torch.float64) * torch.tensor([600.0, 160, 600, 160], dtype=torch.float64)
    boxes[:, 2:] += boxes[:, :2] + 100
    image = torch.zeros(20, dtype=torch.int64)
    exact = roi_align(maps, boxes, image, stride=4, side=7, samples=2)
    single = roi_align(maps.float(), boxes.float(), image, stride=4, side=7, samples=2)
    assert (exact - single).abs().max() < 1e-3
    assert roi_align(maps.bfloat16(), boxes.float(), image, stride=4, side=7, samples=2).dtype == torch.float32


def test_boxes_in_pieces_read_what_all_at_once_do(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, image = torch.randn(2, 3, 8, 8), torch.arange(8) % 2
    whole = roi_align(maps, BOXES.float(), image, stride=4, side=2, samples=2)
    monkeypatch.setattr(module, "AT_ONCE", 3)
    assert torch.equal(roi_align(maps, BOXES.float(), image, stride=4, side=2, samples=2), whole)


def slow_level(box: Sequence[float]) -> int:
    area = max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
    return 0 if area == 0 else min(2, max(0, math.floor(math.log2(math.sqrt(area) / 56 + 1e-6))))


def test_the_level_of_a_box_is_that_of_its_size_in_powers_of_two() -> None:
    sizes = [0.0, 0.01, 3, 55.9, 56, 111.9, 112, 112.1, 200, 223.9, 224, 230, 448, 5000]
    boxes = torch.tensor([[10.0, 20, 10 + size, 20 + size] for size in sizes] + [[0.0, 0, 20, 640], [9.0, 9, 3, 4]])
    assert level_of(boxes, STRIDES).tolist() == [slow_level(box) for box in boxes.tolist()]
    assert level_of(torch.full((1, 4), math.nan), STRIDES).tolist() == [0]


def test_each_box_is_read_on_its_own_level_and_stands_in_its_own_place() -> None:
    maps = [torch.randn(3, 2, 64 // stride, 72 // stride, dtype=torch.float64) for stride in STRIDES]
    corners = torch.rand(12, 2, dtype=torch.float64) * 40
    sides = torch.tensor([20.0, 150, 400, 60], dtype=torch.float64).repeat(3)[:, None]
    boxes, image = torch.cat([corners, corners + sides], dim=1), torch.arange(12) % 3
    found = pyramid_roi_align(maps, STRIDES, boxes, image, side=2, samples=2)
    levels = [slow_level(box) for box in boxes.tolist()]
    assert set(levels) == {0, 1, 2}
    for got, box, own, level in zip(found, boxes, image.tolist(), levels, strict=True):
        torch.testing.assert_close(got, slow(maps[level], box, own, STRIDES[level], 2, 2), atol=1e-9, rtol=1e-9)


def test_the_gradient_reaches_every_level_that_is_read() -> None:
    maps = [torch.randn(2, 1, 32 // s, 32 // s, dtype=torch.float64, requires_grad=True) for s in STRIDES]
    boxes = torch.tensor([[2.0, 2, 20, 20], [0.0, 0, 130, 120], [-100.0, -100, 300, 250]], dtype=torch.float64)
    image = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(
        lambda *x: pyramid_roi_align(x, STRIDES, boxes, image, side=2, samples=2), tuple(maps)
    )


@pytest.mark.parametrize("images", [0, 2])
def test_without_a_box_there_is_nothing_of_the_right_shape(images: int) -> None:
    maps = [torch.randn(images, 5, 32 // s, 32 // s) for s in STRIDES]
    none = torch.zeros(0, dtype=torch.int64)
    assert pyramid_roi_align(maps, STRIDES, torch.zeros(0, 4), none, side=7, samples=2).shape == (0, 5, 7, 7)
