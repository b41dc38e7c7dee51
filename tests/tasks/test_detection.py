import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data.images import Preprocess
from synchromesh.data.instances import Instances
from synchromesh.data.pictures import TRUTH
from synchromesh.data.scene import Scene
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.scores.boxes import NO_SIZE, Drawn, Seen
from synchromesh.models.heads.objects import Found
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.tasks.detection import LEAST_TOLD, Detection
from synchromesh.tasks.object_batch import SceneData, Scenes
from synchromesh.tasks.object_scorer import merit as merit_of
from synchromesh.training.task import Answer, Ask, Run

CPU = torch.device("cpu")
FACTS = {"classes": ["cat", "dog"]}
TASK = Detection(data=SceneData(ComposedScenes(train=4, test=3), Preprocess(image_size=32, channels=1)))
TINY = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4, drop_path=0.0)
BOX = [4.0, 8.0, 20.0, 24.0]


def scene(*objects: tuple[int, list[float]], size: tuple[int, int] = (32, 32), known: bool = True) -> Scene:
    boxes = torch.tensor([box for _, box in objects]).reshape(-1, 4)
    truth = Instances(boxes, torch.tensor([label for label, _ in objects], dtype=torch.int64))
    return Scene(torch.randint(0, 256, (1, *size), dtype=torch.uint8), truth if known else None)


def batch_of(*scenes: Scene) -> Scenes:
    return TASK.prepare(scenes, FACTS, CPU, None)


def built() -> Run:
    model = TASK.build(TASK.sized(TINY), FACTS).eval()
    return Run(model, model)


def saying(model: torch.nn.Module, batch: Scenes, *, sure: float = 0.95) -> Run:
    """A run whose model says of every picture just what is true of it."""

    def called(images: torch.Tensor, sizes: torch.Tensor, truth: None = None, *, least: float) -> list[Found]:
        known = zip(batch.boxes[: len(images)], batch.labels, strict=False)
        seen = [Found(boxes, torch.full((len(boxes),), sure), labels) for boxes, labels in known]
        return [one if sure >= least else Found(one.boxes[:0], one.scores[:0], one.labels[:0]) for one in seen]

    return Run(model, called)


def test_pictures_of_several_sizes_are_padded_at_the_right_and_at_the_bottom() -> None:
    scenes = (scene((0, BOX), size=(32, 24)), scene(size=(20, 32)))
    batch = batch_of(*scenes)
    assert batch.images.shape == (2, 1, 32, 32)
    assert batch.sizes == ((32, 24), (20, 32))
    mean, std = TASK.data.preprocess.mean[0], TASK.data.preprocess.std[0]
    for image, own, (height, width) in zip(batch.images, scenes, batch.sizes, strict=True):
        assert torch.allclose(image[:, :height, :width], (own.image / 255 - mean) / std, atol=1e-6)
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
    assert batch.boxes[0].tolist() == [BOX]


def test_objects_say_which_picture_they_are_in_also_where_some_have_none() -> None:
    batch = batch_of(scene(), scene((1, BOX), (0, [0.0, 0, 9, 9])), scene(), scene((0, BOX)))
    found = batch.objects()
    assert found.image.tolist() == [1, 1, 3]
    assert found.labels.tolist() == [1, 0, 0]
    assert batch.part(1, 4).objects().image.tolist() == [0, 0, 2]
    assert len(batch.part(2, 3).objects()) == 0
    assert len(batch_of().objects()) == 0


@torch.no_grad()
def test_counts_and_losses_of_the_parts_of_a_batch_add_up_to_those_of_all() -> None:
    run, batch = built(), batch_of(scene(), scene((1, BOX), (0, [0.0, 0, 9, 9])), scene((0, BOX)), scene())
    parts = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)]
    whole = TASK.loss(run, batch)
    assert whole.keys() == TASK.counts(batch).keys()
    for name, term in whole.items():
        assert sum(TASK.counts(one)[name] for one in parts) == TASK.counts(batch)[name] == 3
        total = sum(float(TASK.loss(run, one)[name].total) for one in parts)
        assert total == pytest.approx(float(term.total), rel=1e-5)
        assert term.weight == (1.0 if name == "centre_loss" else TASK.head.box_weight)


@torch.no_grad()
def test_a_model_that_says_what_is_true_scores_one_and_one_that_says_nothing_zero() -> None:
    batch = batch_of(scene((1, BOX)), scene(), scene((0, BOX), (1, [20.0, 2, 31, 12])))
    model = built().model
    right, none = TASK.scorer(FACTS), TASK.scorer(FACTS)
    assert right.add(saying(model, batch), batch) == pytest.approx([1, 1, 1])
    assert none.add(saying(model, batch_of(scene(), scene(), scene())), batch) == [0, 1, 0]
    found = right.scores([right.state()])
    assert found.numbers == {"AP": 1, "AP50": 1, "AP75": 1}
    assert (found.details["AP_by_class"], found.details["objects"]) == ({"cat": 1, "dog": 1}, 3)
    assert none.scores([none.state()]).numbers == {"AP": 0, "AP50": 0, "AP75": 0}


@torch.no_grad()
def test_the_scores_of_ranks_are_those_of_all_scenes() -> None:
    batch = batch_of(*(scene((i % 2, BOX), (1, [0.0, 0, 9, 9])) for i in range(5)))
    noisy = dataclasses.replace(batch, boxes=tuple(b + torch.rand_like(b) * 6 for b in batch.boxes))
    run = saying(built().model, noisy)
    whole = TASK.scorer(FACTS)
    whole.add(run, batch)
    ranks = [TASK.scorer(FACTS) for _ in range(3)]
    for rank, (start, stop) in enumerate([(0, 2), (2, 5), (5, 5)]):
        ranks[rank].add(saying(run.model, noisy.part(start, stop)), batch.part(start, stop))
    got, wanted = ranks[0].scores([one.state() for one in ranks]), whole.scores([whole.state()])
    assert got == wanted
    assert 0 < wanted.numbers["AP"] < 1


@torch.no_grad()
def test_scenes_are_scored_in_the_pixels_that_they_had_before_they_were_shrunk() -> None:
    batch = dataclasses.replace(batch_of(scene((1, BOX))), scales=((0.25, 0.25),))  # 64 x 64 pixels are no small ones
    scorer = TASK.scorer(FACTS)
    scorer.add(saying(built().model, batch), batch)
    boxes = scorer.scores([scorer.state()]).details["boxes"]
    assert (boxes["APs"], boxes["APm"], boxes["APl"]) == (None, 1, None)
    (seen,) = scorer.state()
    assert (seen.height, seen.width) == (128, 128)
    assert seen.truth.boxes.tolist() == seen.found.boxes.tolist() == [[16, 32, 80, 96]]


def test_the_merit_of_a_scene_falls_with_wrong_missing_and_loose_boxes() -> None:
    def drawn(*objects: tuple[int, list[float], float]) -> Drawn:
        boxes = torch.tensor([box for _, box, _ in objects]).reshape(-1, 4)
        labels = torch.tensor([label for label, _, _ in objects], dtype=torch.int64)
        return Drawn(boxes, labels, torch.tensor([value for *_, value in objects]))

    def merit(*found: tuple[int, list[float], float], crowd: list[float] | None = None) -> float:
        truth = drawn((1, BOX, 144.0), *([] if crowd is None else [(1, crowd, float(NO_SIZE))]))
        truth = dataclasses.replace(truth, crowd=truth.values == NO_SIZE)
        return merit_of(Seen(32, 32, truth, drawn(*found)), least=LEAST_TOLD)

    far = [0.0, 0.0, 3.0, 3.0]
    assert merit((1, BOX, 0.9)) == 1
    assert merit((1, [4.0, 8, 20, 20], 0.9)) == pytest.approx(0.75)
    assert merit((1, BOX, 0.9), (1, far, 0.9)) == merit((1, BOX, 0.9), (1, BOX, 0.9)) == pytest.approx(2 / 3)
    assert merit() == merit((0, BOX, 0.9)) == merit((1, far, 0.9)) == merit((1, BOX, 0.1)) == 0
    assert merit((1, BOX, 0.9), (1, far, 0.9), (0, far, 0.9), crowd=[0.0, 0.0, 32.0, 32.0]) == 1


@torch.no_grad()
def test_boxes_of_a_file_are_told_in_its_own_pixels(photo, tmp_path) -> None:
    sample = TASK.open(photo(tmp_path / "wide.png", size=(128, 64)))
    assert sample.image.shape == (1, 16, 32)
    assert sample.scale == (0.25, 0.25)
    batch = batch_of(sample)
    wanted = dataclasses.replace(batch, boxes=(torch.tensor([[10.0, 2, 32, 14]]),), labels=(torch.tensor([1]),))
    (answer,) = TASK.predict(saying(built().model, wanted), batch, FACTS, Ask())
    assert answer.said == {"objects": [{"class": "dog", "probability": 0.95, "box": [40.0, 8.0, 128.0, 56.0]}]}
    assert TASK.cells(answer) == {"objects": "1", "what": "dog 95%"}


@torch.no_grad()
def test_what_is_asked_for_bounds_what_is_told() -> None:
    batch = batch_of(scene((1, BOX), (0, [20.0, 2, 31, 12])))
    unsure = saying(built().model, batch, sure=0.27)
    count = [
        len(TASK.predict(unsure, batch, FACTS, ask)[0].said["objects"])
        for ask in (Ask(), Ask(least=0.2), Ask(least=0.2, top=1), Ask(least=0.5))
    ]
    assert count == [0, 2, 1, 0]
    assert TASK.predict(unsure, batch_of(), FACTS, Ask()) == []


def test_the_picture_shows_the_truth_in_white_and_what_was_found_in_colour() -> None:
    one = scene((1, BOX))
    answer = Answer({"objects": [{"class": "dog", "probability": 0.9, "box": [2.0, 2.0, 30.0, 30.0]}]})
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(one, answer))))
    assert drawn.shape == (192, 192, 3)
    assert tuple(drawn[8 * 6, 12 * 6]) == TRUTH
    assert tuple(drawn[100, 2 * 6]) not in (TRUTH, tuple(drawn[100, 2 * 6 + 6]))
    unknown = np.array(Image.open(io.BytesIO(TASK.draw(dataclasses.replace(one, truth=None), answer))))
    assert tuple(unknown[8 * 6, 12 * 6]) != TRUTH or one.image[0, 8, 12] == 255


def test_the_report_shows_every_class_and_number_also_where_nothing_was_scored() -> None:
    scorer = TASK.scorer(FACTS)
    confusion, sheet, bars, curves = TASK.panels(scorer.scores([scorer.state()]))
    assert confusion.rows == ()
    assert len(sheet.rows) == 12
    assert bars.labels == ("cat", "dog")
    assert bars.series == {"boxes": (0.0, 0.0)}
    assert curves.series == {}
