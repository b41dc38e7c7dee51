"""CentreBoxes: a dense head that says at each place how likely an object's centre is there, and where its sides are.

One branch serves all levels of a pyramid. A peak in the map of a class is an object: there are no anchors and no
proposals, and no compiled operators are needed. After CenterNet (arXiv 1904.07850) and TTFNet (arXiv 1909.00700), with
levels by size as FCOS has them.

Shape letters: B images, N classes, M objects, H W rows and columns of a map (of an image in `images`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.models.boxes import giou, inside, suppressed
from synchromesh.models.features import Backbone
from synchromesh.models.heads.centre_masks import NUMBERS, MaskMap, Networks, found_masks, mask_loss
from synchromesh.models.heads.objects import Found, ObjectHead, ObjectModel, Objects
from synchromesh.models.heads.pyramid import FeaturePyramid

FIRST_PROBABILITY = 0.01  # of a centre, before training
BUMP_SPREAD = (
    0.18  # standard deviation of a target's bump, over the object's side; twice that of TTFNet (arXiv 1909.00700)
)
CORE_SHARE = 0.25  # of the object's sides: positions this near to its centre learn its sides
USUAL_STRIDES = 8.0  # side of the objects that a level is for, in strides of the level
DRAWN_AT_ONCE = 64  # objects whose bumps are drawn at a time: a bump has the size of a map


@dataclass(frozen=True)
class CentreBoxes(ObjectHead):
    """Settings of the head.

    Attributes:
        width: channels of the pyramid and the branch.
        convs: convolutions of the branch.
        box_weight: of the sides' loss beside the centres' one.
        overlap: IoU from which the less likely of two boxes of a class is left out.
        most: boxes of an image, at most.
        masks: whether it says masks too; then the truth needs them.
        mask_weight: of the masks' loss beside the centres' one.
    """

    width: int = 64
    convs: int = 2
    box_weight: float = 2.0
    overlap: float = 0.6
    most: int = 100
    masks: bool = False
    mask_weight: float = 1.0

    @property
    def says_masks(self) -> bool:
        return self.masks

    def build(self, backbone: Backbone, num_classes: int) -> CentreBoxDetector:
        return CentreBoxDetector(backbone, num_classes, self)

    def counts(self, objects: int, images: int) -> Mapping[str, int]:
        found = {"centre_loss": objects, "box_loss": objects}
        return {**found, "mask_loss": objects} if self.masks else found

    def weights(self) -> Mapping[str, float]:
        found = {"centre_loss": 1.0, "box_loss": self.box_weight}
        return {**found, "mask_loss": self.mask_weight} if self.masks else found


@dataclass(frozen=True)
class Level:
    """What the head says on one level of the pyramid.

    Attributes:
        heat: logit of an object's centre, for each class.
        sides: pixels from each position to the left, upper, right and lower side of its object.
        stride: pixels between two positions.
        networks: what finds an object's pixels, as `centre_masks` reads it; None of a head that says no masks.
    """

    heat: Float[Tensor, "B N H W"]
    sides: Float[Tensor, "B 4 H W"]
    stride: int
    networks: Float[Tensor, "B K H W"] | None = None


class CentreBoxDetector(ObjectModel):
    """A backbone, a pyramid and a dense head."""

    def __init__(self, backbone: Backbone, num_classes: int, settings: CentreBoxes) -> None:
        super().__init__()
        self.backbone, self.strides, self.settings = backbone, backbone.strides, settings
        self.pyramid = FeaturePyramid(backbone.widths, settings.width)
        self.head = CentreBoxHead(settings.width, num_classes, settings.convs, masks=settings.masks)
        self.mask_map = MaskMap(settings.width, len(self.strides)) if settings.masks else None

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        sizes: Int[Tensor, "B 2"],
        truth: Objects | None = None,
        *,
        least: float = 0.0,
    ) -> Mapping[str, Tensor] | list[Found]:
        maps = self.pyramid(self.backbone(images))
        levels = [self.head(x, stride) for x, stride in zip(maps, self.strides, strict=True)]
        shared = None if self.mask_map is None else self.mask_map(maps)
        if truth is None:
            return found_boxes(levels, sizes, self.settings, least=least, shared=shared)
        centres, sides = centre_losses(levels, truth)
        losses = {"centre_loss": centres, "box_loss": sides}
        return losses if shared is None else {**losses, "mask_loss": object_mask_loss(levels, truth, shared)}


class CentreBoxHead(nn.Module):
    """The branch that all levels share."""

    def __init__(self, width: int, num_classes: int, convs: int, *, masks: bool = False) -> None:
        super().__init__()
        layers = []
        for _ in range(convs):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(math.gcd(width, 8), width), nn.ReLU()]
        self.branch = nn.Sequential(*layers)
        self.heat = nn.Conv2d(width, num_classes, 3, padding=1)
        self.sides = nn.Conv2d(width, 4, 3, padding=1)
        # Nearly all positions hold no centre: to begin with one half would give a huge loss (arXiv 1708.02002).
        nn.init.normal_(self.heat.weight, std=0.01)
        nn.init.constant_(self.heat.bias, -math.log(1 / FIRST_PROBABILITY - 1))  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.sides.weight, std=0.01)
        nn.init.constant_(self.sides.bias, USUAL_STRIDES / 2)  # pyright: ignore[reportArgumentType]
        self.networks = nn.Conv2d(width, NUMBERS, 3, padding=1) if masks else None

    def forward(self, x: Float[Tensor, "B W _ _"], stride: int) -> Level:
        x = self.branch(x)
        networks = None if self.networks is None else self.networks(x).float()
        return Level(self.heat(x).float(), F.softplus(self.sides(x).float()) * stride, stride, networks)


def centre_losses(levels: Sequence[Level], objects: Objects) -> tuple[Tensor, Tensor]:
    """Return the losses of centres and of sides, each summed over the objects, in float32.

    Centres: focal loss against bumps of height 1 at the objects' centres, (1 - p)^2 log p at a centre and else
    (1 - y)^4 p^2 log(1 - p). Sides: 1 - GIoU, for each object the mean over its positions, weighted by its bump.
    """
    of_level = _levels_of(objects.boxes, [level.stride for level in levels])
    centres = torch.stack([_heat_loss(lv, objects.chosen(of_level == i)) for i, lv in enumerate(levels)]).sum()
    sides = torch.stack([_sides_loss(lv, objects.chosen(of_level == i)) for i, lv in enumerate(levels)]).sum()
    return centres, sides


def object_mask_loss(levels: Sequence[Level], objects: Objects, shared: Float[Tensor, "B C H W"]) -> Tensor:
    """Return the loss of masks, summed over the objects, in float32: each by the network at its centre."""
    if objects.masks is None:
        raise ValueError("the head says masks, and the truth has none: give Objects masks, or a head with masks=False")
    of_level = _levels_of(objects.boxes, [level.stride for level in levels])
    found = [_networks_of(level, objects.chosen(of_level == i)) for i, level in enumerate(levels)]
    order = torch.cat([(of_level == i).nonzero()[:, 0] for i in range(len(levels))])
    networks = Networks(
        torch.cat([one.numbers for one in found]),
        torch.cat([one.centre for one in found]),
        torch.cat([one.reach for one in found]),
    )
    return mask_loss(shared, objects.image[order], networks, objects.masks[order], levels[0].stride)


def found_boxes(
    levels: Sequence[Level],
    sizes: Int[Tensor, "B 2"],
    settings: CentreBoxes,
    *,
    least: float,
    shared: Float[Tensor, "B C H W"] | None = None,
) -> list[Found]:
    """Return what is found in each image, boxes cut off at its border, and masks where there are maps for them."""
    parts = [_peaks(level, number, settings.most, least) for number, level in enumerate(levels)]
    found = []
    for image, size in enumerate(sizes):
        own, places = _merged([part[image] for part in parts], size, settings)
        if shared is not None:
            networks = _networks_at(levels, image, places)
            own = dataclasses.replace(own, masks=found_masks(shared[image], networks, size, levels[0].stride))
        found.append(own)
    return found


def _networks_of(level: Level, objects: Objects) -> Networks:
    """Return the network of each object of a level, from the position that its centre is nearest to."""
    assert level.networks is not None
    column, row = _centre_cells(objects.boxes, level)
    at = objects.image, (row / level.stride).long(), (column / level.stride).long()
    numbers = level.networks.permute(0, 2, 3, 1)[at]
    reach = torch.full_like(column, USUAL_STRIDES * level.stride)
    return Networks(numbers, torch.stack([column, row], dim=1), reach)


def _levels_of(boxes: Float[Tensor, "M 4"], strides: Sequence[int]) -> Int[Tensor, " M"]:
    """Return the level of each object: the one whose usual size is nearest to its own, in powers of two."""
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=1).sqrt()
    usual = torch.tensor(strides, dtype=torch.float32, device=boxes.device) * USUAL_STRIDES
    return (size[:, None].log2() - usual.log2()[None]).abs().argmin(1)


def _heat_loss(level: Level, objects: Objects) -> Tensor:
    target = torch.zeros(level.heat.shape, device=level.heat.device)  # contiguous, which the logits need not be
    for piece in torch.arange(len(objects), device=target.device).split(DRAWN_AT_ONCE):
        own = objects.chosen(piece)
        bumps = _bumps(own.boxes, level)
        # Where bumps of one class overlap the higher one counts, whatever the order of the objects.
        map_of = (own.image * target.shape[1] + own.labels)[:, None, None].expand_as(bumps)
        target.flatten(0, 1).scatter_reduce_(0, map_of, bumps, "amax")
    centre = target == 1
    probability = level.heat.sigmoid()
    positive = (1 - probability) ** 2 * F.logsigmoid(level.heat)
    negative = (1 - target) ** 4 * probability**2 * F.logsigmoid(-level.heat)
    return -torch.where(centre, positive, negative).sum()


def _sides_loss(level: Level, objects: Objects) -> Tensor:
    if not len(objects):
        return level.sides.sum() * 0
    near = _near(objects.boxes, level)
    size = (objects.boxes[:, 2:] - objects.boxes[:, :2]).prod(1)
    # The smallest object near each position of each image: [B, H, W].
    smallest = torch.full((level.sides.shape[0], *near.shape[1:]), math.inf, device=near.device)
    sizes = torch.where(near, size[:, None, None], math.inf)
    smallest.scatter_reduce_(0, objects.image[:, None, None].expand_as(sizes), sizes, "amin")
    # A position near two objects learns the smaller one's sides.
    own = near & (size[:, None, None] == smallest[objects.image])
    which, row, column = own.nonzero(as_tuple=True)
    # Weights of an object's positions sum to 1, so that large and small objects count alike.
    weight = _bumps(objects.boxes, level)[which, row, column]
    total = torch.zeros(len(objects), device=near.device).index_add_(0, which, weight)
    sides = level.sides.permute(0, 2, 3, 1)[objects.image[which], row, column]
    boxes = _boxes_at(sides, row, column, level.stride)
    return ((1 - giou(boxes, objects.boxes[which])) * weight / total[which]).sum()


def _cells(length: int, stride: int, like: Tensor) -> Float[Tensor, " L"]:
    """Return the centres of positions along one side, in pixels."""
    return (torch.arange(length, device=like.device, dtype=torch.float32) + 0.5) * stride


def _centre_cells(boxes: Float[Tensor, "M 4"], level: Level) -> tuple[Tensor, Tensor]:
    """Return the column and row, in pixels, of the position that each centre is nearest to."""
    height, width = level.heat.shape[-2:]
    column = ((boxes[:, 0] + boxes[:, 2]) / 2 / level.stride).floor().clamp(0, width - 1)
    row = ((boxes[:, 1] + boxes[:, 3]) / 2 / level.stride).floor().clamp(0, height - 1)
    return (column + 0.5) * level.stride, (row + 0.5) * level.stride


def _bumps(boxes: Float[Tensor, "M 4"], level: Level) -> Float[Tensor, "M H W"]:
    """Return a bump for each object: 1 at its centre, falling off with its sides."""
    height, width = level.heat.shape[-2:]
    column, row = _centre_cells(boxes, level)
    spread = ((boxes[:, 2:] - boxes[:, :2]) * BUMP_SPREAD).clamp(min=level.stride / 4)
    across = (_cells(width, level.stride, boxes)[None] - column[:, None]) / spread[:, :1]
    down = (_cells(height, level.stride, boxes)[None] - row[:, None]) / spread[:, 1:]
    return (-0.5 * down**2).exp()[:, :, None] * (-0.5 * across**2).exp()[:, None, :]


def _near(boxes: Float[Tensor, "M 4"], level: Level) -> Tensor:
    """Tell which positions learn each object's sides: the one at its centre, and those in its core."""
    height, width = level.heat.shape[-2:]
    column, row = _centre_cells(boxes, level)
    reach = ((boxes[:, 2:] - boxes[:, :2]) * CORE_SHARE).clamp(min=level.stride / 2)
    across = (_cells(width, level.stride, boxes)[None] - column[:, None]).abs() < reach[:, :1]
    down = (_cells(height, level.stride, boxes)[None] - row[:, None]).abs() < reach[:, 1:]
    return down[:, :, None] & across[:, None, :]


def _boxes_at(sides: Float[Tensor, "P 4"], row: Tensor, column: Tensor, stride: int) -> Float[Tensor, "P 4"]:
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    return torch.stack([x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]], dim=1)


def _peaks(level: Level, number: int, most: int, least: float) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return boxes, scores, labels and places (level, row, column) at the highest peaks of each image."""
    probability = level.heat.sigmoid()
    # A peak is the highest of its 3 x 3 neighbours; inside a map this replaces non-maximum suppression.
    peak = F.max_pool2d(probability, 3, stride=1, padding=1) == probability
    images, classes, height, width = probability.shape
    scores = (probability * peak).reshape(images, classes * height * width)
    best = scores.topk(min(most, scores.shape[1]), dim=1)
    found = []
    for image in range(images):
        good = best.values[image] >= least
        place = best.indices[image][good]
        row, column = place % (height * width) // width, place % width  # place = (class * H + row) * W + column
        sides = level.sides[image].permute(1, 2, 0)[row, column]
        boxes, at = _boxes_at(sides, row, column, level.stride), torch.full_like(row, number)
        labels = place // (height * width)
        found.append((boxes, best.values[image][good], labels, torch.stack([at, row, column], dim=1)))
    return found


def _merged(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], size: Int[Tensor, " 2"], settings: CentreBoxes
) -> tuple[Found, Int[Tensor, "M 3"]]:
    """Return what is found in an image on all levels, and its places."""
    boxes, scores, labels, places = (torch.cat(each) for each in zip(*parts, strict=True))
    kept = (~suppressed(boxes, scores, labels, most=settings.overlap)).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)][: settings.most]
    return Found(inside(boxes[kept], size), scores[kept], labels[kept]), places[kept]


def _networks_at(levels: Sequence[Level], image: int, places: Int[Tensor, "M 3"]) -> Networks:
    """Return the networks at places of an image, in their order."""
    on, row, column = places.unbind(1)
    stride = torch.tensor([level.stride for level in levels], device=places.device)[on]
    numbers = torch.zeros(len(places), NUMBERS, device=places.device)
    for number, level in enumerate(levels):
        here = on == number
        assert level.networks is not None
        numbers[here] = level.networks[image].permute(1, 2, 0)[row[here], column[here]]
    centre = (torch.stack([column, row], dim=1) + 0.5) * stride[:, None]
    return Networks(numbers, centre, USUAL_STRIDES * stride)
