"""Dense heads on a CPU: a training step and inference of each, our dense SwinV2 against transformers' Swinv2 below it.

    python benchmarks/heads.py                               # every head
    python benchmarks/heads.py --heads Mask2Former UperNet   # these alone
    python benchmarks/heads.py --quick                       # tiny sizes, one round, for a look whether all runs

Heads of transformers stand on its backbone in transformers' own class, with the same configuration, its own loss and
the results of its image processor; on ours as the values of `compat.huggingface.heads`. Heads of ours stand on
transformers' backbone through a wrapper. Both backbones have the same weights, and their maps are first compared;
where they differ no time is printed. A training step is forward, loss and backward, without the optimizer; inference
ends with boxes, masks or logits of each pixel. Stochastic depth is off. Rounds are interleaved, times are medians.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import machine, save, timed
from torch import Tensor, nn
from transformers import (
    DeformableDetrImageProcessorPil,
    DetrImageProcessorPil,
    Mask2FormerImageProcessorPil,
    MaskFormerImageProcessorPil,
    RTDetrImageProcessorPil,
    Swinv2Backbone,
    Swinv2Config,
)

from synchromesh.compat.huggingface import heads as hf
from synchromesh.compat.huggingface.swin.weights import from_transformers
from synchromesh.models.features import Backbone, Features, Place
from synchromesh.models.heads.cascade.box_stage import BoxStages
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
from synchromesh.models.heads.cascade.region_proposals import RegionProposals
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.depth import DepthFPN, DepthHead
from synchromesh.models.heads.objects import ObjectHead, Objects
from synchromesh.models.heads.semantic import SemanticFPN, SemanticHead
from synchromesh.models.swin_v2 import SwinV2, SwinV2Config
from synchromesh.testing.compare import relative_rms

FIGURE = ("machine", "threads", "head", "pass", "batch", "pixels")  # what tells a record from others
RESULTS = Path(__file__).parent / "results" / "heads.jsonl"
CLASSES, OBJECTS = 80, 8  # objects of an image
SMALL = {"width": 64, "heads": 2, "decoder_layers": 2, "ffn": 32, "queries": 6}
HEADS: dict[str, tuple[Any, Any]] = {  # as published, and for a quick look
    "Detr": (hf.Detr(), hf.Detr(**SMALL, encoder_layers=1)),
    "DeformableDetr": (hf.DeformableDetr(), hf.DeformableDetr(**SMALL, encoder_layers=1)),
    "RTDetrV2": (hf.RTDetrV2(), hf.RTDetrV2(**SMALL)),
    "DFine": (hf.DFine(), hf.DFine(**SMALL)),
    "Mask2Former": (hf.Mask2Former(), hf.Mask2Former(**SMALL, encoder_layers=1, encoder_ffn=32, points=64)),
    "MaskFormer": (hf.MaskFormer(), hf.MaskFormer(**SMALL)),
    "UperNet": (
        hf.UperNet(norms=hf.Norms.BATCH),
        hf.UperNet(width=16, pool_scales=(1, 2), auxiliary_width=8, norms=hf.Norms.BATCH),
    ),
    "CentreBoxes": (CentreBoxes(width=256, convs=4), CentreBoxes(width=8)),
    "SemanticFPN": (SemanticFPN(pyramid_width=256), SemanticFPN(width=8)),
    "DepthFPN": (DepthFPN(), DepthFPN(width=8)),
    "CascadeMaskRCNN": (
        CascadeMaskRCNN(),
        CascadeMaskRCNN(
            width=8,
            proposals=RegionProposals(scale=4.0, sampled=32, of_level=50, kept=20),
            boxes=BoxStages(hidden=16, convs=1, sampled=16),
            mask_convs=1,
        ),
    ),
}


@dataclass(frozen=True)
class Args:
    """What to measure. heads: all by default. seconds: of timing per contestant and pass. batch, pixels: of images."""

    heads: list[str] = field(default_factory=list)
    seconds: float = 6.0
    batch: int = 2
    pixels: int = 256
    threads: int = 0
    quick: bool = False
    out: Path = RESULTS


@dataclass(frozen=True)
class Problem:
    """Images and all that may be true of them."""

    images: Tensor
    sizes: Tensor
    objects: Objects
    labels: Tensor
    depth: Tensor


def problem_of(batch: int, pixels: int) -> Problem:
    """Return random images, with rectangles as objects."""
    image = torch.arange(batch).repeat_interleave(OBJECTS)
    corners = (torch.rand(len(image), 2) * pixels / 2).round()
    boxes = torch.cat([corners, corners + (pixels / 16 + torch.rand(len(image), 2) * pixels / 3).round()], dim=1)
    masks = torch.zeros(len(image), pixels, pixels, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    blocks = torch.randint(0, CLASSES, (batch, pixels // 16, pixels // 16))
    return Problem(
        images=torch.randn(batch, 3, pixels, pixels),
        sizes=torch.full((batch, 2), pixels),
        objects=Objects(image, boxes, torch.randint(0, CLASSES, (len(image),)), masks),
        labels=blocks.repeat_interleave(16, 1).repeat_interleave(16, 2),
        depth=1 + torch.rand(batch, pixels, pixels) * 20,
    )


class Wrapped(Backbone):
    """transformers' backbone as one of ours, for heads of ours."""

    def __init__(self, theirs: Swinv2Backbone, like: SwinV2) -> None:
        super().__init__()
        self.theirs, self.norm = theirs, nn.LayerNorm(like.widths[-1])
        self.widths, self.strides, self.init_std = like.widths, like.strides, like.init_std

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Features:
        maps = self.theirs(images).feature_maps
        last = self.norm(maps[-1].permute(0, 2, 3, 1))
        return Features(last.mean((1, 2)), last, tuple(maps))

    def multiply_adds(self) -> float:
        return 0.0

    def feed_forwards(self) -> Iterator[Place]:
        return iter(())


def backbones(args: Args) -> tuple[Swinv2Config, Swinv2Backbone, SwinV2]:
    """Return transformers' backbone and ours, with the same weights. Fails where their maps differ."""
    sizes = {"embed_dim": 24, "depths": [1, 1, 1, 1]} if args.quick else {"embed_dim": 96, "depths": [2, 2, 6, 2]}
    heads, window = [sizes["embed_dim"] * 2**stage // 24 for stage in range(4)], 4 if args.quick else 8
    common = {"image_size": args.pixels, "window_size": window}
    config = Swinv2Config(
        **sizes, **common, num_heads=heads, drop_path_rate=0.0, pretrained_window_sizes=[0] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    theirs = Swinv2Backbone(config)
    own = SwinV2Config(
        **common, embed_dim=config.embed_dim, depths=tuple(config.depths), num_heads=tuple(heads), drop_path=0.0
    )
    ours = own.build()
    state = from_transformers(theirs.state_dict())
    ours.load_state_dict({name: tensor for name, tensor in state.items() if name in ours.state_dict()}, strict=False)
    images = torch.randn(1, 3, args.pixels, args.pixels)
    with torch.no_grad():
        for got, wanted in zip(ours(images).maps, theirs(images).feature_maps, strict=True):
            if not relative_rms(got, wanted) < 1e-4:
                raise SystemExit(f"a map is off by {relative_rms(got, wanted):.2g}: nothing is timed")
    return config, theirs, ours


@dataclass(frozen=True)
class Contestant:
    """A model: its loss, and what it ends with in inference."""

    model: nn.Module
    loss: Callable[[], Tensor]
    infer: Callable[[], object]

    def step(self) -> None:
        """Run forward and backward once."""
        self.model.train().zero_grad()
        self.loss().backward()

    def inference(self) -> object:
        """Run once without gradients."""
        with torch.inference_mode():
            return self.model.eval() and self.infer()


def mean_of(head: Any, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> Tensor:
    """Return the loss as the training loop makes it."""
    return torch.stack([head.weights()[name] * sums[name] / max(1, counts[name]) for name in counts]).sum()


def ours_of(head: Any, backbone: Backbone, p: Problem) -> Contestant:
    """Return a head of ours, or a value of transformers', on a backbone."""
    if isinstance(head, DepthHead):
        model, truth, counts = head.build(backbone), p.depth, head.counts(p.depth)
    elif isinstance(head, SemanticHead):
        model, truth, counts = head.build(backbone, CLASSES), p.labels, head.counts(p.labels)
    else:
        assert isinstance(head, ObjectHead)
        model, truth = head.build(backbone, CLASSES), p.objects
        counts = head.counts(len(p.objects), len(p.images))
    return Contestant(
        model,
        lambda: mean_of(head, model(p.images, p.sizes, truth), counts),
        lambda: model(p.images, p.sizes),
    )


def theirs_of(head: Any, config: Swinv2Config, backbone: Swinv2Backbone, ours: nn.Module, p: Problem) -> Contestant:
    """Return transformers' own class on its own backbone, with its loss and its image processor's results."""
    network = getattr(ours, "network", None) or ours.masks.network
    own = copy.deepcopy(network.config)
    stages = len(network.get_submodule(getattr(ours, "place", None) or _place(ours)).config.widths)
    own.backbone_config = copy.deepcopy(config)
    own.backbone_config.out_features = [f"stage{number}" for number in range(5 - stages, 5)]
    model = type(network)(own)
    return Contestant(model, lambda: _their_loss(head, model, p), lambda: _their_results(head, model, p))


def _place(ours: nn.Module) -> str:
    return ours.masks.place if hasattr(ours, "masks") else "backbone"


def _their_loss(head: Any, model: nn.Module, p: Problem) -> Tensor:
    if isinstance(head, hf.UperNet):
        return model(pixel_values=p.images, labels=p.labels).loss
    own = [(p.objects.image == image).nonzero()[:, 0] for image in range(len(p.images))]
    labels = [p.objects.labels[which] for which in own]
    if isinstance(head, (hf.Mask2Former, hf.MaskFormer)):
        masks = [p.objects.masks[which].float() for which in own]
        more = {"output_hidden_states": True} if isinstance(head, hf.MaskFormer) else {}
        return model(pixel_values=p.images, mask_labels=masks, class_labels=labels, **more).loss
    boxes = p.objects.boxes / p.images.shape[-1]
    boxes = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    targets = [{"class_labels": names, "boxes": boxes[which]} for names, which in zip(labels, own, strict=True)]
    return model(pixel_values=p.images, labels=targets).loss


PROCESSORS = {
    hf.Detr: DetrImageProcessorPil,
    hf.DeformableDetr: DeformableDetrImageProcessorPil,
    hf.RTDetrV2: RTDetrImageProcessorPil,
    hf.DFine: RTDetrImageProcessorPil,
    hf.Mask2Former: Mask2FormerImageProcessorPil,
    hf.MaskFormer: MaskFormerImageProcessorPil,
}


def _their_results(head: Any, model: nn.Module, p: Problem) -> object:
    if isinstance(head, hf.UperNet):
        return model(pixel_values=p.images).logits
    sizes, processor = p.sizes.tolist(), PROCESSORS[type(head)]()
    if isinstance(head, (hf.Mask2Former, hf.MaskFormer)):
        more = {"output_hidden_states": True} if isinstance(head, hf.MaskFormer) else {}
        said = model(pixel_values=p.images, **more)
        sizes = [tuple(size) for size in sizes]
        return processor.post_process_instance_segmentation(
            said, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
    return processor.post_process_object_detection(model(pixel_values=p.images), threshold=0.0, target_sizes=p.sizes)


def measure(name: str, head: Any, args: Args) -> list[dict[str, Any]]:
    """Return one record for training and one for inference."""
    torch.manual_seed(0)
    config, backbone, own = backbones(args)
    p = problem_of(args.batch, args.pixels)
    ours = ours_of(head, own, p)
    native = type(head).__module__.startswith("synchromesh.compat")
    theirs = theirs_of(head, config, backbone, ours.model, p) if native else ours_of(head, Wrapped(backbone, own), p)
    records = []
    for kind in ("step", "inference"):
        runs = {"theirs": getattr(theirs, kind), "ours": getattr(ours, kind)}
        times = timed(runs, seconds=0.001 if args.quick else args.seconds, least=1 if args.quick else 5)
        ratio = times["theirs"] / times["ours"]
        records.append(
            {
                "head": name, "pass": "train" if kind == "step" else "infer", "batch": args.batch,
                "pixels": args.pixels, "seconds": times, "over_transformers": ratio,
                "load": [round(load, 2) for load in os.getloadavg()], "met": {"1.0x transformers": ratio >= 1.0},
            }
        )  # fmt: skip
    return records


def show(records: list[dict[str, Any]]) -> None:
    table = Table("head", "pass", title="seconds")
    for name in ("transformers", "ours", "transformers over ours", "load"):
        table.add_column(name, justify="right")
    for r in records:
        times = [f"{r['seconds'][who]:.3f}" for who in ("theirs", "ours")]
        table.add_row(r["head"], r["pass"], *times, f"{r['over_transformers']:.2f}", f"{r['load'][0]:.1f}")
    Console(width=120).print(table)


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.quick:
        args = Args(**{**vars(args), "pixels": min(args.pixels, 64)})
    unknown = [name for name in args.heads if name not in HEADS]
    if unknown:
        raise SystemExit(f"got the heads {unknown}, wanted some of {', '.join(HEADS)}")
    about, records = machine(), []
    for name in args.heads or HEADS:
        records += [{**about, **record} for record in measure(name, HEADS[name][args.quick], args)]
        if not args.quick or args.out != RESULTS:
            save(records, args.out, figure=FIGURE)
        print(f"{len(records)} figures", file=sys.stderr)
    show(records)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
