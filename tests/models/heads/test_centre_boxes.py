"""The dense head against the same rules written as loops over images, objects and cells."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from synchromesh.models.heads.centre_boxes import (
    BUMP_SPREAD,
    CORE_SHARE,
    USUAL_STRIDES,
    CentreBoxDetector,
    CentreBoxes,
    Level,
    centre_losses,
    found_boxes,
)
from synchromesh.models.heads.objects import Objects
from synchromesh.models.swin_v2 import SwinV2Config

CLASSES, SIDE = 3, 64
SIZE = torch.tensor([[SIDE, SIDE]])
TINY = SwinV2Config(image_size=SIDE, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4)


def levels(images: int, strides: Sequence[int] = (4, 8, 16), *, grad: bool = False) -> list[Level]:
    made = []
    for stride in strides:
        side = SIDE // stride
        heat = torch.randn(images, CLASSES, side, side).requires_grad_(grad)
        sides = (torch.rand(images, 4, side, side) * 3 * stride).requires_grad_(grad)
        made.append(Level(heat, sides, stride))
    return made


def objects(*counts: int) -> Objects:
    """Random objects of 6 to 50 pixels, so many in each image."""
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    corners = torch.rand(len(image), 2) * 40
    size = 6 + torch.rand(len(image), 2) * 44
    boxes = torch.cat([corners, (corners + size).clamp(max=SIDE)], dim=1)
    return Objects(image, boxes, torch.randint(0, CLASSES, (len(image),)))


def level_of(box: Tensor, strides: Sequence[int]) -> int:
    left, top, right, bottom = box.tolist()
    size = math.sqrt((right - left) * (bottom - top))
    return min(range(len(strides)), key=lambda i: abs(math.log2(size / (USUAL_STRIDES * strides[i]))))


def bump(box: Tensor, level: Level, row: int, column: int) -> float:
    left, top, right, bottom = box.tolist()
    stride, side = level.stride, level.heat.shape[-1]
    x = min(side - 1, math.floor((left + right) / 2 / stride))
    y = min(side - 1, math.floor((top + bottom) / 2 / stride))
    across = (column - x) * stride / max((right - left) * BUMP_SPREAD, stride / 4)
    down = (row - y) * stride / max((bottom - top) * BUMP_SPREAD, stride / 4)
    return math.exp(-0.5 * (across**2 + down**2))


def is_near(box: Tensor, level: Level, row: int, column: int) -> bool:
    left, top, right, bottom = box.tolist()
    stride, side = level.stride, level.heat.shape[-1]
    x = min(side - 1, math.floor((left + right) / 2 / stride))
    y = min(side - 1, math.floor((top + bottom) / 2 / stride))
    across, down = abs(column - x) * stride, abs(row - y) * stride
    return across < max((right - left) * CORE_SHARE, stride / 2) and down < max((bottom - top) * CORE_SHARE, stride / 2)


def slow_giou(one: Sequence[float], other: Sequence[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    hull = (max(one[2], other[2]) - min(one[0], other[0])) * (max(one[3], other[3]) - min(one[1], other[1]))
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - width * height
    return width * height / union - (hull - union) / hull


def slow_losses(found: list[Level], truth: Objects) -> tuple[float, float]:
    strides = [level.stride for level in found]
    homes = [level_of(box, strides) for box in truth.boxes]
    centres = sides = 0.0
    for number, level in enumerate(found):
        mine = [i for i, home in enumerate(homes) if home == number]
        images, classes, height, width = level.heat.shape
        for image in range(images):
            for label in range(classes):
                here = [i for i in mine if truth.image[i] == image and truth.labels[i] == label]
                for row in range(height):
                    for column in range(width):
                        y = max((bump(truth.boxes[i], level, row, column) for i in here), default=0.0)
                        p = level.heat[image, label, row, column].sigmoid().item()
                        centres -= (1 - p) ** 2 * math.log(p) if y == 1 else (1 - y) ** 4 * p**2 * math.log(1 - p)
        cells: dict[int, list[tuple[float, float]]] = {i: [] for i in mine}
        for image in range(images):
            for row in range(height):
                for column in range(width):
                    near = [i for i in mine if truth.image[i] == image and is_near(truth.boxes[i], level, row, column)]
                    sizes = {i: float((truth.boxes[i, 2:] - truth.boxes[i, :2]).prod()) for i in near}
                    for i in near:
                        if sizes[i] == min(sizes.values()):
                            x, y = (column + 0.5) * level.stride, (row + 0.5) * level.stride
                            a, b, c, d = level.sides[image, :, row, column].tolist()
                            overlap = slow_giou((x - a, y - b, x + c, y + d), truth.boxes[i].tolist())
                            cells[i].append((bump(truth.boxes[i], level, row, column), 1 - overlap))
        for own in cells.values():
            if own:
                sides += sum(weight * loss for weight, loss in own) / sum(weight for weight, _ in own)
    return centres, sides


@pytest.mark.parametrize("counts", [(4, 0, 6), (1,), (0, 0), (70, 5)], ids=str)
def test_the_losses_are_those_of_the_loops(counts: tuple[int, ...]) -> None:
    found, truth = levels(len(counts)), objects(*counts)
    got = [float(one) for one in centre_losses(found, truth)]
    assert got == pytest.approx(slow_losses(found, truth), rel=2e-5)


def test_maps_that_are_not_contiguous_lose_nothing() -> None:
    found, truth = levels(2), objects(3, 4)
    strided = [
        Level(
            lv.heat.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
            lv.sides.contiguous(memory_format=torch.channels_last),
            lv.stride,
        )
        for lv in found
    ]
    assert [*map(float, centre_losses(strided, truth))] == pytest.approx([*map(float, centre_losses(found, truth))])


def test_the_loss_of_a_batch_is_the_sum_of_those_of_its_images() -> None:
    found, truth = levels(3), objects(2, 0, 5)
    whole = torch.stack(centre_losses(found, truth))
    parts = torch.zeros(2)
    for image in range(3):
        own = truth.image == image
        alone = [Level(lv.heat[image : image + 1], lv.sides[image : image + 1], lv.stride) for lv in found]
        parts += torch.stack(centre_losses(alone, Objects(truth.image[own] * 0, truth.boxes[own], truth.labels[own])))
    assert whole.tolist() == pytest.approx(parts.tolist(), rel=1e-5)


def test_images_without_objects_teach_where_nothing_is_and_give_every_parameter_a_gradient() -> None:
    model = CentreBoxDetector(TINY.build(), CLASSES, CentreBoxes(width=8))
    losses = model(torch.randn(2, 3, SIDE, SIDE), SIZE.expand(2, 2), objects(0, 0))
    centres, sides = losses["centre_loss"], losses["box_loss"]
    (centres + sides).backward()
    assert centres > 0
    assert sides == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_extreme_logits_and_boxes_without_area_stay_finite() -> None:
    found = levels(1, grad=True)
    wild = [Level(lv.heat * 1e3, lv.sides * 0, lv.stride) for lv in found]
    flat = Objects(torch.zeros(1, dtype=torch.int64), torch.tensor([[5.0, 5, 5, 5]]), torch.zeros(1, dtype=torch.int64))
    total = torch.stack(centre_losses(wild, flat)).sum()
    total.backward()
    assert total.isfinite()
    assert all(lv.heat.grad is not None and lv.heat.grad.isfinite().all() for lv in found)


def planted(truth: Objects, images: int, strides: Sequence[int] = (4, 8, 16)) -> list[Level]:
    """What a perfect head says: a peak at each object's centre, and the distances to its sides there."""
    made = []
    homes = [level_of(box, strides) for box in truth.boxes]
    for number, stride in enumerate(strides):
        side = SIDE // stride
        heat, sides = torch.full((images, CLASSES, side, side), -9.0), torch.zeros(images, 4, side, side)
        for i in (i for i, home in enumerate(homes) if home == number):
            left, top, right, bottom = truth.boxes[i].tolist()
            row, column = int((top + bottom) / 2 // stride), int((left + right) / 2 // stride)
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            heat[truth.image[i], truth.labels[i], row, column] = 2.0 + i / 10
            sides[truth.image[i], :, row, column] = torch.tensor([x - left, y - top, right - x, bottom - y])
        made.append(Level(heat, sides, stride))
    return made


def test_what_a_perfect_head_says_is_found_box_by_box() -> None:
    boxes = torch.tensor([[4.0, 4, 20, 24], [40.0, 36, 60, 60], [10.0, 30, 30, 62], [2.0, 2, 62, 58]])
    truth = Objects(torch.tensor([0, 0, 1, 1]), boxes, torch.tensor([1, 2, 0, 0]))
    found = found_boxes(planted(truth, 3), SIZE.expand(3, 2), CentreBoxes(), least=0.3)
    for image, got in enumerate(found):
        own = (truth.image == image).nonzero()[:, 0].flip(0)  # later ones were planted as surer
        assert torch.allclose(got.boxes, boxes[own])
        assert got.labels.tolist() == truth.labels[own].tolist()
        assert got.scores.tolist() == sorted(got.scores.tolist(), reverse=True)


def test_what_lies_over_the_border_of_an_image_is_cut_off() -> None:
    truth = Objects(torch.tensor([0]), torch.tensor([[20.0, 10, 60, 44]]), torch.tensor([1]))
    (found,) = found_boxes(planted(truth, 1), torch.tensor([[40, 48]]), CentreBoxes(), least=0.3)
    assert found.boxes.tolist() == [pytest.approx([20, 10, 48, 40], abs=1e-4)]


def test_the_same_object_found_twice_is_told_once_and_no_more_than_wanted_are() -> None:
    truth = Objects(torch.zeros(1, dtype=torch.int64), torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([0]))
    twice = planted(truth, 1, (4,)) + planted(truth, 1, (8,))
    assert len(found_boxes(twice, SIZE, CentreBoxes(), least=0.3)[0].boxes) == 1
    assert len(found_boxes(twice, SIZE, CentreBoxes(overlap=1.0), least=0.3)[0].boxes) == 2
    assert len(found_boxes(levels(1), SIZE, CentreBoxes(most=5, overlap=1.0), least=0.0)[0].boxes) == 5
