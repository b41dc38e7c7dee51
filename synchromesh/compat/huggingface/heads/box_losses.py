"""What transformers' detectors lose, as sums by name over all decoder layers, in float32 whatever autocast says.

transformers gives means over the boxes of the batch (of all ranks, where accelerate runs, by a collective that each
rank must join). Here its criteria are asked for sums, which `counts` makes means again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.loss.loss_d_fine import DFineForObjectDetectionLoss
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from synchromesh.compat.huggingface.heads.adapter import in_float32
from synchromesh.models.heads.objects import ObjectHead

Targets = Sequence[Mapping[str, Tensor]]
"""For each image its `class_labels` and `boxes`: centre, width and height as shares of the image."""
Sums = Callable[..., dict[str, Tensor]]
"""(logits, targets, device, boxes, config, logits of layers, boxes of layers, ...) -> sums by name."""


class FloatLoss:
    """Stands for the `loss_function` of a transformers detector; it returns no mean, but sums in the `loss_dict`.

    Where what the network says is not finite, so are the losses: the training loop then names the layer that it comes
    from, while transformers' criteria would stop at boxes that are none.

    Args:
        sums: of the criterion.
        head: says the names of its losses.
    """

    def __init__(self, sums: Sums, head: ObjectHead) -> None:
        self.sums, self.names = sums, tuple(head.weights())

    def __call__(
        self, logits: Tensor, labels: Targets, device: Any, pred_boxes: Tensor, *more: Any, **named: Any
    ) -> tuple[None, dict[str, Tensor], None]:
        with torch.autocast(logits.device.type, enabled=False):
            logits, pred_boxes, more, named = in_float32((logits, pred_boxes, more, named))
            if not bool(logits.isfinite().all() & pred_boxes.isfinite().all()):
                bad = (logits.sum() + pred_boxes.sum()) * torch.nan
                return None, dict.fromkeys(self.names, bad), None
            return None, self.sums(logits, labels, device, pred_boxes, *more, **named), None


def detr_sums(
    logits: Tensor, targets: Targets, device: Any, boxes: Tensor, config: Any, *layers: Tensor, **_: Any
) -> dict[str, Tensor]:
    """Return DETR's sums. That of classes is a mean, times the weights of all queries in hundredths, per layer."""
    from synchromesh.compat.huggingface.heads.boxes import query_weight

    matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = ImageLoss(matcher, config.num_labels, config.eos_coefficient, [])
    objects = sum(len(each["class_labels"]) for each in targets)
    whole = query_weight(objects, len(targets), queries=config.num_queries, no_object=config.eos_coefficient)
    classes, sides = _layer_sums(criterion.to(logits.device), logits, targets, boxes, config, layers)
    return {"class_loss": classes * whole, "box_loss": sides}


def deformable_sums(
    logits: Tensor, targets: Targets, device: Any, boxes: Tensor, config: Any, *layers: Tensor, **_: Any
) -> dict[str, Tensor]:
    """Return Deformable DETR's sums: focal losses of all queries, and the losses of boxes."""
    matcher = DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = DeformableDetrImageLoss(matcher, config.num_labels, config.focal_alpha, [])
    classes, sides = _layer_sums(criterion.to(logits.device), logits, targets, boxes, config, layers)
    return {"class_loss": classes, "box_loss": sides}


def rt_detr_sums(logits: Tensor, targets: Targets, device: Any, boxes: Tensor, *more: Any, **named: Any) -> Any:
    """Return RT-DETR's sums, those of the encoder's proposals and of the noisy queries included."""
    _, means, _ = RTDetrForObjectDetectionLoss(logits, targets, device, boxes, *more, **named)
    return _of_hybrid(means, targets)


def d_fine_sums(logits: Tensor, targets: Targets, device: Any, boxes: Tensor, *more: Any, **named: Any) -> Any:
    """Return D-FINE's sums: RT-DETR's, and that of layers that learn from the last one, over images."""
    _, means, _ = DFineForObjectDetectionLoss(logits, targets, device, boxes, *more, **named)
    learnt = [value for name, value in means.items() if "ddf" in name]
    distilled = torch.stack(learnt).sum() if learnt else boxes.sum() * 0
    return {**_of_hybrid(means, targets), "distillation_loss": distilled * len(targets)}


def _layer_sums(
    criterion: ImageLoss,
    logits: Tensor,
    targets: Targets,
    boxes: Tensor,
    config: PreTrainedConfig,
    layers: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the losses of classes and of boxes, over the decoder's layers; each layer is matched by itself."""
    each = [(logits, boxes)]
    if config.auxiliary_loss:  # pyright: ignore[reportAttributeAccessIssue]
        each += list(zip(layers[0][:-1], layers[1][:-1], strict=True))
    classes, sides = [], []
    for own_logits, own_boxes in each:
        own = {"logits": own_logits, "pred_boxes": own_boxes}
        indices = criterion.matcher(own, targets)
        classes.append(criterion.loss_labels(own, targets, indices, 1)["loss_ce"])
        found = criterion.loss_boxes(own, targets, indices, 1)
        sides += [
            found["loss_bbox"] * config.bbox_loss_coefficient,  # pyright: ignore[reportAttributeAccessIssue]
            found["loss_giou"] * config.giou_loss_coefficient,  # pyright: ignore[reportAttributeAccessIssue]
        ]
    return torch.stack(classes).sum(), torch.stack(sides).sum()


def _of_hybrid(means: Mapping[str, Tensor], targets: Targets) -> dict[str, Tensor]:
    """Return sums of what is weighted already and divided by the boxes of the batch, or by 1 if there are none."""
    boxes = max(1, sum(len(each["class_labels"]) for each in targets))
    classes = torch.stack([value for name, value in means.items() if "vfl" in name]).sum()
    sides = [value for name, value in means.items() if any(part in name for part in ("bbox", "giou", "fgl"))]
    return {"class_loss": classes * boxes, "box_loss": torch.stack(sides).sum() * boxes}
