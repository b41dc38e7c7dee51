"""Dense heads on ranks: gradients are those of the whole batch, also where a rank has no image or no object."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from synchromesh import FullySharded, Grid, Replicated, parallelize
from synchromesh.compat.huggingface import heads as hf
from synchromesh.models.heads.depth import DepthFPN
from synchromesh.models.heads.objects import Objects
from synchromesh.models.heads.semantic import IGNORE, SemanticFPN
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless
from synchromesh.parallel.shared import Shared
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

SIDE = 32
EXPERTS = ExpertsConfig(
    num_experts=4, k=2, blocks=((), (0,)), router=LinearGate(noise=0.0), capacity=Dropless(), losses=(), dropout=0.0
)
TINY = SwinV2Config(
    image_size=SIDE, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path=0.0, experts=EXPERTS
)
SMALL = {"width": 32, "heads": 2, "decoder_layers": 2, "ffn": 16, "queries": 4, "dropout": 0.0}
HEADS = {
    "Detr": hf.Detr(**SMALL, encoder_layers=1),
    "DeformableDetr": hf.DeformableDetr(
        **SMALL | {"width": 64}, encoder_layers=1, extra_levels=0, box_refine=True, two_stage=True
    ),
    "MaskFormer": hf.MaskFormer(**SMALL),
    "SemanticMasks": hf.SemanticMasks(hf.MaskFormer(**SMALL)),
    "PanopticMasks": hf.PanopticMasks(hf.MaskFormer(**SMALL)),
    "UperNet": hf.UperNet(width=16, pool_scales=(1, 2)),
    "SemanticFPN": SemanticFPN(width=8),
    "DepthFPN": DepthFPN(width=8),
}
OF_OBJECTS = ("Detr", "DeformableDetr", "MaskFormer", "PanopticMasks")
THINGS = (True, False, True)


def batch(name: str, step: int, images: slice) -> tuple[tuple[Any, ...], dict[str, int]]:
    """Some of three images, of which the first has no object, and what the losses of this part are divided by."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=generator)[images]
    image = torch.tensor([1, 1, 2])
    boxes = torch.tensor([[2.0, 3, 20, 18], [9, 8, 30, 31], [4, 1, 12, 28]])
    masks = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    here = list(range(3))[images]
    own = torch.tensor([index in here for index in image.tolist()])
    first = here[0] if here else 0
    truth = Objects(image - first, boxes, torch.tensor([0, 2, 0]), masks).chosen(own)
    labels = torch.randint(0, 3, (3, SIDE, SIDE), generator=generator)
    labels[0] = IGNORE
    labels = labels[images]
    depth = torch.where(labels == IGNORE, 0.0, 1.0 + labels)
    sizes, head = torch.full((len(pixels), 2), SIDE), HEADS[name]
    if name == "PanopticMasks":
        return (pixels, sizes, truth, labels), head.counts(truth, labels, THINGS)
    if name in OF_OBJECTS:
        return (pixels, sizes, truth), head.counts(len(truth), len(pixels))
    return (pixels, sizes, depth if name == "DepthFPN" else labels), head.counts(
        depth if name == "DepthFPN" else labels
    )


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    head = HEADS[name]
    if name == "DepthFPN":
        return head.build(TINY.build())
    return head.build(TINY.build(), THINGS if name == "PanopticMasks" else 3)


def loss(name: str, run: nn.Module, inputs: tuple[Any, ...], counts: dict[str, int]) -> Tensor:
    weights = HEADS[name].weights()
    return torch.stack([weights[key] * value / counts[key] for key, value in run(*inputs).items()]).sum()


def learns(name: str, shared: Shared) -> None:
    """Two steps: the first rank has an image without an object, and then all images, the second one none."""
    grid = Grid.from_group(dist.group.WORLD)
    model = model_of(name)
    whole = copy.deepcopy(model)
    run = parallelize(model, grid, shared=shared)
    for step, cut in enumerate((1, 3)):
        inputs, counts = batch(name, step, slice(0, 3))
        run.zero_grad()
        whole.zero_grad()
        loss(name, whole, inputs, counts).backward()
        own, _ = batch(name, step, slice(0, cut) if grid.rank == 0 else slice(cut, 3))
        (loss(name, run, own, counts) * grid.size).backward()
        got, wanted = [], []
        for (key, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert parameter.grad is not None, key
            whole_grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            got.append(whole_grad.flatten())
            right = other.grad.chunk(grid.size)[grid.rank] if ".experts." in key else other.grad
            wanted.append(right.flatten())
        assert_close(f"gradient of {name}", torch.cat(got), torch.cat(wanted))


def learns_all(names: tuple[str, ...], shared: Shared) -> None:
    for name in names:
        learns(name, shared)


@pytest.mark.parametrize(
    ("names", "shared"),
    [(tuple(HEADS), Replicated()), (("DeformableDetr", "MaskFormer", "UperNet"), FullySharded())],
    ids=["replicated", "fully sharded"],
)
def test_gradients_on_two_ranks_are_those_of_the_whole_batch(names: tuple[str, ...], shared: Shared) -> None:
    run_ranks(learns_all, 2, names, shared)
