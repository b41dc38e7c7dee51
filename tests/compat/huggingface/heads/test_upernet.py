"""UperNet on a backbone of ours."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from synchromesh.compat.huggingface import heads as hf
from synchromesh.compat.huggingface.heads.upernet_model import UperNetSegmenter, groups_for
from synchromesh.models.heads.semantic import IGNORE
from synchromesh.training.codec import decode, encode

HEAD = hf.UperNet(width=16, pool_scales=(1, 2), auxiliary_width=8)
BATCH = dataclasses.replace(HEAD, norms=hf.Norms.BATCH)


def batch(count: int, size: tuple[int, int] = (64, 64)) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, 3, (count, *size))
    labels[torch.rand(count, *size) < 0.2] = IGNORE
    return torch.randn(count, 3, *size), torch.tensor([size]).expand(count, 2), labels


def loss(head: hf.UperNet, model: UperNetSegmenter, images: Tensor, sizes: Tensor, labels: Tensor) -> Tensor:
    sums, counts, weights = model(images, sizes, labels), head.counts(labels), head.weights()
    assert sums.keys() == counts.keys() == weights.keys()
    return sum(weights[name] * sums[name] / max(1, counts[name]) for name in sums)


@pytest.mark.parametrize("head", [HEAD, BATCH], ids=["group", "batch"])
def test_loss_and_logits_are_those_of_transformers_on_the_same_weights(head, tiny) -> None:
    model, (images, sizes, labels) = head.build(tiny.build(), 3), batch(2)
    network = copy.deepcopy(model.network)  # which moves running means of its own
    with network.backbone.showing(model.backbone(images)):
        said = network(pixel_values=images, labels=labels)
    assert loss(head, model, images, sizes, labels).item() == pytest.approx(said.loss.item(), rel=1e-5)
    assert torch.allclose(model(images, sizes), said.logits, atol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_finite_gradient_experts_and_routers_one_that_teaches(count, dtype, tiny) -> None:
    model, (images, sizes, labels) = HEAD.build(tiny.build(), 3), batch(count)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = loss(HEAD, model, images, sizes, labels)
    assert total.dtype == torch.float32
    total.backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    learns = [bool(grad.any()) for key, grad in grads.items() if ".router." in key or ".experts." in key]
    assert len(learns) > 5
    assert all(learns) if count else not any(learns)


def test_pixels_that_nobody_knows_teach_nothing(tiny) -> None:
    model, (images, sizes, labels) = HEAD.build(tiny.build(), 3), batch(2)
    loss(HEAD, model, images, sizes, torch.full_like(labels, IGNORE)).backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_images_of_any_size_and_backbones_of_two_stages(tiny) -> None:
    two = dataclasses.replace(tiny, depths=(1, 1), num_heads=(1, 2), experts=None)
    images, sizes, labels = batch(2, (47, 75))
    for config in (tiny, two):
        model = HEAD.build(config.build(), 3)
        assert model(images, sizes).shape == (2, 3, 47, 75)
        loss(HEAD, model, images, sizes, labels).backward()
        assert all(p.grad is not None for p in model.parameters())
    assert model.network.auxiliary_head is None


def test_one_image_is_too_few_for_batch_norms_and_enough_for_group_norms(tiny) -> None:
    images, sizes, labels = batch(1)
    model = BATCH.build(tiny.build(), 3)
    with pytest.raises(ValueError, match=r"got 1 image while training, wanted 2 at least.*norms=Norms\.GROUP"):
        model(images, sizes, labels)
    assert model.eval()(images, sizes).shape == (1, 3, 64, 64)
    assert not [m for m in HEAD.build(tiny.build(), 3).modules() if isinstance(m, nn.BatchNorm2d)]


def test_groups_leave_something_of_a_map_of_one_position() -> None:
    assert [groups_for(width) for width in (512, 256, 64, 16, 8, 6, 2)] == [32, 32, 16, 4, 2, 1, 1]
    for width in range(2, 70):
        assert width % groups_for(width) == 0
        assert nn.GroupNorm(groups_for(width), width)(torch.randn(1, width, 1, 1)).abs().max() > 0.1


def test_a_value_is_json_and_the_backbone_has_its_own_names(tiny) -> None:
    assert decode(hf.UperNet, json.loads(json.dumps(encode(BATCH)))) == BATCH
    keys = list(HEAD.build(tiny.build(), 3).state_dict())
    assert [key[9:] for key in keys if key.startswith("backbone.")] == list(tiny.build().state_dict())
