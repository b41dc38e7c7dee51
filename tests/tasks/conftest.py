"""Annotated pictures as tasks of objects read them."""

from pathlib import Path

import pytest

from synchromesh.data.coco_json import CocoJson
from synchromesh.data.images import Preprocess
from synchromesh.data.moves import RandomMoves
from synchromesh.data.object_sources import ObjectReaders
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import SceneData
from synchromesh.testing.squares import write_squares


@pytest.fixture
def squares(tmp_path: Path) -> Detection:
    """Detection with masks on small coloured squares of files, at half their size at most."""
    readers = [CocoJson(write_squares(tmp_path, part, 6), tmp_path / "images") for part in ("train", "val")]
    data = SceneData(
        ObjectReaders(*readers),
        Preprocess(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3),
        moves=RandomMoves(sizes=((32, 32), (16, 24)), scale=(0.8, 1.2)),
    )
    return Detection(data=data, head=CentreBoxes(width=16, convs=1, masks=True))
