"""Proposals against the same rules as loops over images, levels and anchors."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from synchromesh.models.boxes import iou
from synchromesh.models.heads.cascade.anchors import anchors_of
from synchromesh.models.heads.cascade.region_proposals import (
    AnchorLevel,
    RegionProposalNetwork,
    RegionProposals,
    proposal_losses,
    proposed,
)
from synchromesh.models.heads.objects import Objects

SIDE, STRIDES = 64, (8, 16)
SETTINGS = RegionProposals(scale=2.0, sampled=4000)  # more than there are anchors: nothing is drawn
SIZES = torch.tensor([[64, 64], [40, 52], [64, 33]])


def levels(images: int, *, spread: float = 0.3) -> list[AnchorLevel]:
    made = []
    for stride in STRIDES:
        side = SIDE // stride
        anchors = anchors_of(
            side, side, stride=stride, scale=SETTINGS.scale, ratios=SETTINGS.ratios, device=torch.device("cpu")
        )
        logits = torch.randn(images, len(anchors), requires_grad=True)
        made.append(AnchorLevel(anchors, logits, (torch.randn(images, len(anchors), 4) * spread).requires_grad_()))
    return made


def objects(*counts: int) -> Objects:
    """Random objects of 6 to 30 pixels, so many in each image."""
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    corners = torch.rand(len(image), 2) * 26
    return Objects(
        image, torch.cat([corners, corners + 6 + torch.rand(len(image), 2) * 24], dim=1), torch.zeros_like(image)
    )


def is_here(anchor: Tensor, size: Tensor) -> bool:
    x, y = (anchor[0] + anchor[2]).item() / 2, (anchor[1] + anchor[3]).item() / 2
    return round(x) < size[1] and round(y) < size[0]


def decoded(anchor: Tensor, deltas: Tensor) -> list[float]:
    left, top, right, bottom = anchor.tolist()
    width, height = right - left, bottom - top
    x, y = (left + right) / 2 + deltas[0].item() * width, (top + bottom) / 2 + deltas[1].item() * height
    width, height = width * math.exp(deltas[2].item()), height * math.exp(deltas[3].item())
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def overlap_of(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def slow_losses(found: list[AnchorLevel], sizes: Tensor, truth: Objects) -> tuple[float, float]:
    scores = boxes = 0.0
    for image, size in enumerate(sizes):
        own = truth.boxes[truth.image == image]
        here = [(lv, k) for lv in found for k in range(len(lv.anchors)) if is_here(lv.anchors[k], size)]
        overlap = iou(torch.stack([lv.anchors[k] for lv, k in here]), own)
        for (lv, k), row in zip(here, overlap, strict=True):
            most = max(row.tolist(), default=0.0)
            best_of = [m for m in range(len(own)) if row[m] == overlap[:, m].max() and row[m] >= SETTINGS.least_best]
            target = best_of[-1] if best_of else row.tolist().index(most) if most >= 0.7 else None
            logit = lv.logits[image, k].item()
            if target is None and most >= 0.3:
                continue
            scores += math.log1p(math.exp(-logit if target is not None else logit))
            if target is None:
                continue
            a, b = lv.anchors[k].tolist(), own[target].tolist()
            width, height = a[2] - a[0], a[3] - a[1]
            wanted = [
                ((b[0] + b[2]) - (a[0] + a[2])) / 2 / width,
                ((b[1] + b[3]) - (a[1] + a[3])) / 2 / height,
                math.log((b[2] - b[0]) / width),
                math.log((b[3] - b[1]) / height),
            ]
            for delta, right in zip(lv.deltas[image, k].tolist(), wanted, strict=True):
                wrong = abs(delta - right)
                boxes += 0.5 * wrong**2 * 9 if wrong < 1 / 9 else wrong - 0.5 / 9
    return scores, boxes


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0), (1, 9, 2)], ids=str)
def test_the_losses_are_those_of_the_loops(counts: tuple[int, ...]) -> None:
    found, truth = levels(3), objects(*counts)
    got = [one.item() for one in proposal_losses(found, SIZES, truth, SETTINGS)]
    assert got == pytest.approx(slow_losses(found, SIZES, truth), rel=2e-5)


def test_the_gradients_of_the_losses_are_those_of_differences() -> None:
    found, truth = levels(2), objects(3, 2)

    def losses(*values: Tensor) -> tuple[Tensor, Tensor]:
        made = [AnchorLevel(lv.anchors, *values[2 * i : 2 * i + 2]) for i, lv in enumerate(found)]
        return proposal_losses(made, SIZES[:2], truth, SETTINGS)

    given = [x for lv in found for x in (lv.logits.detach().double(), lv.deltas.detach().double())]
    assert torch.autograd.gradcheck(losses, [x.requires_grad_() for x in given], fast_mode=True)


def test_padding_teaches_nothing() -> None:
    found, truth = levels(1), objects(3)
    size = torch.tensor([[40, 40]])
    torch.stack(proposal_losses(found, size, truth, SETTINGS)).sum().backward()
    for level in found:
        there = torch.tensor([is_here(anchor, size[0]) for anchor in level.anchors])
        assert level.logits.grad is not None
        assert level.logits.grad[0, ~there].abs().sum() == 0
        assert level.logits.grad[0, there].abs().sum() > 0


def test_a_step_learns_from_no_more_anchors_than_wanted() -> None:
    settings = dataclasses.replace(SETTINGS, sampled=20, positive_share=0.25, positive=0.4, least_best=0.0)
    found, truth = levels(2), objects(6, 6)
    torch.stack(proposal_losses(found, SIZES[:2], truth, settings)).sum().backward()
    scores = torch.cat([level.logits.grad for level in found], dim=1)
    deltas = torch.cat([level.deltas.grad for level in found], dim=1)
    assert (scores != 0).sum(1).tolist() == [20, 20]
    assert (scores < 0).sum(1).tolist() == [5, 5]
    assert (deltas != 0).any(2).sum(1).tolist() == [5, 5]


def slow_proposals(found: list[AnchorLevel], size: Tensor, image: int, settings: RegionProposals) -> list[list[float]]:
    kept: list[tuple[float, list[float]]] = []
    for level in found:
        here = [k for k in range(len(level.anchors)) if is_here(level.anchors[k], size)]
        here = sorted(here, key=lambda k: -level.logits[image, k].item())[: settings.of_level]
        own: list[tuple[float, list[float]]] = []
        for k in here:
            box = decoded(level.anchors[k], level.deltas[image, k])
            box = [min(max(side, 0.0), float(size[1 - i % 2])) for i, side in enumerate(box)]
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            if all(overlap_of(box, other) <= settings.overlap for _, other in own):
                own.append((level.logits[image, k].item(), box))
        kept += own
    return [box for _, box in sorted(kept, key=lambda each: -each[0])][: settings.kept]


@pytest.mark.parametrize(("of_level", "kept"), [(2000, 1000), (30, 1000), (60, 25), (1, 1)])
def test_proposals_are_those_of_the_loops(of_level: int, kept: int) -> None:
    settings = dataclasses.replace(SETTINGS, of_level=of_level, kept=kept)
    found = levels(3)
    regions = proposed(found, SIZES, settings)
    for image, size in enumerate(SIZES):
        expected = torch.tensor(slow_proposals(found, size, image, settings))
        torch.testing.assert_close(regions.boxes[regions.image == image], expected, atol=1e-3, rtol=1e-4)
    assert regions.image.tolist() == sorted(regions.image.tolist())


def test_proposals_of_an_image_do_not_depend_on_its_padding() -> None:
    found = levels(1)
    small, size = [], torch.tensor([[32, 32]])
    for level, stride in zip(found, STRIDES, strict=True):
        side, count = 32 // stride, len(SETTINGS.ratios)
        cut = torch.arange(len(level.anchors)).view(SIDE // stride, SIDE // stride, count)[:side, :side].flatten()
        small.append(AnchorLevel(level.anchors[cut], level.logits[:, cut], level.deltas[:, cut]))
    padded, alone = proposed(found, size, SETTINGS), proposed(small, size, SETTINGS)
    assert len(alone) > 0
    assert torch.equal(padded.boxes, alone.boxes)


def test_without_images_there_are_no_proposals_and_every_parameter_gets_a_gradient() -> None:
    network = RegionProposalNetwork(8, SETTINGS)
    found = network([torch.zeros(0, 8, 8, 8), torch.zeros(0, 8, 4, 4)], STRIDES)
    assert len(proposed(found, SIZES[:0], SETTINGS)) == 0
    torch.stack(proposal_losses(found, SIZES[:0], objects(), SETTINGS)).sum().backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in network.parameters())


def test_what_the_network_says_of_an_anchor_stands_where_the_anchor_does() -> None:
    network = RegionProposalNetwork(4, SETTINGS)
    x = torch.randn(2, 4, 3, 5)
    (level,) = network([x], (8,))
    hidden = network.conv(x).relu()
    scores, deltas = network.objectness(hidden), network.deltas(hidden)
    place = 0
    for row in range(3):
        for column in range(5):
            for anchor in range(3):
                centre = (level.anchors[place, :2] + level.anchors[place, 2:]) / 2
                assert centre.tolist() == pytest.approx([8 * column, 8 * row], abs=1e-4)
                torch.testing.assert_close(level.logits[:, place], scores[:, anchor, row, column])
                own = deltas[:, 4 * anchor : 4 * anchor + 4, row, column]
                torch.testing.assert_close(level.deltas[:, place], own)
                place += 1


@pytest.mark.parametrize(
    ("change", "says"),
    [({"positive": 0.2}, "negative <= positive"), ({"ratios": ()}, "ratios"), ({"sampled": 0}, "proposals.sampled")],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(SETTINGS, **change)
