import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data.instances import Instances
from synchromesh.data.moves import Fit, Move
from synchromesh.data.scene import Scene
from synchromesh.data.scores.rle import decoded
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless, FixedCapacity, batch_prioritized
from synchromesh.moe.layer import MoE, routing_options
from synchromesh.recipes.demo import experts
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_answers import AT_ONCE, told
from synchromesh.training.task import Answer, Ask, Run

CPU = torch.device("cpu")
FACTS = {"classes": ["blue", "red"], "category_ids": [3, 7]}
TIGHT = dataclasses.replace(
    experts(), blocks=((), (0,)), num_experts=4, capacity=FixedCapacity(0.5, priority=batch_prioritized)
)
TINY = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path=0.0, experts=TIGHT)


def found(count: int, size: tuple[int, int]) -> Instances:
    height, width = size
    corners = torch.rand(count, 2) * torch.tensor([width, height]) * 0.5
    boxes = torch.cat([corners, corners + torch.tensor([width, height]) * 0.4], dim=1)
    scores = torch.rand(count).sort(descending=True).values
    return Instances(boxes, torch.arange(count) % 2, scores, torch.rand(count, height, width) < 0.5)


def test_masks_come_back_to_the_picture_the_same_however_many_are_decoded_at_once() -> None:
    move, own = Move((40, 60), (20, 30), (0.5, 0.5)), found(2 * AT_ONCE + 1, (20, 30))
    whole = told(own, (0.5, 0.5), move, whole=True)
    masks = decoded(whole.rles, 40, 60)
    wanted = own.masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(masks, wanted)
    assert torch.allclose(whole.found.boxes, own.boxes * 2)
    assert whole.found.masks is None
    few = whole.first(3)
    assert (len(few.found), len(few.rles)) == (3, 3)
    assert told(dataclasses.replace(own, masks=None), (0.5, 0.5), None, whole=False).rles is None


def test_results_have_every_digit_and_the_categories_of_the_data(squares: Detection) -> None:
    own = told(found(3, (20, 30)), (1.0, 1.0), None, whole=False)
    records = own.results([3, 7])
    assert [one["category_id"] for one in records] == [3, 7, 3]
    assert [one["score"] for one in records] == pytest.approx(own.found.scores.tolist(), rel=1e-7)
    assert all("image_id" not in one and one["segmentation"]["size"] == [20, 30] for one in records)
    assert squares.records_head({"classes": ["a", "b"]})["categories"] == [
        {"id": 1, "name": "a"},
        {"id": 2, "name": "b"},
    ]


@torch.no_grad()
def test_a_prediction_is_told_in_pixels_of_the_file_and_drawn_in_those_of_the_model(
    squares: Detection, photo, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = squares.build(squares.sized(TINY), FACTS).eval()
    sample = squares.open(photo(tmp_path / "one.png", size=(96, 48)))
    batch = squares.prepare([sample], FACTS, CPU, None)
    (answer,) = squares.predict(Run(model, model), batch, FACTS, Ask(least=0.0, top=2))
    objects = answer.said["objects"]
    assert [one["mask"]["size"] for one in objects] == [[48, 96]] * 2
    for one in objects:
        left, top, right, bottom = one["box"]
        assert 0 <= left <= right <= 96
        assert 0 <= top <= bottom <= 48
    assert [one["score"] for one in squares.records(answer, FACTS)] == pytest.approx(
        [one["probability"] for one in objects], abs=1e-4
    )
    assert Image.open(io.BytesIO(squares.draw(sample, answer))).size == (192, 96)


def test_the_picture_tints_the_pixels_of_what_was_found(squares: Detection) -> None:
    sample = Scene(torch.full((3, 24, 32), 100, dtype=torch.uint8))
    masks = torch.zeros(1, 24, 32, dtype=torch.bool)
    masks[0, 4:12, 6:20] = True
    own = Instances(torch.tensor([[0.0, 0, 31, 23]]), torch.tensor([1]), torch.tensor([0.9]), masks)
    said = told(own, (1.0, 1.0), None, whole=False).said(FACTS["classes"])
    drawn = np.array(Image.open(io.BytesIO(squares.draw(sample, Answer(said)))))
    assert drawn.shape == (144, 192, 3)
    tinted = (drawn != 100).any(2)[3:-3:6, 3:-3:6]
    assert tinted[5:12, 6:20].all()
    assert not tinted[14:22, 2:30].any()


@torch.no_grad()
@pytest.mark.parametrize("dropless", [True, False])
def test_with_a_capacity_an_image_alone_is_found_as_it_is_and_dropless_also_in_a_batch(
    squares: Detection, dropless: bool
) -> None:
    """What `eval_batch_size=1` or `--capacity 0` avoid: by a capacity, other images push an image's tokens out."""
    torch.manual_seed(0)
    task = dataclasses.replace(squares, data=dataclasses.replace(squares.data, fit=Fit(size=(32, 32))))
    model = task.build(task.sized(TINY), FACTS).eval()
    (layer,) = [module for module in model.modules() if isinstance(module, MoE)]
    assert isinstance(layer.capacity, FixedCapacity)
    samples = [task.splits(seed=0).test.read(n) for n in range(4)]
    run = Run(model, model)

    def scores(those: list[Scene]) -> torch.Tensor:
        (first, *_) = task.found(run, task.prepare(those, FACTS, CPU, None), least=0.0)
        return first.scores

    with routing_options(model, capacity=Dropless() if dropless else layer.capacity):
        alone, again, among = scores(samples[:1]), scores(samples[:1]), scores(samples)
    assert torch.equal(alone, again)
    same = len(alone) == len(among) and torch.allclose(alone, among, atol=1e-5)
    assert same == dropless
