"""A stage against the same rules as loops over images and regions."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from synchromesh.models.box_coder import BoxCoder
from synchromesh.models.boxes import iou
from synchromesh.models.heads.cascade.box_stage import (
    BoxHead,
    BoxLoss,
    BoxStages,
    Norm,
    Said,
    Sample,
    box_losses,
    boxes_of_classes,
    next_regions,
    refined,
    sample_regions,
)
from synchromesh.models.heads.cascade.matching import NOTHING
from synchromesh.models.heads.cascade.region_proposals import Regions
from synchromesh.models.heads.objects import Objects

CLASSES, STD = 3, (0.1, 0.1, 0.2, 0.2)
SMALL = BoxStages(hidden=16, convs=2, side=3)
ALL = dataclasses.replace(SMALL, sampled=1000)


def regions_near(truth: Objects, images: int, *, each: int = 4) -> Regions:
    """Regions around objects, nearer and further, and some anywhere."""
    made = []
    for image in range(images):
        near = truth.boxes[truth.image == image].repeat(each, 1)
        near = near + torch.randn_like(near) * 3
        corners = torch.rand(5, 2) * 40
        made.append(torch.cat([near, torch.cat([corners, corners + 5 + torch.rand(5, 2) * 20], dim=1)]))
    return Regions.joined(made, truth.boxes)


def objects(*counts: int) -> Objects:
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    corners = torch.rand(len(image), 2) * 40
    boxes = torch.cat([corners, corners + 8 + torch.rand(len(image), 2) * 16], dim=1)
    return Objects(image, boxes, torch.randint(0, CLASSES, (len(image),)))


@pytest.mark.parametrize("overlap", [0.5, 0.7])
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0)], ids=str)
def test_regions_stand_for_the_objects_that_the_loops_find(counts: tuple[int, ...], overlap: float) -> None:
    truth = objects(*counts)
    regions = regions_near(truth, len(counts))
    sample = sample_regions(regions, truth, len(counts), overlap=overlap, settings=ALL)
    found = sorted(
        (image, tuple(box), number, true)
        for image, box, number, true in zip(
            sample.regions.image.tolist(),
            sample.regions.boxes.tolist(),
            sample.objects.tolist(),
            sample.true.tolist(),
            strict=True,
        )
    )
    expected = [(int(truth.image[i]), tuple(truth.boxes[i].tolist()), i, True) for i in range(len(truth))]
    for image, box in zip(regions.image.tolist(), regions.boxes, strict=True):
        own = [i for i in range(len(truth)) if truth.image[i] == image]
        overlaps = [float(iou(box[None], truth.boxes[i : i + 1])) for i in own]
        most = max(overlaps, default=0.0)
        number = own[overlaps.index(most)] if most >= overlap else NOTHING
        expected.append((image, tuple(box.tolist()), number, False))
    assert found == sorted(expected)
    assert sample.regions.image.tolist() == sorted(sample.regions.image.tolist())


def test_no_more_regions_than_wanted_are_taken_a_quarter_of_them_for_objects() -> None:
    truth = objects(6, 6, 0)
    regions = regions_near(truth, 3, each=30)
    sample = sample_regions(regions, truth, 3, overlap=0.5, settings=dataclasses.replace(SMALL, sampled=20))
    assert [int((sample.regions.image == i).sum()) for i in range(3)] == [20, 20, 5]
    assert [int(((sample.regions.image == i) & (sample.objects >= 0)).sum()) for i in range(3)] == [5, 5, 0]
    assert (truth.image[sample.objects[sample.objects >= 0]] == sample.regions.image[sample.objects >= 0]).all()


def test_equal_boxes_stand_each_for_its_own_object_and_flat_ones_for_none() -> None:
    boxes = torch.tensor([[2.0, 2, 20, 20], [2.0, 2, 20, 20], [5.0, 5, 5, 9], [4.0, 4, 4.3, 4.2]])
    truth = Objects(torch.zeros(4, dtype=torch.int64), boxes, torch.tensor([0, 1, 2, 0]))
    sample = sample_regions(Regions.joined([torch.zeros(0, 4)], boxes), truth, 1, overlap=0.5, settings=ALL)
    assert sample.objects.tolist() == [0, 1, 3]
    said = Said(torch.zeros(3, CLASSES + 1), torch.zeros(3, 4, requires_grad=True))
    for loss in BoxLoss:
        scores, own = box_losses(said, sample, truth, BoxCoder(STD), loss)
        assert scores.item() == pytest.approx(3 * math.log(4))
        assert own.item() == pytest.approx(0, abs=1e-5)


def decoded(box: Sequence[float], deltas: Sequence[float]) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + deltas[0] * STD[0] * width
    y = (box[1] + box[3]) / 2 + deltas[1] * STD[1] * height
    width, height = width * math.exp(deltas[2] * STD[2]), height * math.exp(deltas[3] * STD[3])
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def encoded(box: Sequence[float], wanted: Sequence[float]) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    return [
        ((wanted[0] + wanted[2]) - (box[0] + box[2])) / 2 / width / STD[0],
        ((wanted[1] + wanted[3]) - (box[1] + box[3])) / 2 / height / STD[1],
        math.log((wanted[2] - wanted[0]) / width) / STD[2],
        math.log((wanted[3] - wanted[1]) / height) / STD[3],
    ]


def slow_giou(one: Sequence[float], other: Sequence[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    hull = (max(one[2], other[2]) - min(one[0], other[0])) * (max(one[3], other[3]) - min(one[1], other[1]))
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)) - width * height
    return width * height / union - (hull - union) / hull


def slow_deltas(deltas: Tensor, label: int) -> list[float]:
    """Of one region: all classes have the same four, or each its own, one class after the other."""
    return deltas.tolist() if len(deltas) == 4 else [deltas[4 * label + number].item() for number in range(4)]


def slow_losses(said: Said, sample: Sample, truth: Objects, loss: BoxLoss) -> tuple[float, float]:
    scores = boxes = 0.0
    for logits, deltas, box, number in zip(*said, sample.regions.boxes, sample.objects.tolist(), strict=True):
        label = CLASSES if number == NOTHING else int(truth.labels[number])
        scores -= math.log(math.exp(logits[label]) / sum(math.exp(one) for one in logits))
        if number == NOTHING:
            continue
        wanted = truth.boxes[number].tolist()
        deltas = slow_deltas(deltas, int(truth.labels[number]))
        if loss is BoxLoss.GIOU:
            boxes += 1 - slow_giou(decoded(box.tolist(), deltas), wanted)
            continue
        for got, right in zip(deltas, encoded(box.tolist(), wanted), strict=True):
            wrong = abs(got - right)
            boxes += 0.5 * wrong**2 if wrong < 1 else wrong - 0.5
    return scores, boxes


def some_sample(*counts: int, deltas: int = 4) -> tuple[Sample, Objects, Said]:
    truth = objects(*counts)
    sample = sample_regions(regions_near(truth, len(counts)), truth, len(counts), overlap=0.5, settings=ALL)
    count = len(sample.regions)
    return sample, truth, Said(torch.randn(count, CLASSES + 1), torch.randn(count, deltas))


@pytest.mark.parametrize("deltas", [4, 4 * CLASSES])
@pytest.mark.parametrize("loss", BoxLoss)
def test_the_losses_are_those_of_the_loops(loss: BoxLoss, deltas: int) -> None:
    sample, truth, said = some_sample(3, 0, 4, deltas=deltas)
    got = [one.item() for one in box_losses(said, sample, truth, BoxCoder(STD), loss)]
    assert got == pytest.approx(slow_losses(said, sample, truth, loss), rel=1e-4)


@pytest.mark.parametrize("deltas", [4, 4 * CLASSES])
@pytest.mark.parametrize("loss", BoxLoss)
def test_the_gradients_of_the_losses_are_those_of_differences(loss: BoxLoss, deltas: int) -> None:
    sample, truth, said = some_sample(2, 1, deltas=deltas)

    def losses(*values: Tensor) -> tuple[Tensor, Tensor]:
        return box_losses(Said(*values), sample, truth, BoxCoder(STD), loss)

    assert torch.autograd.gradcheck(losses, [x.double().requires_grad_() for x in said], fast_mode=True)


def test_regions_are_moved_as_the_formula_says_and_stay_in_their_image() -> None:
    truth = objects(3, 2)
    regions, sizes = regions_near(truth, 2), torch.tensor([[30, 64], [64, 25]])
    deltas = torch.randn(len(regions), 4, requires_grad=True)
    found = refined(regions, deltas, sizes, BoxCoder(STD))
    assert not found.boxes.requires_grad
    assert found.image.tolist() == regions.image.tolist()
    for got, box, own, image in zip(found.boxes, regions.boxes, deltas, regions.image.tolist(), strict=True):
        height, width = sizes[image].tolist()
        left, top, right, bottom = decoded(box.tolist(), own.tolist())
        limits = ((left, width), (top, height), (right, width), (bottom, height))
        assert got.tolist() == pytest.approx([min(max(side, 0.0), most) for side, most in limits], abs=1e-3)


@pytest.mark.parametrize("deltas", [4, 4 * CLASSES])
def test_the_next_stage_sees_regions_moved_by_their_objects_class_or_else_their_likeliest_one(deltas: int) -> None:
    sample, truth, said = some_sample(3, 2, deltas=deltas)
    sizes, expected = torch.tensor([[50, 64], [64, 45]]), []
    for number, own in enumerate(sample.objects.tolist()):
        if sample.true[number]:
            continue
        logits = said.logits[number, :CLASSES].tolist()
        label = logits.index(max(logits)) if own == NOTHING else int(truth.labels[own])
        moved = decoded(sample.regions.boxes[number].tolist(), slow_deltas(said.deltas[number], label))
        height, width = sizes[sample.regions.image[number]].tolist()
        limits = zip(moved, (width, height) * 2, strict=True)
        expected.append([min(max(side, 0.0), most) for side, most in limits])
    found = next_regions(said, sample, truth, sizes, BoxCoder(STD))
    assert found.image.tolist() == sample.regions.image[~sample.true].tolist()
    assert len(expected) < len(sample.objects)
    for got, wanted in zip(found.boxes.tolist(), expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-3)


def test_each_class_has_the_box_that_its_own_four_deltas_say() -> None:
    sample, _, said = some_sample(2, 1, deltas=4 * CLASSES)
    sizes = torch.tensor([[40, 64], [64, 45]])
    found = boxes_of_classes(sample.regions, said, sizes, BoxCoder(STD))
    assert found.shape == (len(sample.regions), CLASSES, 4)
    for number, box in enumerate(sample.regions.boxes.tolist()):
        height, width = sizes[sample.regions.image[number]].tolist()
        for label in range(CLASSES):
            moved = decoded(box, slow_deltas(said.deltas[number], label))
            wanted = [min(max(side, 0.0), most) for side, most in zip(moved, (width, height) * 2, strict=True)]
            assert found[number, label].tolist() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize(("convs", "linears"), [(4, 1), (0, 2)])
def test_a_head_is_its_layers_one_after_the_other(convs: int, linears: int, norm: Norm) -> None:
    settings = dataclasses.replace(SMALL, convs=convs, linears=linears, norm=norm)
    head = BoxHead(8, CLASSES, settings)
    x = y = torch.randn(6, 8, 3, 3)
    for layer in head.convs:
        y = layer.conv(y)
        if norm is Norm.GROUP:
            y = F.group_norm(y, 8, layer.norm.weight, layer.norm.bias)
        elif norm is Norm.SYNC_BATCH:
            y = F.batch_norm(y, None, None, layer.norm.weight, layer.norm.bias, training=True)
        y = y.clamp(min=0)
    y = y.reshape(6, -1)  # channel by channel, as published weights have it
    for layer in head.linears:
        y = (y @ layer.weight.T + layer.bias).clamp(min=0)
    said = head(x)
    torch.testing.assert_close(said.logits, y @ head.scores.weight.T + head.scores.bias)
    torch.testing.assert_close(said.deltas, y @ head.deltas.weight.T + head.deltas.bias)


@pytest.mark.parametrize("counts", [(), (0, 0)], ids=str)
@pytest.mark.parametrize("norm", Norm)
def test_without_images_or_objects_every_parameter_gets_a_gradient(norm: Norm, counts: tuple[int, ...]) -> None:
    truth = objects(*counts)
    sample = sample_regions(regions_near(truth, len(counts)), truth, len(counts), overlap=0.5, settings=ALL)
    head = BoxHead(8, CLASSES, dataclasses.replace(SMALL, norm=norm))
    for loss in BoxLoss:
        head.zero_grad()
        said = head(torch.randn(len(sample.regions), 8, 3, 3))
        torch.stack(box_losses(said, sample, truth, BoxCoder(STD), loss)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"overlaps": (0.5, 0.6)}, "one of each for every stage"),
        ({"overlaps": (0.5, 0.6, 0.0)}, "IoUs above 0"),
        ({"linears": 0}, "boxes.linears is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, tuple[float, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SMALL, **change)
