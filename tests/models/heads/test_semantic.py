import math

import pytest
import torch
from torch import Tensor

from synchromesh.models.heads.semantic import IGNORE, PyramidSegmenter, SemanticFPN, summed_cross_entropy
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless

EXPERTS = ExpertsConfig(
    num_experts=3, k=2, blocks=((), (0,)), router=LinearGate(noise=0.0), capacity=Dropless(), losses=(), dropout=0.0
)
TINY = SwinV2Config(
    image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path=0.0, experts=EXPERTS
)


def model(classes: int = 3, width: int = 8) -> PyramidSegmenter:
    return SemanticFPN(width=width).build(TINY.build(), classes)


def batch(count: int, size: tuple[int, int] = (32, 32), classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(0, classes, (count, *size))
    labels[torch.rand(count, *size) < 0.2] = IGNORE
    return torch.randn(count, 3, *size), torch.tensor([size]).expand(count, 2), labels


@pytest.mark.parametrize("size", [(32, 32), (13, 19), (4, 50)])
def test_logits_have_the_size_of_the_images_and_are_float32_in_half_precision_too(size) -> None:
    images, sizes, _ = batch(2, size)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model()(images, sizes)
    assert logits.shape == (2, 3, *size)
    assert logits.dtype == torch.float32


def test_the_loss_is_that_of_the_loop_over_pixels_that_count() -> None:
    _, _, labels = batch(2, (5, 4))
    logits, wanted = torch.randn(2, 3, 5, 4), 0.0
    for image in range(2):
        for row in range(5):
            for column in range(4):
                label = int(labels[image, row, column])
                if label != IGNORE:
                    scores = [math.exp(v) for v in logits[image, :, row, column].tolist()]
                    wanted -= math.log(scores[label] / sum(scores))
    assert summed_cross_entropy(logits, labels, ignore=IGNORE).item() == pytest.approx(wanted, rel=1e-5)
    assert SemanticFPN().counts(labels) == {"cross_entropy": sum(v != IGNORE for v in labels.flatten().tolist())}


def test_another_number_may_stand_for_what_nobody_knows() -> None:
    logits, labels = torch.randn(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 7]]], dtype=torch.uint8)
    known = torch.tensor([[[0, 1], [2, IGNORE]]])
    loss = summed_cross_entropy(logits, labels, ignore=7)
    assert torch.equal(loss, summed_cross_entropy(logits, known, ignore=IGNORE))
    assert SemanticFPN().counts(labels, ignore=7) == SemanticFPN().counts(known) == {"cross_entropy": 3}


def test_the_loss_of_a_batch_is_the_sum_of_those_of_its_images_with_all_gradients() -> None:
    head, (images, sizes, labels) = model().double(), batch(3)
    whole = head(images.double(), sizes, labels)["cross_entropy"]
    parts = [head(images[i : i + 1].double(), sizes[:1], labels[i : i + 1])["cross_entropy"] for i in range(3)]
    assert whole.item() == pytest.approx(sum(parts).item(), rel=1e-6)
    parameters = list(head.parameters())
    both = [torch.autograd.grad(loss, parameters) for loss in (whole, sum(parts))]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_routers_learn(dtype) -> None:
    head, (images, sizes, labels) = model(), batch(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = head(images, sizes, labels)["cross_entropy"]
    assert loss.dtype == torch.float32
    loss.backward()
    grads = {name: p.grad for name, p in head.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(grads[name].any() for name in grads if ".router." in name or ".experts." in name)


@pytest.mark.parametrize("count", [0, 2])
def test_without_an_image_or_a_pixel_that_counts_every_parameter_gets_a_gradient_of_zero(count) -> None:
    head, (images, sizes, labels) = model(), batch(count)
    loss = head(images, sizes, torch.full_like(labels, IGNORE))["cross_entropy"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert head(images, sizes).shape == (count, 3, 32, 32)


def test_it_learns_which_pixels_are_bright() -> None:
    torch.manual_seed(0)
    head = model(2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    blocks = torch.rand(8, 1, 4, 4).round()
    labels = torch.nn.functional.interpolate(blocks, size=(32, 32))[:, 0].long()
    images, sizes = labels[:, None].float().expand(8, 3, 32, 32) + torch.randn(8, 3, 32, 32) / 4, torch.full((8, 2), 32)
    for _ in range(40):
        optimizer.zero_grad()
        (head(images, sizes, labels)["cross_entropy"] / labels.numel()).backward()
        optimizer.step()
    right = head.eval()(images, sizes).argmax(1) == labels
    assert right.float().mean() > 0.9


def test_a_head_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 0, wanted an integer >= 1"):
        model(0)
