"""MultiTaskModel: one backbone, and for each dense task a pyramid and a map of its own.

A backbone that knows tasks (`TaskTrunk`) gives each its own features; of any other, all tasks see the same ones.

Shape letters: B images, N channels of a map, H W rows and columns of an image.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.adapt.task_trunk import TaskTrunk
from synchromesh.models.features import Backbone, Features
from synchromesh.models.heads.joined import JoinedPyramid
from synchromesh.models.heads.semantic import enlarged


class PyramidMap(nn.Module):
    """Features to a map at the images' size: the levels of a pyramid summed at the finest stride, and a linear layer.

    Args:
        backbone: whose features it sees.
        width: of the pyramid.
        channels: of the map.
    """

    def __init__(self, backbone: Backbone, width: int, channels: int) -> None:
        super().__init__()
        self.joined = JoinedPyramid(backbone.widths, width)
        self.out = nn.Conv2d(width, channels, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, features: Features, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N H W"]:
        return enlarged(self.out(self.joined(features)), images)


class MultiTaskModel(nn.Module):
    """A backbone, in the attribute `backbone`, and heads by the names of tasks.

    Args:
        backbone: of all tasks.
        channels: of the map of each task.
        width: of each head.
    """

    def __init__(self, backbone: Backbone, channels: Mapping[str, int], *, width: int) -> None:
        super().__init__()
        self.backbone: nn.Module = backbone
        self.heads = nn.ModuleDict({task: PyramidMap(backbone, width, count) for task, count in channels.items()})

    def forward(self, images: Float[Tensor, "B C H W"]) -> dict[str, Float[Tensor, "B _ H W"]]:
        """Return the map of each task, in float32.

        Raises:
            ValueError: the backbone knows tasks, and not these; or in training others, for which nothing would learn.
        """
        seen = features_of_tasks(self.backbone, images, tuple(self.heads))
        idle = sorted(set(getattr(self.backbone, "tasks", ())) - set(self.heads))
        if idle and self.training:
            raise ValueError(
                f"the backbone learns for {', '.join(idle)}, which have no head: wanted the same tasks in both"
            )
        return {task: head(seen[task], images) for task, head in self.heads.items()}


def features_of_tasks(
    backbone: nn.Module, images: Float[Tensor, "B C H W"], tasks: tuple[str, ...]
) -> dict[str, Features]:
    """Return what each task sees.

    Raises:
        ValueError: the backbone knows tasks, and not these.
    """
    if not isinstance(backbone, TaskTrunk):
        seen: Features = backbone(images)
        return dict.fromkeys(tasks, seen)
    unknown = sorted(set(tasks) - set(backbone.tasks))
    if unknown:
        raise ValueError(f"the backbone was adapted for the tasks {list(backbone.tasks)}, and not for {unknown}")
    own: dict[str, Features] = backbone.of_tasks(images)
    return {task: own[task] for task in tasks}


def balanced_cross_entropy(logits: Float[Tensor, "B H W"], truth: Tensor) -> Float[Tensor, ""]:
    """Return the sum of the binary cross-entropy over known pixels, both answers weighing the same in each image.

    A pixel of an image with n known pixels, m of them with the same answer, weighs n / 2 m; all of an image with one
    answer only weigh 1/2. The weights of an image so add up to its known pixels at most, and parts of a batch add up.

    Args:
        logits: of a yes.
        truth: [B, H, W], 1 for yes, 0 for no, less where nobody knows.
    """
    known, yes = truth >= 0, truth > 0
    total, ones = known.flatten(1).sum(1), yes.flatten(1).sum(1)
    of_yes = total / (2 * ones.clamp(min=1))
    of_no = total / (2 * (total - ones).clamp(min=1))
    weight = torch.where(yes, of_yes[:, None, None], of_no[:, None, None]) * known
    loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), yes.float(), reduction="none")
    return (loss * weight).sum()
