"""The models of the detectors: transformers' own, between our backbone and the seam of `ObjectModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    PreTrainedModel,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)

from synchromesh.compat.huggingface.heads import boxes as values
from synchromesh.compat.huggingface.heads.adapter import asked, features_config, is_picture, place_of, touched
from synchromesh.compat.huggingface.heads.box_losses import (
    FloatLoss,
    Sums,
    d_fine_sums,
    deformable_sums,
    detr_sums,
    rt_detr_sums,
)
from synchromesh.compat.huggingface.heads.fields import Levels, levels_of, pyramid_fields
from synchromesh.compat.huggingface.heads.shared import keep_once
from synchromesh.models.boxes import inside
from synchromesh.models.features import Backbone, Features
from synchromesh.models.heads.objects import Found, ObjectHead, ObjectModel, Objects

FIRST_PROBABILITY = 0.01  # of an object, before training


@dataclass(frozen=True)
class Habits:
    """How a detector is asked.

    Attributes:
        sums: of its criterion.
        most: boxes of an image, at most.
        sees_padding: whether padding is a part of the image to it; then its boxes are shares of the padded image.
        one_class: whether a query is of one class, or of none; else each class of a query counts.
        picks: positions of the maps that it chooses queries from; 0 for none.
        extra: maps that it makes itself, each half of the one before.
        multiple: pixels that the sides of images are made a multiple of; 1 for any side.
    """

    sums: Sums
    most: int
    sees_padding: bool = False
    one_class: bool = False
    picks: int = 0
    extra: int = 0
    multiple: int = 1


def detr(settings: values.Detr, backbone: Backbone, num_classes: int) -> QueryDetector:
    """Return DETR's model on a backbone. Raises ValueError where the settings contradict each other."""
    config = DetrConfig(
        **_backbone(levels_of(backbone).last(1), num_classes),
        num_queries=settings.queries,
        d_model=settings.width,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.ffn,
        decoder_ffn_dim=settings.ffn,
        dropout=settings.dropout,
        eos_coefficient=settings.no_object_weight,
        auxiliary_loss=True,
    )
    habits = Habits(detr_sums, settings.queries, one_class=True)
    return QueryDetector(backbone, DetrForObjectDetection(config), settings, habits)


def deformable_detr(settings: values.DeformableDetr, backbone: Backbone, num_classes: int) -> QueryDetector:
    """Return Deformable DETR's model on a backbone. Raises ValueError where the settings contradict each other."""
    if settings.two_stage and not settings.box_refine:
        raise ValueError("two_stage is True and box_refine False, wanted both: proposals are boxes to refine")
    if settings.width % 32:
        raise ValueError(f"width is {settings.width}, wanted a multiple of 32: Deformable DETR has norms of 32 groups")
    levels = levels_of(backbone).last(settings.levels)
    config = DeformableDetrConfig(
        **_backbone(levels, num_classes),
        **pyramid_fields(levels, DeformableDetrConfig, extra=settings.extra_levels),
        num_queries=settings.queries,
        two_stage_num_proposals=settings.queries,
        d_model=settings.width,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        encoder_attention_heads=settings.heads,
        decoder_attention_heads=settings.heads,
        encoder_ffn_dim=settings.ffn,
        decoder_ffn_dim=settings.ffn,
        encoder_n_points=settings.points,
        decoder_n_points=settings.points,
        dropout=settings.dropout,
        with_box_refine=settings.box_refine,
        two_stage=settings.two_stage,
        auxiliary_loss=True,
        tie_word_embeddings=not settings.box_refine and settings.decoder_layers > 1,  # one cannot be tied to itself
    )
    picks = settings.queries if settings.two_stage else 0
    habits = Habits(deformable_sums, settings.most, picks=picks, extra=settings.extra_levels)
    network = DeformableDetrForObjectDetection(config)
    network = _refining(network) if settings.box_refine else network
    _start_deformable(network, two_stage=settings.two_stage)
    return QueryDetector(backbone, network, settings, habits)


def rt_detr_v2(settings: values.RTDetrV2, backbone: Backbone, num_classes: int) -> QueryDetector:
    """Return RT-DETRv2's model on a backbone. Raises ValueError where the settings contradict each other."""
    config = RTDetrV2Config(
        **_hybrid(settings, backbone, num_classes, RTDetrV2Config), decoder_n_points=settings.points
    )
    habits = _hybrid_habits(rt_detr_sums, settings, backbone)
    return QueryDetector(backbone, _refining(RTDetrV2ForObjectDetection(config)), settings, habits)


def d_fine(settings: values.DFine, backbone: Backbone, num_classes: int) -> QueryDetector:
    """Return D-FINE's model on a backbone. Raises ValueError where the settings contradict each other."""
    config = DFineConfig(**_hybrid(settings, backbone, num_classes, DFineConfig), max_num_bins=settings.bins)
    habits = _hybrid_habits(d_fine_sums, settings, backbone)
    return QueryDetector(backbone, _refining(DFineForObjectDetection(config)), settings, habits)


@final
class QueryDetector(ObjectModel):
    """A backbone, and a transformers detector that sees its features."""

    def __init__(self, backbone: Backbone, network: PreTrainedModel, settings: ObjectHead, habits: Habits) -> None:
        super().__init__()
        self.backbone, self.network, self.settings, self.habits = backbone, network, settings, habits
        self.place, self.names = place_of(network), tuple(settings.weights())
        self.levels = len(network.get_submodule(self.place).config.widths)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        network.loss_function = FloatLoss(habits.sums, settings)
        keep_once(self)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        *,
        least: float = 0.0,
    ) -> Mapping[str, Tensor] | list[Found]:
        images = _filled_up(images, self.habits.multiple)
        features = self.backbone(images)
        if not len(images):
            zero = features.last.float().sum() * 0 + touched(self.network)
            return [] if truth is None else {name: zero for name in self.names}  # noqa: C420 - for the type checker
        scale = self._scale(images, sizes)
        if truth is None:
            said = self._asked(features, images, sizes)
            return found_boxes(said.logits.float(), said.pred_boxes.float() * scale, sizes, self.habits, least=least)
        sums = self._asked(features, images, sizes, labels=targets_of(truth, scale)).loss_dict
        zero = touched(self.network)
        return {name: sums[name] + zero for name in self.names}

    def _asked(self, features: Features, images: Tensor, sizes: Tensor, **more: Any) -> Any:
        there = _positions(features.maps[-self.levels :], self.habits.extra)
        if there < self.habits.picks:
            raise ValueError(
                f"the maps of such an image have {there} positions, wanted {self.habits.picks} at least, one for each "
                f"query: give {type(self.settings).__name__} fewer queries, or larger images"
            )
        if not self.habits.sees_padding:
            more["pixel_mask"] = is_picture(images, sizes)
        return asked(self.network, self.place, features, pixel_values=images, **more)

    def _scale(self, images: Tensor, sizes: Tensor) -> Float[Tensor, "B 1 4"]:
        """Return width and height, twice, of what each image's boxes are shares of."""
        height, width = images.shape[2:]
        of = torch.tensor([height, width], device=images.device).expand_as(sizes) if self.habits.sees_padding else sizes
        return of.flip(1).repeat(1, 2)[:, None].float()


def _positions(maps: Sequence[Tensor], extra: int) -> int:
    """Return how many positions maps have, and those that are made of the last one."""
    sizes = [(x.shape[2], x.shape[3]) for x in maps]
    for _ in range(extra):
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sum(height * width for height, width in sizes)


def _hybrid_habits(sums: Sums, settings: values.RTDetrV2 | values.DFine, backbone: Backbone) -> Habits:
    # Their encoder doubles maps, and adds them to the next finer ones, which must be just twice as large.
    return Habits(
        sums, settings.most, sees_padding=True, picks=settings.queries, multiple=levels_of(backbone).strides[-1]
    )


def _backbone(levels: Levels, num_classes: int) -> dict[str, Any]:
    no_other = {"use_timm_backbone": False, "use_pretrained_backbone": False}
    return {"backbone_config": features_config(levels), **no_other, "num_labels": num_classes}


def _refining(network: Any) -> Any:
    """Let what reads the decoder be what the decoder refines by: one for each layer, as in the papers.

    transformers makes all of these one, unless a checkpoint holds different ones.
    """
    for name in ("class_embed", "bbox_embed"):
        own = getattr(network.model.decoder, name, None)
        if own is not None:
            setattr(network, name, own)
    return network


@torch.no_grad()
def _start_deformable(network: Any, *, two_stage: bool) -> None:
    """Give the last layers their first weights as in the paper's code, which transformers leaves out.

    Nothing is likely at first: half a probability everywhere would give a huge focal loss (arXiv 1708.02002).
    """
    for layer in network.class_embed:
        layer.bias.fill_(-math.log(1 / FIRST_PROBABILITY - 1))
    for layer in network.bbox_embed:
        layer.layers[-1].weight.zero_()
        layer.layers[-1].bias.zero_()
    if not two_stage:
        network.bbox_embed[0].layers[-1].bias[2:] = -2.0


def _hybrid(
    settings: values.RTDetrV2 | values.DFine, backbone: Backbone, num_classes: int, of: type[Any]
) -> dict[str, Any]:
    """Return the fields that RT-DETRv2 and D-FINE share."""
    levels = levels_of(backbone).last(settings.levels)
    return {
        "backbone_config": features_config(levels),
        **pyramid_fields(levels, of, width=settings.width, points=settings.points),
        "num_queries": settings.queries,
        "d_model": settings.width,
        "encoder_hidden_dim": settings.width,
        "encoder_layers": settings.encoder_layers,
        "decoder_layers": settings.decoder_layers,
        "encoder_attention_heads": settings.heads,
        "decoder_attention_heads": settings.heads,
        "encoder_ffn_dim": settings.ffn,
        "decoder_ffn_dim": settings.ffn,
        "num_denoising": settings.denoising,
        "tie_word_embeddings": False,
        "num_labels": num_classes,
    }


def _filled_up(images: Float[Tensor, "B C H W"], multiple: int) -> Float[Tensor, "B C _ _"]:
    bottom, right = (-side % multiple for side in images.shape[2:])
    return F.pad(images, (0, right, 0, bottom)) if bottom or right else images


def targets_of(truth: Objects, scale: Float[Tensor, "B 1 4"]) -> list[dict[str, Tensor]]:
    """Return the objects of each image as transformers wants them: centre, width and height as shares."""
    centres = torch.cat([(truth.boxes[:, :2] + truth.boxes[:, 2:]) / 2, truth.boxes[:, 2:] - truth.boxes[:, :2]], dim=1)
    shares = centres.float() / scale[truth.image, 0]
    own = [(truth.image == image).nonzero()[:, 0] for image in range(len(scale))]
    return [{"class_labels": truth.labels[which], "boxes": shares[which]} for which in own]


def found_boxes(
    logits: Float[Tensor, "B Q N"],
    boxes: Float[Tensor, "B Q 4"],
    sizes: Int[Tensor, "B 2"],
    habits: Habits,
    *,
    least: float,
) -> list[Found]:
    """Return what queries found, from their logits and their boxes in pixels: centre, width and height."""
    if habits.one_class:  # the last class is none
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, query = scores.sort(dim=1, descending=True, stable=True)
        labels = labels.gather(1, query)
    else:
        classes = logits.shape[2]
        scores, place = logits.sigmoid().flatten(1).sort(dim=1, descending=True, stable=True)
        query, labels = place // classes, place % classes
    half = boxes[..., 2:] / 2
    corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=2)
    found = []
    for image, size in enumerate(sizes):
        kept = (scores[image, : habits.most] >= least).nonzero()[:, 0]
        own = inside(corners[image, query[image, kept]], size)
        found.append(Found(own, scores[image, kept], labels[image, kept]))
    return found
