"""Detectors of transformers on a backbone of ours: their own losses, their own answers, and gradients everywhere."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeformableDetrImageProcessorPil, DetrImageProcessorPil, RTDetrImageProcessorPil

from synchromesh.compat.huggingface import heads as hf
from synchromesh.compat.huggingface.heads.adapter import is_picture
from synchromesh.compat.huggingface.heads.box_networks import QueryDetector
from synchromesh.compat.huggingface.heads.boxes import query_weight
from synchromesh.models.heads.objects import Found, ObjectHead, Objects
from synchromesh.training.checkpoint import restore_model, restore_optimizer, save_checkpoint
from synchromesh.training.codec import decode, encode

SMALL = {"width": 64, "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "ffn": 16, "queries": 6}
HEADS = {
    "detr": hf.Detr(**SMALL, dropout=0.0),
    "deformable": hf.DeformableDetr(**SMALL, dropout=0.0),
    "two stages": hf.DeformableDetr(**SMALL, dropout=0.0, box_refine=True, two_stage=True),
    "rt-detr": hf.RTDetrV2(**SMALL, denoising=4, most=6),
    "d-fine": hf.DFine(**SMALL, denoising=4, most=6),
}
PROCESSORS = {
    "detr": DetrImageProcessorPil,
    "deformable": DeformableDetrImageProcessorPil,
    "two stages": DeformableDetrImageProcessorPil,
    "rt-detr": RTDetrImageProcessorPil,
    "d-fine": RTDetrImageProcessorPil,
}
heads = pytest.mark.parametrize("name", HEADS)


def total(head: ObjectHead, sums: dict[str, Tensor], objects: int, images: int) -> Tensor:
    """The loss as the training loop makes it."""
    counts, weights = head.counts(objects, images), head.weights()
    assert sums.keys() == counts.keys() == weights.keys()
    return sum(weights[name] * sums[name] / max(1, counts[name]) for name in sums)


def theirs(model: QueryDetector, images: Tensor, sizes: Tensor, **more):
    """What transformers' own forward says and loses, with a backbone that has run."""
    network = copy.deepcopy(model.network)
    del network._loss_function
    with network.get_submodule(model.place).showing(model.backbone(images)):
        return network(pixel_values=images, pixel_mask=is_picture(images, sizes), **more)


@torch.no_grad()
def stirred(model: QueryDetector) -> QueryDetector:
    """Move all weights, so that queries differ and boxes are no points."""
    for parameter in model.parameters():
        parameter += torch.randn_like(parameter) * 0.1
    return model


@heads
@pytest.mark.parametrize(
    ("counts", "dtype"),
    [((2, 1), torch.bfloat16), ((0, 3), torch.float32), ((0, 0), torch.bfloat16), ((), torch.float32)],
    ids=str,
)
def test_every_parameter_gets_a_finite_gradient_experts_and_routers_one_that_teaches(
    name, counts, dtype, tiny, scenes
) -> None:
    model, (images, sizes, truth) = HEADS[name].build(tiny.build(), 3), scenes(*counts)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        sums = model(images, sizes, truth)
    assert all(one.dtype == torch.float32 and one.isfinite() for one in sums.values())
    total(HEADS[name], sums, len(truth), len(counts)).backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    learns = [bool(grad.any()) for key, grad in grads.items() if ".router." in key or ".experts." in key]
    assert len(learns) > 5
    assert all(learns) if counts else not any(learns)


@heads
@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)], ids=str)
def test_the_loss_is_that_of_transformers_on_the_same_weights(name, counts, tiny, scenes) -> None:
    model, (images, sizes, truth) = stirred(HEADS[name].build(tiny.build(), 3)), scenes(*counts)
    whole = torch.tensor([64.0, 64, 64, 64]).expand(len(counts), 4)
    scale = whole if name in ("rt-detr", "d-fine") else sizes.flip(1).repeat(1, 2)
    labels = []
    for image in range(len(counts)):
        left, top, right, bottom = (truth.boxes[truth.image == image] / scale[image]).unbind(1)
        boxes = torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], dim=1)
        labels.append({"class_labels": truth.labels[truth.image == image], "boxes": boxes})
    torch.manual_seed(1)  # of the noisy queries
    wanted = theirs(model, images, sizes, labels=labels).loss
    torch.manual_seed(1)
    got = total(HEADS[name], model(images, sizes, truth), len(truth), len(counts))
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


@heads
def test_what_is_found_is_what_transformers_processor_makes_of_it(name, tiny, scenes) -> None:
    model, (images, sizes, _) = stirred(HEADS[name].build(tiny.build(), 3)).eval(), scenes(1, 1)
    with torch.no_grad():
        said = theirs(model, images, sizes)
        found = model(images, sizes, least=0.01)
    of = torch.full((2, 2), 64) if name in ("rt-detr", "d-fine") else sizes
    wanted = PROCESSORS[name]().post_process_object_detection(said, threshold=0.01, target_sizes=of)
    for got, right, (height, width) in zip(found, wanted, sizes.tolist(), strict=True):
        order = right["scores"].argsort(descending=True, stable=True)[: getattr(HEADS[name], "most", 100)]
        assert len(order) > 0
        assert torch.equal(got.scores, right["scores"][order])
        assert torch.equal(got.labels, right["labels"][order])
        inside = right["boxes"][order].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        assert torch.allclose(got.boxes, inside, atol=1e-4)


@heads
def test_sums_of_images_are_the_sum_of_the_batch(name, tiny, scenes) -> None:
    """In evaluation, where batch norms mix no images and no query is noisy; but for a mean over queries."""
    model, (images, sizes, truth) = stirred(HEADS[name].build(tiny.build(), 3)).eval(), scenes(2, 0, 3)
    whole, parts = model(images, sizes, truth), {}
    for i in range(3):
        own = truth.chosen(truth.image == i)
        own = Objects(own.image * 0, own.boxes, own.labels)
        for key, value in model(images[i : i + 1], sizes[i : i + 1], own).items():
            parts[key] = parts.get(key, 0.0) + value.item()
    for key in whole.keys() - {"distillation_loss"}:
        assert whole[key].item() == pytest.approx(parts[key], rel=1e-4), key


def same(one: Found, other: Found) -> bool:
    return torch.allclose(one.boxes, other.boxes, atol=1e-3) and torch.allclose(one.scores, other.scores, atol=1e-5)


@heads
def test_padding_changes_nothing_in_detr_and_something_in_the_others(name, tiny) -> None:
    """Of a picture whose border is one of windows: then the backbone gives the same maps with padding."""
    model, picture = stirred(HEADS[name].build(tiny.build(), 3)).eval(), torch.randn(1, 3, 64, 64)
    sizes = torch.tensor([[64, 64], [128, 96]])
    images = torch.randn(2, 3, 128, 96)
    images[0] = torch.nn.functional.pad(picture, (0, 32, 0, 64))[0]
    (alone,), (padded, _) = model(picture, sizes[:1]), model(images, sizes)
    assert same(alone, padded) == (name == "detr")


@heads
def test_images_of_any_size_are_looked_at_and_boxes_lie_inside(name, tiny, scenes) -> None:
    model = stirred(HEADS[name].build(tiny.build(), 3))
    images, sizes = torch.randn(2, 3, 47, 75), torch.tensor([[47, 75], [33, 20]])
    _, _, truth = scenes(1, 2)
    sums = model(images, sizes, truth)
    assert all(one.isfinite() for one in sums.values())
    for found, (height, width) in zip(model.eval()(images, sizes), sizes.tolist(), strict=True):
        assert len(found.boxes)
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([width, height, width, height])).all()


@pytest.mark.parametrize("name", ["detr", "two stages", "rt-detr"])  # nothing shared, and twice something
def test_a_model_is_stored_once_and_comes_back(name, tiny, scenes, tmp_path: Path) -> None:
    model, (images, sizes, truth) = HEADS[name].build(tiny.build(), 3), scenes(1, 2)
    own = {key.removeprefix("backbone."): value for key, value in model.state_dict().items() if "backbone." in key[:9]}
    assert own.keys() == tiny.build().state_dict().keys()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    total(HEADS[name], model(images, sizes, truth), 3, 2).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    other = HEADS[name].build(tiny.build(), 3)
    restore_model(folder, other)
    restore_optimizer(folder, other, torch.optim.AdamW(other.parameters()))
    model.eval()
    for again in (other.eval(), copy.deepcopy(model)):
        assert all(same(a, b) for a, b in zip(model(images, sizes), again(images, sizes), strict=True))


@heads
def test_a_value_is_json_and_knows_transformers_only_to_build(name) -> None:
    head = HEADS[name]
    assert decode(type(head), json.loads(json.dumps(encode(head)))) == head
    assert not head.says_masks


@heads
def test_numbers_that_are_none_are_losses_that_are_none_and_no_error(name, tiny, scenes) -> None:
    model, (images, sizes, truth) = HEADS[name].build(tiny.build(), 3), scenes(1, 1)
    images[0, 0, 5, 5] = math.nan
    sums = model(images, sizes, truth)
    assert all(one.isnan() for one in sums.values())
    sum(sums.values()).backward()


@pytest.mark.parametrize("name", ["two stages", "rt-detr", "d-fine"])
def test_images_with_fewer_positions_than_queries_are_refused(name, tiny, scenes) -> None:
    model = dataclasses.replace(HEADS[name], queries=99).build(tiny.build(), 3)
    there = 85 if name == "two stages" else 84  # which makes a map of one position itself
    with pytest.raises(ValueError, match=rf"have {there} positions, wanted 99 at least.*fewer queries, or larger"):
        model(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))
    enough = dataclasses.replace(HEADS[name], queries=there).build(tiny.build(), 3).eval()
    assert len(enough(torch.randn(1, 3, 64, 64), torch.tensor([[64, 64]]))) == 1


def test_settings_that_cannot_be_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="width is 24, wanted a multiple of 32"):
        hf.DeformableDetr(width=24).build(tiny.build(), 3)
    with pytest.raises(ValueError, match="two_stage is True and box_refine False"):
        hf.DeformableDetr(two_stage=True).build(tiny.build(), 3)


def test_queries_are_weighed_one_by_one() -> None:
    for objects, images in ((3, 2), (0, 1), (500, 1), (0, 0)):
        weights = [1.0 if query < objects else 0.1 for query in range(images * 100)]
        assert query_weight(objects, images, queries=100, no_object=0.1) == round(100 * sum(weights))


def test_backbones_of_two_stages_and_decoders_of_one_layer_do_too(tiny, scenes) -> None:
    two = dataclasses.replace(tiny, depths=(1, 1), num_heads=(1, 2), experts=None)
    images, sizes, truth = scenes(2, 1)
    for head in HEADS.values():
        sums = dataclasses.replace(head, decoder_layers=1).build(two.build(), 3)(images, sizes, truth)
        assert all(one.isfinite() for one in sums.values())
