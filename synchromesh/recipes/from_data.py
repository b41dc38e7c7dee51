"""A recipe for data alone: what kind they are of names the task, how large and how many they are the rest."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from synchromesh.data.ade20k import Ade20k
from synchromesh.data.annotation import AnnotatedPicture
from synchromesh.data.cityscapes import Cityscapes, CityscapesPanoptic
from synchromesh.data.coco_glance import Glance
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.coco_panoptic import CocoPanoptic
from synchromesh.data.colors import RandomColors
from synchromesh.data.depth_maps import DepthFolders
from synchromesh.data.files import header
from synchromesh.data.images import Preprocess
from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.layouts import Reader, found_in
from synchromesh.data.moves import RandomMoves
from synchromesh.data.object_sources import ObjectFiles, ObjectPictures
from synchromesh.data.pixel_sources import AnnotatedFiles
from synchromesh.data.voc import VocFolder, VocSegmentation
from synchromesh.errors import InputError
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.depth import DepthFPN
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.swin_v2_moe import DEMO
from synchromesh.recipes.demo import experts
from synchromesh.recipes.detect_demo import OPTIM
from synchromesh.tasks.depth import Depth
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import SceneData
from synchromesh.tasks.panoptic import Panoptic
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.task import Task

LOOKED_AT = 1000  # pictures whose sizes and regions are looked at
OPENED = 100  # pictures that are opened for their size
SIDES = 32, 320  # least and most pixels of an image's longer side, a multiple of the first
SMALL_SIDE = 128  # up to which two stages of the backbone are enough
SCENES_SEEN = 24_000  # in a training, whatever their number
EPOCHS = 4, 100  # least and most, but that so many steps are made:
LEAST_STEPS = 600
EVALUATIONS = 50  # in a training
BATCH = 16
COLOUR = Preprocess(channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # ImageNet's statistics
MILD = RandomColors(contrast=(0.7, 1.3), brightness=0.1, invert=0.0, permute=0.0)


def of_data(path: Path, images: Path | None) -> TrainConfig:
    """Return the recipe for a json file or a folder.

    Args:
        path: the file or folder.
        images: the folder of pictures, where the json file does not lie beside it.

    Raises:
        InputError: it is of no known layout, or of one that no recipe is chosen for.
    """
    reader = found_in(path, images=images)
    make = None if reader is None else RECIPE_OF.get(type(reader))
    if make is None:
        kind = "a folder for each class" if reader is None else type(reader).__name__
        known = ", ".join(each.__name__ for each in RECIPE_OF)
        raise InputError(f"{path} holds {kind}, for which no recipe is chosen here: data alone are enough for {known}")
    return make(reader, path, images)


def objects(reader: CocoJson | VocFolder, path: Path, images: Path | None) -> TrainConfig:
    """Return the recipe for objects, with masks where most of them have regions."""
    seen = _seen_objects(reader)
    side = _side([max(size) for size in seen.sizes])
    data = SceneData(ObjectFiles(path, images), _colour(side), moves=_moves(side), colors=MILD)
    head = CentreBoxes(masks=seen.regions)
    return _recipe("objects", Detection(data=data, head=head), side, seen.count)


def labels(reader: Reader, path: Path, images: Path | None) -> TrainConfig:
    """Return the recipe for the class of every pixel."""
    data, side, count = _pixels(reader, path, images)
    return _recipe("labels", Segmentation(data, SemanticFPN(width=64)), side, count)


def segments(reader: Reader, path: Path, images: Path | None) -> TrainConfig:
    """Return the recipe for the objects and the ground of pictures."""
    data, side, count = _pixels(reader, path, images)
    head = CentrePanoptic(CentreBoxes(masks=True), SemanticFPN(width=64))
    return _recipe("segments", Panoptic(data, head), side, count)


def distances(reader: Reader, path: Path, images: Path | None) -> TrainConfig:
    """Return the recipe for the distance of every pixel."""
    data, side, count = _pixels(reader, path, images)
    return _recipe("distances", Depth(data, DepthFPN(width=64)), side, count)


RECIPE_OF: Mapping[type, Callable[[Any, Path, Path | None], TrainConfig]] = MappingProxyType(
    {
        CocoJson: objects,
        VocFolder: objects,
        VocSegmentation: labels,
        LabelFolders: labels,
        Ade20k: labels,
        Cityscapes: labels,
        CocoPanoptic: segments,
        CityscapesPanoptic: segments,
        DepthFolders: distances,
    }
)
"""What is trained on each kind of data that `layouts.found_in` tells."""


def _recipe(name: str, task: Task, side: int, count: int) -> TrainConfig:
    """Return the recipe of a task whose images have this longer side, on so many pictures: a small SwinV2-MoE."""
    batch = max(1, min(BATCH, count // 4))
    epochs = min(EPOCHS[1], max(EPOCHS[0], round(SCENES_SEEN / max(1, count))))
    epochs = max(epochs, math.ceil(LEAST_STEPS * batch / max(1, count)))
    return TrainConfig(
        name=name,
        task=task,
        model=backbone(side),
        optim=OPTIM,
        epochs=epochs,
        batch_size=batch,
        eval_batch_size=BATCH,
        bf16=False,
        keep=Keep(evaluate_epochs=max(2, round(epochs / EVALUATIONS))),
    )


def _pixels(reader: Reader, path: Path, images: Path | None) -> tuple[PixelData, int, int]:
    """Return the data of a task with a value for every pixel, the side of its images, and how many there are."""
    if isinstance(reader, CocoPanoptic):
        seen = Glance.at(reader.annotations, reader.images)
        sizes, count = seen.sizes, seen.count
    else:
        found = reader.load()
        sizes = [header(found.pictures[place].path)[0] for place in range(min(len(found), OPENED))]
        count = len(found)
    side = _side([max(size) for size in sizes])
    data = PixelData(AnnotatedFiles(path, images), _colour(side), moves=_moves(side), colors=MILD)
    return data, side, count


def _seen_objects(reader: CocoJson | VocFolder) -> Glance:
    """Return what the recipe for objects asks of its data; a json file is not read as a whole: training will."""
    if isinstance(reader, CocoJson):
        return Glance.at(reader.annotations, reader.images)
    found: ObjectPictures = reader.load()
    pictures = [found.pictures[place] for place in range(min(len(found), LOOKED_AT))]
    sizes = tuple((one.height, one.width) for one in pictures)
    return Glance(len(found), sizes, _most_have_regions(pictures))


def _colour(side: int) -> Preprocess:
    return dataclasses.replace(COLOUR, image_size=side)


def _moves(side: int) -> RandomMoves:
    return RandomMoves(sizes=((side, side),), scale=(0.6, 1.6))


def _side(longer: list[int]) -> int:
    """Return the usual one of pictures' longer sides, in bounds."""
    usual = statistics.median(longer or [SIDES[1]])
    return min(SIDES[1], max(SIDES[0], math.ceil(usual / SIDES[0]) * SIDES[0]))


def _most_have_regions(pictures: list[AnnotatedPicture]) -> bool:
    own = [one.region is not None for picture in pictures for one in picture.objects]
    return 2 * sum(own) > len(own)


def backbone(side: int) -> SwinV2Config:
    """Return the demo's backbone, which a third stage lets see larger objects where images are large."""
    if side <= SMALL_SIDE:
        return dataclasses.replace(DEMO, experts=experts())
    blocks = ((), (1, 3), (1,))
    return dataclasses.replace(
        DEMO,
        depths=(2, 4, 2),
        num_heads=(3, 6, 12),
        experts=dataclasses.replace(experts(), blocks=blocks),
    )
