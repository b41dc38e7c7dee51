"""Mask transformers on a backbone of ours, as objects, classes of pixels and segments."""

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Mask2FormerImageProcessorPil

from synchromesh.compat.huggingface import heads as hf
from synchromesh.compat.huggingface.heads.mask_results import boxes_around, objects_of, pixels_of, segments_of
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.objects import Objects
from synchromesh.models.heads.semantic import IGNORE
from synchromesh.training.codec import decode, encode

SMALL = {"width": 64, "heads": 2, "decoder_layers": 2, "ffn": 16, "queries": 6, "dropout": 0.0}
MASKS = {
    "mask2former": hf.Mask2Former(**SMALL, encoder_layers=1, encoder_ffn=16, points=32),
    "maskformer": hf.MaskFormer(**SMALL),
}
THINGS = (True, False, True)
USES = ("objects", "semantic", "panoptic")
masks = pytest.mark.parametrize("name", MASKS)
uses = pytest.mark.parametrize("use", USES)


def head_of(name: str, use: str):
    wraps = {"objects": lambda head: head, "semantic": hf.SemanticMasks, "panoptic": hf.PanopticMasks}
    return wraps[use](MASKS[name])


def built(name: str, use: str, tiny) -> nn.Module:
    return head_of(name, use).build(tiny.build(), THINGS if use == "panoptic" else 3)


def truths(use: str, truth: Objects, images: int) -> tuple[tuple, dict[str, int], list[list[tuple[int, Tensor]]]]:
    """What a model is given, its counts, and the classes and masks of each image by the definition."""
    labels = torch.full((images, 64, 64), 1)
    labels[:, :, 50:] = IGNORE
    things = dataclasses.replace(truth, labels=truth.labels - truth.labels % 2)
    for i in range(len(truth)):
        labels[int(truth.image[i])][truth.masks[i]] = things.labels[i]
    whole = []
    for image in range(images):
        of_pixels = [(c, labels[image] == c) for c in (0, 1, 2) if bool((labels[image] == c).any())]
        every = zip(things.labels.tolist(), truth.masks, truth.image.tolist(), strict=True)
        objects = [(label, mask) for label, mask, at in every if at == image]
        both = objects + [(c, mask) for c, mask in of_pixels if c == 1]
        whole.append({"objects": objects, "semantic": of_pixels, "panoptic": both}[use])
    given = {"objects": (things,), "semantic": (labels,), "panoptic": (things, labels)}[use]
    return given, whole


def counts_of(head, use: str, given: tuple, images: int) -> dict[str, int]:
    if use == "objects":
        return head.counts(len(given[0]), images)
    return head.counts(*given) if use == "semantic" else head.counts(*given, THINGS)


def total(head, sums: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
    assert sums.keys() == counts.keys() == head.weights().keys()
    return sum(head.weights()[name] * sums[name] / max(1, counts[name]) for name in sums)


@masks
@uses
@pytest.mark.parametrize(("counts", "dtype"), [((2, 1), torch.bfloat16), ((0, 0), torch.float32), ((), torch.float32)])
def test_every_parameter_gets_a_finite_gradient_experts_and_routers_one_that_teaches(
    name, use, counts, dtype, tiny, scenes
) -> None:
    model, (images, sizes, truth) = built(name, use, tiny), scenes(*counts)
    given, _ = truths(use, truth, len(counts))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        sums = model(images, sizes, *given)
    assert all(one.dtype == torch.float32 and one.isfinite() for one in sums.values())
    total(head_of(name, use), sums, counts_of(head_of(name, use), use, given, len(counts))).backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    learns = [bool(grad.any()) for key, grad in grads.items() if ".router." in key or ".experts." in key]
    assert len(learns) > 5
    assert all(learns) if counts else not any(learns)


@masks
@uses
@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (0, 0)], ids=str)
def test_the_loss_is_that_of_transformers_on_the_same_weights(name, use, counts, tiny, scenes) -> None:
    model, (images, sizes, truth) = built(name, use, tiny), scenes(*counts)
    given, whole = truths(use, truth, len(counts))
    labels = [torch.tensor([c for c, _ in each], dtype=torch.int64) for each in whole]
    areas = [torch.stack([m for _, m in each]).float() if each else torch.zeros(0, 64, 64) for each in whole]
    network = model.masks.network
    torch.manual_seed(1)  # of the points
    with network.get_submodule(model.masks.place).showing(model.backbone(images)):
        said = network(pixel_values=images, mask_labels=areas, class_labels=labels, output_hidden_states=True)
    torch.manual_seed(1)
    counted = counts_of(head_of(name, use), use, given, len(counts))
    assert counted["mask_loss"] == sum(map(len, whole))
    got = total(head_of(name, use), model(images, sizes, *given), counted)
    assert got.item() == pytest.approx(said.loss.item(), rel=1e-5)


def test_sums_of_images_are_the_sum_of_the_batch(tiny, scenes) -> None:
    """Of MaskFormer, which draws no points."""
    model, (images, sizes, truth) = built("maskformer", "objects", tiny), scenes(2, 0, 3)
    whole, parts = model(images, sizes, truth), {"class_loss": 0.0, "mask_loss": 0.0}
    for i in range(3):
        own = truth.chosen(truth.image == i)
        for key, value in model(
            images[i : i + 1], sizes[i : i + 1], dataclasses.replace(own, image=own.image * 0)
        ).items():
            parts[key] += value.item()
    assert {key: value.item() for key, value in whole.items()} == pytest.approx(parts, rel=1e-4)


def said(queries: int = 9, classes: int = 4, seed: int = 0) -> SimpleNamespace:
    """What some queries say of one image, as transformers returns it: masks of 96 x 96 with blobs."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.nn.functional.interpolate(torch.randn(1, queries, 7, 7, generator=generator), size=96, mode="bicubic")
    logits = torch.randn(1, queries, classes + 1, generator=generator) * 3
    return SimpleNamespace(class_queries_logits=logits, masks_queries_logits=blobs * 4)


FULL = (384, 384)  # to which transformers enlarges masks, whatever the image


@pytest.mark.parametrize("least", [0.0, 0.3])
def test_objects_are_those_of_transformers_processor(least) -> None:
    raw = said()
    found = objects_of(raw.class_queries_logits[0], raw.masks_queries_logits[0], FULL, FULL, most=9, least=least)
    (wanted,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        raw, threshold=least, target_sizes=[FULL], return_binary_maps=True
    )
    pairs = zip(wanted["segments_info"], wanted["segmentation"], strict=True)
    ordered = sorted(pairs, key=lambda pair: -pair[0]["score"])
    assert found.scores.tolist() == pytest.approx([info["score"] for info, _ in ordered], abs=2e-6)
    assert found.labels.tolist() == [info["label_id"] for info, _ in ordered]
    assert torch.equal(found.masks, torch.stack([mask for _, mask in ordered]).bool())


def test_no_more_masks_than_wanted_and_none_without_a_pixel() -> None:
    raw = said()
    raw.masks_queries_logits[0, :4] = -1.0
    every = objects_of(raw.class_queries_logits[0], raw.masks_queries_logits[0], FULL, FULL, most=100, least=0.0)
    assert every.masks.flatten(1).any(1).all()
    few = objects_of(raw.class_queries_logits[0], raw.masks_queries_logits[0], FULL, FULL, most=2, least=0.0)
    assert torch.equal(few.scores, every.scores[:2])
    none = objects_of(raw.class_queries_logits[0], raw.masks_queries_logits[0], FULL, (20, 30), most=9, least=1.1)
    assert (len(none.scores), none.masks.shape) == (0, (0, 20, 30))


def test_classes_of_pixels_are_those_of_transformers_processor() -> None:
    raw = said()
    got = pixels_of(raw.class_queries_logits[0], raw.masks_queries_logits[0], FULL)
    (wanted,) = Mask2FormerImageProcessorPil().post_process_semantic_segmentation(
        raw, target_sizes=[FULL], return_segmentation_scores=True
    )
    assert torch.allclose(got.exp(), wanted.segmentation_scores, atol=1e-5)
    assert torch.equal(got.argmax(0), wanted.segmentation)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("things", [(True,) * 4, (False, True, False, True)], ids=str)
def test_segments_are_those_of_transformers_processor(seed, things) -> None:
    raw = said(queries=14, seed=seed)
    raw.masks_queries_logits -= 4.0  # smaller ones, of which several are left
    got = segments_of(
        raw.class_queries_logits[0], raw.masks_queries_logits[0], FULL, FULL, things, least=0.4, overlap=0.5
    )
    (wanted,) = Mask2FormerImageProcessorPil().post_process_panoptic_segmentation(
        raw,
        threshold=0.4,
        overlap_mask_area_threshold=0.5,
        label_ids_to_fuse={label for label, thing in enumerate(things) if not thing},
        target_sizes=[FULL],
    )
    assert len(got) > 2
    theirs = {info["id"]: info["label_id"] for info in wanted["segments_info"]}
    class_of = torch.tensor([-1, *got.labels.tolist()])[got.ids.long()]
    if all(things):
        assert torch.equal(got.ids, wanted["segmentation"].int())
        assert got.scores.tolist() == pytest.approx([info["score"] for info in wanted["segments_info"]], abs=2e-6)
    numbers = torch.tensor([theirs.get(number, -1) for number in range(15)])
    # With stuff transformers gives a number twice, to a thing that follows a fused segment: there only what is free of
    # it can be compared.
    reused = {info["id"] for info in wanted["segments_info"] if theirs[info["id"]] != info["label_id"]}
    clear = ~torch.isin(wanted["segmentation"].long(), torch.tensor(sorted(reused), dtype=torch.int64))
    assert torch.equal(class_of[clear], numbers[wanted["segmentation"].long()][clear])
    stuff = [label for label in got.labels.tolist() if not things[label]]
    assert len(stuff) == len(set(stuff))
    assert sorted(set(got.ids.unique().tolist()) - {0}) == list(range(1, len(got) + 1))


def test_a_thing_after_fused_stuff_is_a_segment_of_its_own() -> None:
    masks = torch.full((1, 4, 8, 8), -9.0)
    for query in range(4):
        masks[0, query, :, 2 * query : 2 * query + 2] = 9.0
    classes = torch.tensor([0, 1, 0, 1])  # stuff, thing, the same stuff, another thing
    logits = torch.nn.functional.one_hot(classes, 3).float()[None] * 9
    got = segments_of(logits[0], masks[0], (8, 8), (8, 8), (False, True), least=0.5, overlap=0.8)
    assert got.labels.tolist() == [0, 1, 1]
    assert got.ids[0].tolist() == [1, 1, 2, 2, 1, 1, 3, 3]


def test_padding_is_cut_off_before_anything_is_decided() -> None:
    raw = said()
    classes, small = raw.class_queries_logits[0], raw.masks_queries_logits[0]
    whole = objects_of(classes, small, (96, 96), (96, 96), most=9, least=0.0)
    part = objects_of(classes, small, (96, 96), (50, 70), most=9, least=0.0)
    areas = {tuple(mask[:50, :70].flatten().tolist()) for mask in whole.masks if mask[:50, :70].any()}
    assert {tuple(mask.flatten().tolist()) for mask in part.masks} == areas
    things = (True, False, True, True)
    cut = segments_of(classes, small, (96, 96), (50, 70), things, least=0.3, overlap=0.0)
    assert cut.ids.shape == (50, 70)


def test_boxes_are_those_around_the_pixels() -> None:
    areas = torch.rand(5, 9, 7) < 0.1
    areas[:, 4, 3] = True
    for mask, box in zip(areas, boxes_around(areas).tolist(), strict=True):
        rows, columns = zip(*mask.nonzero().tolist(), strict=True)
        assert box == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]
    assert boxes_around(areas[:0]).shape == (0, 4)


@masks
@uses
def test_what_is_said_of_images_of_any_size_has_their_size(name, use, tiny) -> None:
    model = built(name, use, tiny).eval()
    images, sizes = torch.randn(2, 3, 47, 75), torch.tensor([[47, 75], [33, 20]])
    said = model(images, sizes)
    if use == "semantic":
        assert said.shape == (2, 3, 47, 75)
        assert said.dtype == torch.float32
        assert model(images[:0], sizes[:0]).shape == (0, 3, 47, 75)
    else:
        shapes = [one.masks.shape[1:] if use == "objects" else one.ids.shape for one in said]
        assert [tuple(shape) for shape in shapes] == [(47, 75), (33, 20)]
        assert model(images[:0], sizes[:0]) == []


@masks
def test_the_three_models_share_their_tensors_names_and_the_backbones(name, tiny) -> None:
    keys = [list(built(name, use, tiny).state_dict()) for use in USES]
    assert keys[0] == keys[1] == keys[2]
    own = [key.removeprefix("backbone.") for key in keys[0] if key.startswith("backbone.")]
    assert own == list(tiny.build().state_dict())
    model = built(name, "objects", tiny)
    assert model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()
    assert len({p.data_ptr() for p in model.state_dict().values()}) == len(keys[0])  # none is shared


def test_a_mask_transformer_and_upernet_are_the_branches_of_a_panoptic_head(tiny, scenes) -> None:
    head = CentrePanoptic(MASKS["maskformer"], hf.UperNet(width=16, pool_scales=(1, 2)), least=0.0, least_stuff=1)
    model, (images, sizes, truth) = head.build(tiny.build(), THINGS), scenes(2, 1)
    _, labels = truths("panoptic", truth, 2)[0]
    things = dataclasses.replace(truth, labels=truth.labels - truth.labels % 2)
    sums = model(images, sizes, things, labels)
    assert sums.keys() == head.counts(things, labels, THINGS).keys() == head.weights().keys()
    sum(sums.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert [tuple(one.ids.shape) for one in model.eval()(images, sizes)] == [(64, 64), (32, 48)]


@masks
@uses
def test_a_value_is_json(name, use) -> None:
    head = head_of(name, use)
    assert decode(type(head), json.loads(json.dumps(encode(head)))) == head


@masks
def test_numbers_that_are_none_are_losses_that_are_none_and_no_error(name, tiny, scenes) -> None:
    model, (images, sizes, truth) = built(name, "objects", tiny), scenes(1, 1)
    images[0, 0, 5, 5] = math.nan
    assert all(one.isnan() for one in model(images, sizes, truth).values())


def test_what_cannot_be_is_explained(tiny, scenes) -> None:
    two = dataclasses.replace(tiny, depths=(1, 1), num_heads=(1, 2), experts=None)
    with pytest.raises(ValueError, match=r"has 2 maps for Mask2Former, wanted three at least"):
        MASKS["mask2former"].build(two.build(), 3)
    images, sizes, truth = scenes(2)
    assert all(one.isfinite() for one in MASKS["maskformer"].build(two.build(), 3)(images, sizes, truth).values())
    with pytest.raises(ValueError, match="has 1 map for MaskFormer, wanted two at least"):
        dataclasses.replace(MASKS["maskformer"], levels=1).build(two.build(), 3)
    with pytest.raises(ValueError, match="width is 48, wanted a multiple of 32"):
        hf.Mask2Former(width=48).build(tiny.build(), 3)
    with pytest.raises(ValueError, match="got objects without masks"):
        built("maskformer", "objects", tiny)(images, sizes, dataclasses.replace(truth, masks=None))
    with pytest.raises(ValueError, match="got one of truth and labels"):
        built("maskformer", "panoptic", tiny)(images, sizes, truth)
