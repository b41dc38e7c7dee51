"""Two branches on one backbone against each alone, and their merging against the rule written pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from synchromesh.models.features import Backbone
from synchromesh.models.heads.centre_boxes import CentreBoxDetector, CentreBoxes
from synchromesh.models.heads.centre_panoptic import CentrePanoptic, Classes, merged
from synchromesh.models.heads.objects import Found, ObjectHead, ObjectModel, Objects
from synchromesh.models.heads.semantic import IGNORE, SemanticFPN
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless

SIDE = 32
EXPERTS = ExpertsConfig(
    num_experts=3, k=2, blocks=((), (0,)), router=LinearGate(noise=0.0), capacity=Dropless(), losses=(), dropout=0.0
)
TINY = SwinV2Config(
    image_size=SIDE, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path=0.0, experts=EXPERTS
)
THINGS = (False, True, False, True, True)  # stuff is 0 and 2, things are 1, 3 and 4
CLASSES = Classes(THINGS)


@dataclass(frozen=True)
class FilledBoxes(ObjectHead):
    """CentreBoxes that fills its boxes: masks enough for a test."""

    boxes: CentreBoxes = field(default_factory=lambda: CentreBoxes(width=8, most=10))

    @property
    def says_masks(self) -> bool:
        return True

    def build(self, backbone: Backbone, num_classes: int) -> ObjectModel:
        return Filled(backbone, num_classes, self.boxes)

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        return self.boxes.counts(objects, images)

    def weights(self) -> Mapping[str, float]:
        return self.boxes.weights()


class Filled(CentreBoxDetector):
    def forward(self, images, sizes, truth=None, *, least=0.0):
        found = super().forward(images, sizes, truth, least=least)
        if truth is not None:
            return found
        return [
            Found(one.boxes, one.scores, one.labels, filled(one.boxes, size))
            for one, size in zip(found, sizes, strict=True)
        ]


def filled(boxes: Tensor, size: Tensor) -> Tensor:
    masks = torch.zeros(len(boxes), *size.tolist(), dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return masks


def head(**settings) -> CentrePanoptic:
    return CentrePanoptic(FilledBoxes(), SemanticFPN(width=8), **settings)


def truth(*counts: int) -> tuple[Objects, Tensor]:
    """Random things, and the labels of all pixels: things over stuff, some unknown."""
    image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    corners = torch.rand(len(image), 2) * 20
    boxes = torch.cat([corners, corners + 4 + torch.rand(len(image), 2) * 8], dim=1)
    labels = torch.tensor(CLASSES.of_things)[torch.randint(0, 3, (len(image),))]
    masks = filled(boxes, torch.tensor([SIDE, SIDE]))
    pixels = torch.randint(0, 2, (len(counts), SIDE, SIDE)) * 2
    for number, mask in enumerate(masks):
        pixels[image[number]][mask] = labels[number]
    pixels[torch.rand(pixels.shape) < 0.1] = IGNORE
    return Objects(image, boxes, labels, masks), pixels


def test_both_branches_lose_what_they_lose_alone_and_the_backbone_runs_once() -> None:
    settings, (objects, labels) = head(), truth(2, 0, 3)
    model = settings.build(TINY.build(), THINGS)
    calls = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    images, sizes = torch.randn(3, 3, SIDE, SIDE), torch.full((3, 2), SIDE)
    sums = model(images, sizes, objects, labels)
    assert len(calls) == 1
    things = {1: 0, 3: 1, 4: 2}
    alone = Objects(objects.image, objects.boxes, torch.tensor([things[v] for v in objects.labels.tolist()]))
    numbers = {0: 0, 2: 1, 1: 2, 3: 2, 4: 2, IGNORE: IGNORE}
    stuff = torch.tensor([numbers[v] for v in labels.flatten().tolist()]).view_as(labels)
    for part in (model.objects, model.semantic):
        part.backbone = model.backbone
    wanted = {**model.objects(images, sizes, alone), **model.semantic(images, sizes, stuff)}
    assert {name: v.item() for name, v in sums.items()} == pytest.approx({n: v.item() for n, v in wanted.items()})
    known = sum(v != IGNORE for v in labels.flatten().tolist())
    assert settings.counts(objects, labels, THINGS) == {"centre_loss": 5, "box_loss": 5, "cross_entropy": known}
    assert settings.weights() == {"centre_loss": 1.0, "box_loss": 2.0, "cross_entropy": 0.5}


def test_weights_of_pre_training_load_under_the_names_of_the_backbone_and_stand_there_once() -> None:
    model = head().build(TINY.build(), THINGS)
    names = [name.removeprefix("backbone.") for name in model.state_dict() if name.startswith("backbone.")]
    assert sorted(names) == sorted(TINY.build().state_dict())
    assert not [name for name in model.state_dict() if name.startswith(("seen.", "objects.backbone."))]


@pytest.mark.parametrize("counts", [(2, 1), (0, 0), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(counts, dtype) -> None:
    model, (objects, labels) = head().build(TINY.build(), THINGS), truth(*counts)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        sums = model(torch.randn(len(counts), 3, SIDE, SIDE), torch.full((len(counts), 2), SIDE), objects, labels)
    assert all(one.dtype == torch.float32 for one in sums.values())
    sum(sums.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    learns = [bool(grads[name].any()) for name in grads if ".router." in name or ".experts." in name]
    assert all(learns) if counts else not any(learns)


def slow_merge(found: Found, stuff: Tensor, settings: CentrePanoptic) -> tuple[list[list[int]], list[int]]:
    """The rule of Panoptic FPN, pixel by pixel; returns the segment of each pixel, and their classes."""
    rows, columns = stuff.shape[1:]
    ids, labels = [[0] * columns for _ in range(rows)], []
    everywhere = [(row, column) for row in range(rows) for column in range(columns)]
    order = sorted(range(len(found.scores)), key=lambda i: (-float(found.scores[i]), i))
    for i in order:
        own = [(r, c) for r, c in everywhere if found.masks[i, r, c]]
        free = [(r, c) for r, c in own if ids[r][c] == 0]
        if found.scores[i] < settings.least or not free:
            continue
        if (len(own) - len(free)) / len(own) > settings.overlap:
            continue
        labels.append([1, 3, 4][int(found.labels[i])])
        for r, c in free:
            ids[r][c] = len(labels)
    for number, label in ((0, 0), (1, 2)):
        free = [(r, c) for r, c in everywhere if ids[r][c] == 0 and int(stuff[:, r, c].argmax()) == number]
        if free and len(free) >= settings.least_stuff:
            labels.append(label)
            for r, c in free:
                ids[r][c] = len(labels)
    return ids, labels


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("least_stuff", [0, 40])
def test_masks_and_stuff_are_merged_by_the_rule(overlap, least_stuff) -> None:
    torch.manual_seed(int(overlap * 10) + least_stuff)
    settings = head(overlap=overlap, least_stuff=least_stuff)
    masks = torch.nn.functional.interpolate(torch.rand(1, 12, 4, 5), size=(16, 15))[0] > 0.6
    masks[0] = False  # a mask without a pixel
    scores = torch.rand(12)
    scores[3] = scores[4]
    found = Found(torch.zeros(12, 4), scores, torch.randint(0, 3, (12,)), masks)
    stuff = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 5), size=(16, 15))[0].softmax(0)
    got = merged(found, stuff, CLASSES, settings)
    ids, labels = slow_merge(found, stuff, settings)
    assert got.ids.tolist() == ids
    assert got.labels.tolist() == labels
    assert 0 < len(got) == len(got.scores)
    assert all(0 < score <= 1 for score in got.scores.tolist())


def test_scores_are_those_of_the_masks_and_the_mean_probability_of_stuff() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    found = Found(torch.zeros(1, 4), torch.tensor([0.75]), torch.tensor([1]), masks)
    stuff = torch.tensor([0.6, 0.3, 0.1])[:, None, None].expand(3, 4, 4)
    got = merged(found, stuff, CLASSES, head(least_stuff=8))
    assert got.labels.tolist() == [3, 0]
    assert got.scores.tolist() == pytest.approx([0.75, 0.6])
    assert got.ids.tolist() == [[1] * 4] * 2 + [[2] * 4] * 2
    none = merged(found, stuff.flip(0), CLASSES, head(least=0.8))  # the likeliest class is that of things
    assert len(none) == 0
    assert not none.ids.any()


def test_segments_have_the_size_of_the_image_without_its_padding() -> None:
    model = head(least=0.0, least_stuff=1).build(TINY.build(), THINGS).eval()
    sizes = torch.tensor([[20, 32], [32, 9]])
    found = model(torch.randn(2, 3, SIDE, SIDE), sizes)
    assert [tuple(one.ids.shape) for one in found] == [(20, 32), (32, 9)]
    assert all(one.ids.max() == len(one) for one in found)
    assert model(torch.zeros(0, 3, SIDE, SIDE), sizes[:0]) == []


def test_what_cannot_be_is_explained() -> None:
    with pytest.raises(ValueError, match="CentreBoxes finds boxes without masks"):
        CentrePanoptic(CentreBoxes()).build(TINY.build(), THINGS)
    for things in ((True,), (False, False)):
        with pytest.raises(ValueError, match="wanted a class of things and one of stuff"):
            head().build(TINY.build(), things)
    model, (objects, labels) = head().build(TINY.build(), THINGS), truth(1)
    images, sizes = torch.randn(1, 3, SIDE, SIDE), torch.full((1, 2), SIDE)
    with pytest.raises(ValueError, match="got one of truth and labels"):
        model(images, sizes, objects)
    wrong = Objects(objects.image, objects.boxes, torch.tensor([2]), objects.masks)
    with pytest.raises(ValueError, match=r"objects of the classes \[2\], which are stuff"):
        model(images, sizes, wrong, labels)
    assert model.seen.features is None
