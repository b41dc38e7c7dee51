"""Masks of the dense head against the same rules written as loops over objects and positions."""

import math

import pytest
import torch

from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.centre_masks import (
    CHANNELS,
    LAYERS,
    NUMBERS,
    SMALL,
    MaskMap,
    Networks,
    found_masks,
    mask_logits,
    mask_loss,
    targets,
)
from synchromesh.models.heads.objects import Objects
from synchromesh.models.swin_v2 import SwinV2Config

TINY = SwinV2Config(image_size=64, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4)
HEAD = CentreBoxes(width=16, convs=1, masks=True, mask_weight=0.5)


def networks(count: int) -> Networks:
    return Networks(torch.randn(count, NUMBERS) * 0.5, torch.rand(count, 2) * 40, torch.rand(count) * 30 + 10)


def slow_logit(features: list[float], own: Networks, place: int, x: float, y: float) -> float:
    """One object's network at one position, written with plain numbers."""
    reach = float(own.reach[place])
    seen = [(x - float(own.centre[place, 0])) / reach, (y - float(own.centre[place, 1])) / reach, *features]
    numbers = own.numbers[place].tolist()
    for layer, (many, said) in enumerate(LAYERS):
        weights, numbers = numbers[: many * said], numbers[many * said :]
        biases, numbers = numbers[:said], numbers[said:]
        seen = [sum(w * s for w, s in zip(weights[n * many :], seen, strict=False)) + biases[n] for n in range(said)]
        seen = seen if layer == len(LAYERS) - 1 else [max(0.0, one) for one in seen]
    return seen[0]


def slow_logits(shared: torch.Tensor, image: torch.Tensor, own: Networks, stride: int) -> torch.Tensor:
    found = torch.zeros(len(image), *shared.shape[-2:])
    for place, which in enumerate(image.tolist()):
        for row in range(shared.shape[-2]):
            for column in range(shared.shape[-1]):
                features, x, y = shared[which, :, row, column].tolist(), (column + 0.5) * stride, (row + 0.5) * stride
                found[place, row, column] = slow_logit(features, own, place, x, y)
    return found


def test_an_objects_network_sees_the_map_of_its_image_and_the_way_from_its_centre() -> None:
    shared, image, own = torch.randn(2, CHANNELS, 4, 6), torch.tensor([1, 0, 1]), networks(3)
    assert torch.allclose(mask_logits(shared, image, own, 8), slow_logits(shared, image, own, 8), atol=1e-4)


def test_the_loss_is_the_dice_loss_at_twice_the_positions_summed_over_objects_and_so_are_its_gradients() -> None:
    shared, image, own = torch.randn(2, CHANNELS, 4, 5, requires_grad=True), torch.tensor([1, 0, 0]), networks(3)
    numbers = own.numbers.requires_grad_()
    masks = torch.rand(3, 15, 20) < 0.5  # the last row of positions reaches out of the image
    masks[2] = False
    loss = mask_loss(shared, image, own, masks, 4)
    fine = torch.nn.functional.interpolate(mask_logits(shared, image, own, 4)[:, None], scale_factor=2, mode="bilinear")
    wanted = torch.zeros(())
    for place in range(3):
        both = whole = torch.zeros(())
        for row in range(8):
            for column in range(10):
                pixels = masks[place, row * 2 : row * 2 + 2, column * 2 : column * 2 + 2]
                truth = float(int(pixels.sum()) >= 2)
                probability = fine[place, 0, row, column].sigmoid()
                both, whole = both + probability * truth, whole + probability**2 + truth
        wanted = wanted + 1 - (2 * both + SMALL) / (whole + SMALL)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for got, right in zip(
        torch.autograd.grad(loss, (shared, numbers)), torch.autograd.grad(wanted, (shared, numbers)), strict=True
    ):
        assert torch.allclose(got, right, rtol=1e-4, atol=1e-6)


def test_a_mask_that_is_right_costs_nothing_and_an_empty_batch_nothing_but_has_gradients() -> None:
    shared = torch.zeros(1, CHANNELS, 4, 4)
    numbers = torch.zeros(1, NUMBERS)
    numbers[0, -1] = 30.0  # the last bias: everything is the object
    own = Networks(numbers, torch.zeros(1, 2), torch.ones(1))
    assert float(mask_loss(shared, torch.tensor([0]), own, torch.ones(1, 16, 16, dtype=torch.bool), 4)) < 1e-4
    assert float(mask_loss(shared, torch.tensor([0]), own, torch.zeros(1, 16, 16, dtype=torch.bool), 4)) > 0.99
    shared, none = shared.requires_grad_(), networks(0)
    none.numbers.requires_grad_()
    mask_loss(shared, torch.zeros(0, dtype=torch.int64), none, torch.zeros(0, 16, 16, dtype=torch.bool), 4).backward()
    assert not shared.grad.any()


def test_targets_are_the_positions_that_are_half_or_more_the_objects() -> None:
    masks = torch.zeros(1, 3, 4, dtype=torch.bool)
    masks[0, 0, :3] = masks[0, 2, 2:] = True
    assert targets(masks, (2, 2), 2).tolist() == [[[1, 0], [0, 1]]]


def test_found_masks_are_those_of_their_image_without_its_padding_whatever_is_found_at_once() -> None:
    shared, own = torch.randn(CHANNELS, 4, 6), networks(20)
    found = found_masks(shared, own, torch.tensor([13, 21]), 4)
    assert found.shape == (20, 13, 21)
    logits = mask_logits(shared[None], torch.zeros(20, dtype=torch.int64), own, 4)
    whole = torch.nn.functional.interpolate(logits[:, None], scale_factor=4, mode="bilinear")[:, 0] > 0
    assert torch.equal(found, whole[:, :13, :21])
    assert found.any()
    assert found_masks(shared, networks(0), torch.tensor([13, 21]), 4).shape == (0, 13, 21)


def test_the_map_has_the_finest_levels_positions_and_sees_all_levels() -> None:
    maps = [torch.randn(1, 16, 8, 6, requires_grad=True), torch.randn(1, 16, 4, 3, requires_grad=True)]
    shared = MaskMap(16, 2)(maps)
    assert shared.shape == (1, CHANNELS, 8, 6)
    shared.square().sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in maps)


def squares() -> Objects:
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    boxes = torch.tensor([[4.0, 8, 20, 24], [0, 0, 60, 60], [30, 30, 44, 50]])
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return Objects(torch.tensor([0, 0, 1]), boxes, torch.tensor([0, 1, 1]), masks)


def test_every_parameter_has_a_gradient_with_and_without_objects_and_losses_add_up() -> None:
    model, truth = HEAD.build(TINY.build(), 2), squares()
    images, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64], [52, 52]])
    sums = model(images, sizes, truth)
    assert sums.keys() == HEAD.counts(3, 2).keys() == HEAD.weights().keys()
    assert HEAD.weights()["mask_loss"] == 0.5
    one = model(images[:1], sizes[:1], truth.chosen(torch.tensor([0, 1])))
    other = model(images[1:], sizes[1:], Objects(torch.tensor([0]), truth.boxes[2:], truth.labels[2:], truth.masks[2:]))
    for name, total in sums.items():
        assert total.item() == pytest.approx((one[name] + other[name]).item(), rel=1e-4)
    for objects in (truth, truth.chosen(torch.zeros(3, dtype=torch.bool))):
        model.zero_grad()
        sum(model(images, sizes, objects).values()).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(
        math.isfinite(total.item())
        for total in model(images[:0], sizes[:0], truth.chosen(torch.zeros(0, dtype=torch.int64))).values()
    )


def test_masks_that_are_wanted_and_not_there_are_named() -> None:
    model, truth = HEAD.build(TINY.build(), 2), squares()
    with pytest.raises(ValueError, match="masks=False"):
        model(torch.randn(2, 3, 64, 64), torch.full((2, 2), 64), Objects(truth.image, truth.boxes, truth.labels))


@torch.no_grad()
def test_a_head_learns_masks_and_its_boxes_are_those_of_a_head_without() -> None:
    torch.manual_seed(0)
    model = HEAD.build(TINY.build(), 2)
    plain = CentreBoxes(width=16, convs=1).build(TINY.build(), 2)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    images, sizes = torch.randn(1, 3, 64, 64), torch.tensor([[60, 64]])
    (with_masks,), (without,) = model.eval()(images, sizes), plain.eval()(images, sizes)
    assert torch.equal(with_masks.boxes, without.boxes)
    assert torch.equal(with_masks.scores, without.scores)
    assert without.masks is None
    assert with_masks.masks.shape == (len(with_masks.boxes), 60, 64)


def test_an_overfitted_head_finds_the_pixels_of_each_object() -> None:
    torch.manual_seed(0)
    model, truth = HEAD.build(TINY.build(), 2), squares().chosen(torch.tensor([0, 2]))
    images, sizes = torch.zeros(2, 3, 64, 64), torch.full((2, 2), 64)
    for which, mask in zip(truth.image, truth.masks, strict=True):
        images[which, :, mask] = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sums = model(images, sizes, truth)
        sum(total * HEAD.weights()[name] for name, total in sums.items()).backward()
        optimizer.step()
    for found, wanted in zip(model.eval()(images, sizes), truth.masks, strict=True):
        both, either = (found.masks[0] & wanted).sum(), (found.masks[0] | wanted).sum()
        assert float(both / either) > 0.7
