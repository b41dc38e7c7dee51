"""Cityscapes: 34 ids of the label files become the 19 classes that are trained on, objects are class x 1,000 + n."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from synchromesh.data.annotated import IGNORED, Annotated, Faults
from synchromesh.data.label_files import read_indices
from synchromesh.data.label_maps import LabelCoding, LabelMaps, by_stem, label_maps, pairs
from synchromesh.data.panoptic import PanopticPicture, Segment, SegmentMap
from synchromesh.data.picture_files import PictureFolder

# The id of each class in the files; all other ids of 0 to 33 are not trained on.
IDS = MappingProxyType(
    {
        "road": 7,
        "sidewalk": 8,
        "building": 11,
        "wall": 12,
        "fence": 13,
        "pole": 17,
        "traffic light": 19,
        "traffic sign": 20,
        "vegetation": 21,
        "terrain": 22,
        "sky": 23,
        "person": 24,
        "rider": 25,
        "car": 26,
        "truck": 27,
        "bus": 28,
        "train": 31,
        "motorcycle": 32,
        "bicycle": 33,
    }
)
THINGS = frozenset({"person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"})
_FILE_IDS = 34
_LABELS = MappingProxyType({value: label for label, value in enumerate(IDS.values())})


@dataclass(frozen=True)
class Cityscapes:
    """The folder that has leftImg8bit/ and gtFine/.

    Attributes:
        root: the folder.
        split: train, val or test.
        labels: folder of the annotations, gtFine or gtCoarse.
    """

    root: Path
    split: str = "train"
    labels: str = "gtFine"

    def load(self) -> LabelMaps:
        """List the files, and read some.

        Raises:
            InputError: a folder is missing, no picture has labels, or no label file can be used.
        """
        faults = Faults()
        ignored = dict.fromkeys((-1, *range(_FILE_IDS)), IGNORED)  # -1 is the plate of the car
        coding = LabelCoding.of({**ignored, **_LABELS}, len(IDS))
        return label_maps(f"{self.root}, {self.split}", _pairs(self, "labelIds", faults), coding, tuple(IDS), faults)


@dataclass(frozen=True)
class CityscapesPanoptic:
    """The same with objects, from the files of instance ids.

    Attributes:
        root: the folder.
        split: train, val or test.
        labels: folder of the annotations, gtFine or gtCoarse.
    """

    root: Path
    split: str = "train"
    labels: str = "gtFine"

    def load(self) -> Annotated[PanopticPicture]:
        """List the files. Raises InputError where a folder is missing, or no picture has a file of instances."""
        faults = Faults()
        found = _pairs(self, "instanceIds", faults)
        pictures = tuple(PanopticPicture(path, i + 1, InstanceIds(ids)) for i, (path, ids) in enumerate(found))
        return Annotated(
            f"{self.root}, {self.split}",
            pictures,
            tuple(IDS),
            tuple(IDS.values()),
            tuple(name in THINGS for name in IDS),
            faults=faults.found(),
        )


@dataclass(frozen=True)
class InstanceIds:
    """A file of 16 bits: objects have class x 1,000 + n, all else the id of its class; such of things are crowds.

    Attributes:
        path: of the file.
    """

    path: Path

    def read(self) -> SegmentMap:
        """Read it; what is not trained on is void. Raises UnreadableError."""
        ids = read_indices(self.path)
        segments = []
        for value in np.unique(ids).tolist():
            label = _LABELS.get(value // 1000 if value >= 1000 else value)
            if label is not None:
                crowd = value < 1000 and tuple(IDS)[label] in THINGS
                segments.append(Segment(value, label, crowd))
        return SegmentMap.of(ids, segments)


def _pairs(settings: Cityscapes | CityscapesPanoptic, what: str, faults: Faults) -> list[tuple[Path, Path]]:
    root, split, labels = settings.root, settings.split, settings.labels
    images = by_stem(PictureFolder.of(root / "leftImg8bit" / split), (".png",), "_leftImg8bit")
    return pairs(
        images, by_stem(PictureFolder.of(root / labels / split), (".png",), f"_{labels}_{what}"), faults, str(root)
    )
