"""The formula against the tensors that autograd keeps."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from synchromesh.models.features import Backbone, Features, Place
from synchromesh.models.heads.cascade.box_stage import BoxStages, Norm
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
from synchromesh.models.heads.cascade.memory import kept_bytes, working_bytes
from synchromesh.models.heads.cascade.region_proposals import RegionProposals
from synchromesh.models.heads.objects import Objects

CLASSES, WIDTHS, STRIDES, SIDE = 3, (12, 24), (4, 8), 96
# Objects are as many as positives, and all regions stay, so that every stage sees as many as it may.
HEAD = CascadeMaskRCNN(
    width=16,
    proposals=RegionProposals(scale=2.0, overlap=1.0, of_level=100, kept=150),
    boxes=BoxStages(hidden=20, convs=2, sampled=40, positive_share=0.25),
    mask_convs=2,
)


class Given(Backbone):
    """A backbone that keeps nothing: its maps are weights."""

    widths, strides, init_std = WIDTHS, STRIDES, 0.02

    def __init__(self, images: int) -> None:
        super().__init__()
        self.maps = nn.ParameterList(
            torch.randn(images, width, SIDE // s, SIDE // s) for width, s in zip(WIDTHS, STRIDES, strict=True)
        )

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Features:
        last = self.maps[-1].permute(0, 2, 3, 1)
        return Features(last.mean((1, 2)), last, tuple(self.maps))

    def multiply_adds(self) -> float:
        return 0.0

    def feed_forwards(self) -> Iterator[Place]:
        yield from ()


def kept(model: nn.Module, *inputs: object) -> int:
    """Bytes of what forward saves, each storage once, without weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*inputs)
    return sum(one.nbytes() for place, one in storages.items() if place not in own)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("norm", [Norm.GROUP, Norm.NONE])
@pytest.mark.parametrize("masks", [True, False])
def test_forward_keeps_what_the_formula_says(masks: bool, norm: Norm, images: int) -> None:
    head = dataclasses.replace(HEAD, masks=masks, boxes=dataclasses.replace(HEAD.boxes, norm=norm))
    model = head.build(Given(images), CLASSES)
    count = int(head.boxes.sampled * head.boxes.positive_share)
    corners = torch.rand(images * count, 2) * (SIDE - 30)
    boxes = torch.cat([corners, corners + 6 + torch.rand(images * count, 2) * 20], dim=1)
    drawn = torch.ones(images * count, SIDE, SIDE, dtype=torch.bool)
    truth = Objects(torch.arange(images).repeat_interleave(count), boxes, torch.zeros(images * count).long(), drawn)
    sizes = torch.full((images, 2), SIDE)
    found = kept(model, torch.zeros(images, 3, SIDE, SIDE), sizes, truth)
    parts = kept_bytes(
        head, widths=WIDTHS, strides=STRIDES, num_classes=CLASSES, height=SIDE, width=SIDE, images=images
    )
    assert (parts["masks"] > 0) == masks
    assert found == pytest.approx(sum(parts.values()), rel=0.05)  # beside it: grids, labels, numbers of regions


def test_at_full_size_the_parts_are_those_of_the_page() -> None:
    head, sizes = CascadeMaskRCNN(), {"strides": (4, 8, 16, 32), "num_classes": 80, "height": 800, "width": 1333}
    parts = kept_bytes(head, widths=(96, 192, 384, 768), **sizes)
    assert {part: round(count / 2**20) for part, count in parts.items()} == {
        "pyramid": 219,
        "proposals": 87,
        "boxes": 670,
        "masks": 666,
    }
    assert round(working_bytes(head, **sizes) / 2**20) == 276
