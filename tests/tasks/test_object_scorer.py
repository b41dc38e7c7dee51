import dataclasses
import json
from pathlib import Path

import pytest
import torch

from synchromesh.data.moves import Fit
from synchromesh.data.scene import instances
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.objects import Found
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import Scenes
from synchromesh.training.task import Run, Scores, Splits

CPU = torch.device("cpu")


def saying(batch: Scenes, *, everything: bool = False) -> Run:
    """A run whose model says what is true of every scene in the scene's own pixels, of the ignored too if wanted."""

    def called(images: torch.Tensor, sizes: torch.Tensor, truth: None = None, *, least: float) -> list[Found]:
        found = []
        for picture, move, (height, width) in zip(batch.pictures, batch.moves, batch.sizes, strict=True):
            objects = [dataclasses.replace(one, ignored=False) if everything else one for one in picture.objects]
            own = instances(objects, move, masks=False)
            masks = torch.zeros(len(own), height, width, dtype=torch.bool)
            for mask, box in zip(masks, own.boxes.round().long().tolist(), strict=True):
                mask[box[1] : box[3], box[0] : box[2]] = True
            found.append(Found(own.boxes, torch.full((len(own),), 0.9), own.labels, masks))
        return found

    model = torch.nn.Linear(1, 1)
    return Run(model, called)


def scored(task: Detection, *, everything: bool = False, parts: int = 1) -> Scores:
    splits: Splits = task.splits(seed=0)
    samples = [splits.test.read(n) for n in range(len(splits.test))]
    scorers = []
    for part in range(parts):
        batch = task.prepare(samples[part::parts], splits.facts, CPU, None)
        scorers.append(task.scorer(splits.facts))
        scorers[-1].add(saying(batch, everything=everything), batch)
    return scorers[0].scores([one.state() for one in scorers])


def test_boxes_and_masks_are_scored_in_the_pixels_of_the_picture_as_it_was(squares: Detection) -> None:
    larger = dataclasses.replace(squares, data=dataclasses.replace(squares.data, fit=Fit(longer=256)))
    found = scored(larger)
    assert found.numbers == {number.name: 1 for number in squares.numbers}
    assert (found.details["boxes"]["APs"], found.details["boxes"]["APl"]) == (1, None)
    smaller = scored(squares)
    assert [smaller.numbers[name] for name in ("AP", "AP50", "mask_AP50")] == [1, 1, 1]
    assert smaller.numbers["mask_AP"] < 1  # at half the size no mask is exact


def test_the_scores_of_ranks_are_those_of_all_pictures(squares: Detection) -> None:
    assert scored(squares, parts=3) == scored(squares)


def test_the_numbers_are_those_of_the_head(squares: Detection) -> None:
    boxes = dataclasses.replace(squares, head=CentreBoxes())
    assert [number.name for number in boxes.numbers] == ["AP", "AP50", "AP75"]
    assert [number.name for number in squares.numbers][3:] == ["mask_AP", "mask_AP50", "mask_AP75"]
    assert scored(boxes).numbers == {"AP": 1, "AP50": 1, "AP75": 1}


@pytest.mark.parametrize("change", [{"iscrowd": 1}, {"segmentation": []}])
def test_crowds_and_with_masks_what_has_no_region_are_neither_missed_nor_wrong_when_found(
    squares: Detection, tmp_path: Path, change: dict[str, object]
) -> None:
    path = tmp_path / "instances_val.json"
    found = json.loads(path.read_text())
    found["annotations"][0] |= change
    path.write_text(json.dumps(found))
    for everything in (True, False):
        scores = scored(squares, everything=everything)
        assert (scores.numbers["AP"], scores.details["objects"]) == (1, len(found["annotations"]) - 1)
    if "segmentation" in change:
        boxes = dataclasses.replace(squares, head=CentreBoxes())
        assert scored(boxes).details["objects"] == len(found["annotations"])
