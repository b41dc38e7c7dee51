"""Answers to every pixel as files of values: COCO's tools, and our own reader, find in them what was told."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.commands.results import Segments as Layout
from synchromesh.data.coco_panoptic import CocoPanoptic
from synchromesh.data.depth_maps import DepthFolders, DepthPng
from synchromesh.data.pixel_sources import AnnotatedFiles, ReaderPair
from synchromesh.models.heads.panoptic import Segments
from synchromesh.tasks.depth import Depth
from synchromesh.tasks.panoptic import Panoptic
from synchromesh.tasks.pixels import PixelData
from synchromesh.training.task import Answer, Ask, Run

FACTS = {"classes": ["sky", "cat"], "things": [False, True], "category_ids": [90, 7]}
IDS = [[1, 1, 2, 2], [3, 3, 0, 2]]


def answer_of(ask: Ask) -> Answer:
    """What is said of a picture with a sky, two cats of which one is unlikely, and a pixel of no segment."""
    task, found = (
        Panoptic(),
        Segments(torch.tensor(IDS, dtype=torch.int32), torch.tensor([0, 1, 1]), torch.tensor([0.9, 0.8, 0.2])),
    )
    batch = task.prepare([], FACTS, torch.device("cpu"), None)
    object.__setattr__(batch, "moves", (None,))
    (answer,) = task.predict(Run(torch.nn.Identity(), lambda *_: [found]), batch, FACTS, ask)
    return answer


@pytest.mark.parametrize(("ask", "kept"), [(Ask(), (1, 2, 3)), (Ask(least=0.5), (1, 2)), (Ask(top=1), (1,))])
def test_segments_come_back_by_the_reader_of_cocos_panoptic_files(
    tmp_path: Path, ask: Ask, kept: tuple[int, ...]
) -> None:
    task, answer, picture = Panoptic(), answer_of(ask), tmp_path / "photos" / "a.jpg"
    picture.parent.mkdir()
    Image.new("RGB", (4, 2)).save(picture)
    layout = Layout(task.values_folder, {picture: tmp_path / "a"})
    records = [{"image_id": 5, **layout.of_file(picture), **one} for one in task.records(answer, FACTS)]
    ((name, content),) = layout.files(records, {picture: 5}, task.records_head(FACTS)).items()
    assert name == "panoptic_predictions.json"
    (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "panoptic_predictions").mkdir()
    (tmp_path / "panoptic_predictions" / "a.png").write_bytes(task.values(answer, FACTS))
    found = CocoPanoptic(tmp_path / name, tmp_path / "panoptic_predictions", picture.parent).load()
    assert (found.classes, found.things, found.category_ids) == (("cat", "sky"), (True, False), (7, 90))
    assert found.notes() == ()
    _, segments = found.pictures[0].opened(3)
    assert [one.id for one in segments.segments] == list(kept)
    assert [found.classes[one.label] for one in segments.segments] == ["sky", "cat", "cat"][: len(kept)]
    ids = np.array([*(one.id for one in segments.segments), 0])[segments.numbers]
    assert ids.tolist() == [[value if value in kept else 0 for value in row] for row in IDS]


def test_a_segments_area_and_box_are_those_of_its_pixels() -> None:
    ((first, second, third),) = (one["segments_info"] for one in Panoptic().records(answer_of(Ask()), FACTS))
    assert (first["area"], first["bbox"], first["category_id"]) == (2, [0, 0, 2, 1], 90)
    assert (second["area"], second["bbox"], second["category_id"]) == (3, [2, 0, 2, 2], 7)
    assert (third["area"], third["bbox"], third["score"]) == (2, [0, 1, 2, 1], 0.2)


def test_distances_have_the_unit_of_the_files_that_were_learnt_from(tmp_path: Path) -> None:
    kitti = DepthFolders(tmp_path, tmp_path, scale=1 / 256)
    tasks = {1 / 256: ReaderPair(kitti, kitti), 1 / 1000: AnnotatedFiles(tmp_path)}
    answer = Answer({}, torch.tensor([[1.5, 20.25]]))
    for scale, source in tasks.items():
        task = Depth(PixelData(source))
        assert task.values_about({}) == {"metres_of_one": scale, "unknown": 0}
        (tmp_path / "a.png").write_bytes(task.values(answer, {}))
        assert DepthPng(tmp_path / "a.png", scale).read().metres == pytest.approx(answer.seen.numpy(), abs=scale / 2)
