import math

import pytest
import torch
from torch import Tensor

from synchromesh.models.heads.depth import DepthFPN, LogDifference, PyramidDepth, ScaleInvariantLog, log_depth
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless

EXPERTS = ExpertsConfig(
    num_experts=3, k=2, blocks=((), (0,)), router=LinearGate(noise=0.0), capacity=Dropless(), losses=(), dropout=0.0
)
TINY = SwinV2Config(
    image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path=0.0, experts=EXPERTS
)
LOSSES = (ScaleInvariantLog(), ScaleInvariantLog(share=0.85), LogDifference())


def model(**settings) -> PyramidDepth:
    return DepthFPN(**({"width": 8, "nearest": 0.5, "farthest": 20.0} | settings)).build(TINY.build())


def batch(count: int, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor, Tensor]:
    """Depth with holes of every kind, and more of them in later images."""
    depth = 0.5 + torch.rand(count, *size) * 10
    for image in range(count):
        depth[image][torch.rand(size) < 0.2 * (image + 1)] = (0.0, math.nan, math.inf, -1.0)[image % 4]
    return torch.randn(count, 3, *size), torch.tensor([size]).expand(count, 2), depth


def slow(found: Tensor, depth: Tensor, loss: ScaleInvariantLog | LogDifference) -> tuple[float, int]:
    """The sum over pixels that are known, by loops, and how many these are."""
    total, count = 0.0, 0
    for image in range(len(depth)):
        offs = [
            math.log(float(found[image, row, column])) - math.log(true)
            for row in range(depth.shape[1])
            for column in range(depth.shape[2])
            if math.isfinite(true := float(depth[image, row, column])) and true > 0
        ]
        count += len(offs)
        if isinstance(loss, LogDifference):
            total += sum(map(abs, offs))
        elif offs:  # of one image, as in the paper, weighted by its pixels
            n = len(offs)
            total += n * (sum(off**2 for off in offs) / n - loss.share * (sum(offs) / n) ** 2)
    return total, count


@pytest.mark.parametrize("farthest", [20.0, None])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_loss_is_that_of_the_loops_over_known_pixels(loss, farthest) -> None:
    head, (images, sizes, depth) = model(loss=loss, farthest=farthest), batch(4, (9, 11))
    wanted, count = slow(head(images, sizes).detach(), depth, loss)
    assert {name: v.item() for name, v in head(images, sizes, depth).items()} == {
        loss.name: pytest.approx(wanted, rel=1e-4)
    }
    assert head.settings.counts(depth) == {loss.name: count}
    assert head.settings.weights() == {loss.name: 1.0}


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_sums_of_parts_are_the_sum_of_the_batch(loss) -> None:
    head, (images, sizes, depth) = model(loss=loss), batch(3)
    whole = head(images, sizes, depth)[loss.name]
    parts = sum(head(images[i : i + 1], sizes[:1], depth[i : i + 1])[loss.name] for i in range(3))
    assert whole.item() == pytest.approx(parts.item(), rel=1e-5)


def test_the_scale_counts_by_its_share_alone() -> None:
    off, here = torch.randn(2, 40), torch.ones(2, 40, dtype=torch.bool)
    free, half, none = (ScaleInvariantLog(share=share) for share in (1.0, 0.5, 0.0))
    assert float(free(off + 3, here)) == pytest.approx(float(free(off, here)), rel=1e-4)
    gained = float(none(off + 3, here) - none(off, here))
    mean = float(half(off + 3, here) - half(off, here))
    assert mean == pytest.approx(gained / 2, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_said_lies_between_the_limits_and_has_the_size_of_the_images(dtype) -> None:
    images, sizes, _ = batch(2, (13, 19))
    head = model()
    torch.nn.init.normal_(head.depth.weight, std=1e3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        metres = head(images, sizes)
    assert metres.dtype == torch.float32
    assert metres.shape == (2, 13, 19)
    assert 0.5 <= metres.min() < metres.max() <= 20 * (1 + 1e-5)


def test_half_way_is_the_geometric_mean_and_without_a_limit_any_depth_can_be_said() -> None:
    zero = torch.zeros(1)
    assert float(log_depth(zero, DepthFPN(nearest=1.0, farthest=16.0)).exp()) == pytest.approx(4.0)
    free = DepthFPN(nearest=1.0, farthest=None)
    said = log_depth(torch.tensor([-200.0, 0.0, 1000.0]), free).exp().tolist()
    assert said == [pytest.approx(v, rel=1e-4) for v in (1.0, 1 + math.log(2), 1001.0)]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_and_routers_learn(loss, dtype) -> None:
    head, (images, sizes, depth) = model(loss=loss), batch(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        (total,) = head(images, sizes, depth).values()
    assert total.dtype == torch.float32
    total.backward()
    grads = {name: p.grad for name, p in head.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert all(grads[name].any() for name in grads if ".router." in name or ".experts." in name)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("count", [0, 2])
def test_without_an_image_or_a_known_pixel_every_parameter_gets_a_gradient_of_zero(count, loss) -> None:
    head, (images, sizes, depth) = model(loss=loss), batch(count)
    (total,) = head(images, sizes, torch.zeros_like(depth)).values()
    total.backward()
    assert total == 0
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())
    assert head(images, sizes).shape == (count, 32, 32)


@pytest.mark.parametrize("limits", [(0.0, 10.0), (5.0, 5.0), (-1.0, None)])
def test_limits_that_leave_no_depth_are_refused(limits) -> None:
    with pytest.raises(ValueError, match="wanted nearest above 0 and farthest above it"):
        DepthFPN(nearest=limits[0], farthest=limits[1])
    with pytest.raises(ValueError, match=r"share is 1.5, wanted a number in \[0, 1\]"):
        ScaleInvariantLog(share=1.5)
