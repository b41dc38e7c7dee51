"""ADE20K as the scene parsing benchmark has it (SceneParsing, ADEChallengeData2016)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from synchromesh.data.annotated import Faults
from synchromesh.data.files import SUFFIXES
from synchromesh.data.label_files import LABEL_SUFFIXES
from synchromesh.data.label_maps import LabelCoding, LabelMaps, by_stem, label_maps, pairs, values_by_stem
from synchromesh.data.picture_files import PictureFolder

CLASSES = 150
NAMES_FILE = "objectInfo150.txt"  # index, ratio, train, val and name, with tabs between, under a line of headings


@dataclass(frozen=True)
class Ade20k:
    """The folder that has images/ and annotations/. In label files 0 is unlabelled and class 0 has the value 1.

    Attributes:
        root: the folder.
        split: training or validation.
    """

    root: Path
    split: str = "training"

    def load(self) -> LabelMaps:
        """List the files, and read some. Names come from objectInfo150.txt where it is there.

        Raises:
            InputError: a folder is missing, no picture has labels, or no label file can be used.
        """
        faults, folders = (
            Faults(),
            [PictureFolder.of(self.root / part / self.split) for part in ("images", "annotations")],
        )
        found = pairs(by_stem(folders[0], SUFFIXES), values_by_stem(folders[1], LABEL_SUFFIXES), faults, str(self.root))
        coding = LabelCoding.of({0: 255, **{label + 1: label for label in range(CLASSES)}}, CLASSES)
        return label_maps(f"{self.root}, {self.split}", found, coding, _names(self.root / NAMES_FILE), faults)


def _names(path: Path) -> tuple[str, ...]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if path.is_file() else []
    names = [line.split("\t")[-1].partition(",")[0].strip() for line in lines if line.strip()]
    return tuple(names) if len(names) == CLASSES else tuple(str(value) for value in range(1, CLASSES + 1))
