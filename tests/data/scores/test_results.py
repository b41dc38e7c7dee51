import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster

from synchromesh.data.instances import Instances
from synchromesh.data.scores.boxes import ObjectScores
from synchromesh.data.scores.coco import TWELVE
from synchromesh.data.scores.results import coco_results
from synchromesh.data.scores.rle import decoded, encoded, encoded_array

CATEGORIES = (7, 1, 90, 3)  # of a file, with gaps and in an order of its own
NAMES = tuple("abcd")


def unsteady(one: Any, rng: np.random.Generator) -> Any:
    """The same picture, with boxes between pixels and scores that differ only far behind the point."""
    boxes = one.found.boxes + torch.from_numpy(rng.uniform(-0.4, 0.4, one.found.boxes.shape)).float()
    scores = (0.5 + torch.from_numpy(rng.permutation(len(one.found))) * 2.0**-23).float()
    truth = tuple(obj for obj in one.truth if obj.crowd or not obj.ignored)  # such as a file can tell of
    return dataclasses.replace(one, truth=truth, found=dataclasses.replace(one.found, boxes=boxes, scores=scores))


@pytest.fixture
def seen(pictures: Callable[..., Any]) -> list[Any]:
    rng = np.random.default_rng(3)
    return [unsteady(one, rng) for one in pictures(30, 2)]


def truth_file(seen: list[Any]) -> dict[str, Any]:
    annotations = [
        {
            "id": obj.number + 1, "image_id": one.number, "category_id": CATEGORIES[obj.label],
            "bbox": [*obj.box[:2], obj.box[2] - obj.box[0], obj.box[3] - obj.box[1]], "area": obj.area,
            "iscrowd": int(obj.crowd), "segmentation": encoded_array(obj.region.mask(one.height, one.width)),
        }
        for one in seen for obj in one.truth
    ]  # fmt: skip
    images = [{"id": one.number, "height": one.height, "width": one.width} for one in seen]
    categories = [{"id": number, "name": name} for number, name in zip(CATEGORIES, NAMES, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def judged(truth: COCO, results: list[dict[str, Any]], kind: Any) -> list[float | None]:
    judge = COCOeval_faster(truth, truth.loadRes(results), kind, print_function=lambda *_: None)
    judge.run()
    return [None if value < 0 else value for value in judge.stats]


def test_a_result_file_scores_in_other_tools_what_was_scored_here(seen: list[Any], tmp_path: Path) -> None:
    scores, results = ObjectScores(NAMES, masks=True), []
    for one in seen:
        scores.add(one.truth, one.found, height=one.height, width=one.width, number=one.number)
        results += coco_results(one.found, one.number, CATEGORIES)
    wanted = scores.numbers([scores.state()])
    assert wanted.masks is not None
    (tmp_path / "truth.json").write_text(json.dumps(truth_file(seen)))
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = COCO(tmp_path / "truth.json")
    boxes, masks, both = (json.loads((tmp_path / "results.json").read_text()) for _ in range(3))
    assert judged(truth, boxes, "bbox") == pytest.approx([wanted.boxes.twelve[name] for name in TWELVE])
    for one in masks:
        del one["bbox"]
    by_masks = [wanted.masks.twelve[name] for name in TWELVE]
    assert judged(truth, masks, "segm") == pytest.approx(by_masks)
    with_boxes = judged(truth, both, "segm")  # only the numbers by size differ, as the docstring warns
    same = [TWELVE.index(name) for name in ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")]
    assert [with_boxes[n] for n in same] == pytest.approx([by_masks[n] for n in same])
    assert with_boxes != pytest.approx(by_masks)


def test_a_result_is_plain_and_short() -> None:
    masks = torch.zeros(1, 4, 6, dtype=torch.bool)
    masks[0, 1:3, 2:5] = True
    found = Instances(torch.tensor([[0.1, 1.23456, 3.3, 7.0]]), torch.tensor([2]), torch.tensor([0.3]), masks)
    (one,) = coco_results(found, 17, CATEGORIES)
    rle = one.pop("segmentation")
    assert one == {"image_id": 17, "category_id": 90, "bbox": [0.1, 1.235, 3.2, 5.765], "score": 0.3}
    assert torch.equal(decoded([rle], 4, 6), masks)
    assert coco_results(dataclasses.replace(found, masks=None), 17, CATEGORIES) == [one]
    bare = dataclasses.replace(found, masks=None)
    assert coco_results(bare, 17, CATEGORIES, rles=encoded(masks)) == [{**one, "segmentation": rle}]
    assert coco_results(dataclasses.replace(bare, scores=torch.tensor([0.3]).bfloat16()), 1, CATEGORIES)[0][
        "score"
    ] == pytest.approx(0.3, abs=2e-3)


@pytest.mark.parametrize("bits", [0x3F7FFFFF, 0x3F7FFFFE, 0x00000001, 0x3E9A1234, 0x3F800000, 0x00000000])
def test_a_score_is_read_back_as_it_was(bits: int) -> None:
    scores = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    found = Instances(torch.zeros(1, 4), torch.tensor([0]), scores)
    (one,) = json.loads(json.dumps(coco_results(found, 1, CATEGORIES)))
    assert torch.tensor([one["score"]], dtype=torch.float32).view(torch.int32).item() == bits
    assert len(json.dumps(one["score"])) <= 13


def test_what_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="has no scores"):
        coco_results(Instances.none(), 1, CATEGORIES)
    one = Instances(torch.zeros(1, 4), torch.tensor([4]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"labels are \[4\], wanted 0 to 3"):
        coco_results(one, 1, CATEGORIES)
    with pytest.raises(ValueError, match="there are 0 masks, wanted one of each of the 1 objects"):
        coco_results(one, 1, (1, 2, 3, 4, 5), rles=[])
