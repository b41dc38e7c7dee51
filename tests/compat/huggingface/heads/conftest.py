"""A tiny backbone with experts, and batches of two sizes."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from synchromesh.models.heads.objects import Objects
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless

SIDE = 64
SIZES = ((64, 64), (32, 48), (64, 40))


@pytest.fixture(autouse=True)
def _alone_and_repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> SwinV2Config:
    """Four stages of one block each: no window is shifted, so that none sees over the border of its picture."""
    experts = ExpertsConfig(
        num_experts=3,
        k=2,
        blocks=((), (0,), (0,), ()),
        router=LinearGate(noise=0.0),
        capacity=Dropless(),
        losses=(),
        dropout=0.0,
    )
    return SwinV2Config(
        image_size=SIDE,
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        window_size=4,
        drop_path=0.0,
        experts=experts,
    )


@pytest.fixture
def scenes() -> Callable[..., tuple[Tensor, Tensor, Objects]]:
    """Images padded with zeros, their sizes, and so many objects in each, with rectangles as masks."""

    def make(*counts: int, classes: int = 3) -> tuple[Tensor, Tensor, Objects]:
        images = torch.zeros(len(counts), 3, SIDE, SIDE)
        for image, (height, width) in zip(images, SIZES, strict=False):
            image[:, :height, :width] = torch.randn(3, height, width)
        sizes = torch.tensor(SIZES[: len(counts)], dtype=torch.int64).reshape(-1, 2)
        image = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
        corners = (torch.rand(len(image), 2) * 16).round()
        boxes = torch.cat([corners, corners + (4 + torch.rand(len(image), 2) * 11).round()], dim=1)
        masks = torch.zeros(len(image), SIDE, SIDE, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        return images, sizes, Objects(image, boxes, torch.randint(0, classes, (len(image),)), masks)

    return make
