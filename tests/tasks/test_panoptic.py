import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.compat.huggingface.heads.masks import MaskFormer, PanopticMasks
from synchromesh.data.images import Preprocess
from synchromesh.data.map_scenes import PanopticScene
from synchromesh.data.moves import Fit, Move
from synchromesh.data.panoptic import Segment, SegmentMap
from synchromesh.data.scenes import ComposedScenes
from synchromesh.errors import InputError
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.panoptic import Segments
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.recipes.panoptic_demo import OBJECTS
from synchromesh.tasks.panoptic import Panoptic, SegmentedBatch, as_it_was
from synchromesh.tasks.pixels import UNKNOWN, PixelData
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
FACTS = {"classes": ["cat", "dog", "sky"], "things": [True, True, False]}
DATA = PixelData(ComposedScenes(train=4, test=3), Preprocess(image_size=32, channels=1))
TASK = Panoptic(DATA, CentrePanoptic(OBJECTS, SemanticFPN(width=8), least_stuff=1))
MASKS = dataclasses.replace(
    TASK, head=PanopticMasks(MaskFormer(queries=5, width=32, heads=2, decoder_layers=1, ffn=16, dropout=0.0, levels=2))
)
TINY = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4, drop_path=0.0)


def scene(
    size: tuple[int, int] = (32, 32), *, whole: tuple[int, int] | None = None, labels: tuple[int, ...] = (0, 1, 0)
) -> PanopticScene:
    """A picture of size `whole`, scaled to `size`: void above, then sky, and things in it; the last one is a crowd."""
    whole = whole or size
    numbers = np.zeros(whole, dtype=np.int32)
    numbers[: whole[0] // 8] = -1
    width = whole[1] // max(1, len(labels))
    segments = [Segment(9, 2)]
    for place, label in enumerate(labels):
        numbers[whole[0] // 4 : whole[0] // 2, place * width : place * width + width // 2] = place + 1
        segments.append(Segment(10 + place, label, crowd=len(labels) > 2 and place == len(labels) - 1))
    move, truth = Fit(size=size).move(*whole), SegmentMap(numbers, tuple(segments))
    image = torch.randint(0, 256, (1, *size), dtype=torch.uint8)
    return PanopticScene(image, truth.moved(move), truth, move=move)


def batch_of(*scenes: PanopticScene, task: Panoptic = TASK) -> SegmentedBatch:
    return task.prepare(scenes, FACTS, CPU, None)


def built(task: Panoptic = TASK) -> Run:
    model = task.build(task.sized(TINY), FACTS).eval()
    return Run(model, model)


def saying(*scenes: PanopticScene) -> Run:
    """A run whose model says of every picture just what is true of it, in the image."""

    def called(images: torch.Tensor, sizes: torch.Tensor) -> list[Segments]:
        found = []
        for one in scenes[: len(images)]:
            labels = torch.tensor([each.label for each in one.truth.segments], dtype=torch.int64)
            ids = torch.from_numpy(one.truth.numbers + 1).int()
            found.append(Segments(ids, labels, torch.linspace(0.9, 0.5, len(labels))))
        return found

    return Run(torch.nn.Identity(), called)


def test_crowds_void_and_padding_are_no_truth_to_learn_from() -> None:
    batch = batch_of(scene(size=(32, 24)), scene(size=(16, 32), labels=()), scene(size=(20, 20), labels=(1,)))
    objects = batch.objects()
    assert objects.image.tolist() == [0, 0, 2]
    assert objects.labels.tolist() == [0, 1, 1]
    assert objects.masks.shape == (3, 32, 32)
    assert objects.boxes[0].tolist() == [0, 8, 4, 16]
    assert int(objects.masks[0].sum()) == 4 * 8
    assert (batch.labels[0, :4] == UNKNOWN).all()
    assert (batch.labels[0, 8:16, 16:20] == UNKNOWN).all()
    assert (batch.labels[0, :, 24:] == UNKNOWN).all()
    assert batch.part(1, 3).objects().image.tolist() == [1]
    assert len(batch.part(1, 2).objects()) == 0


@pytest.mark.parametrize("task", [TASK, MASKS], ids=["branches", "masks"])
@torch.no_grad()
def test_counts_and_losses_of_the_parts_of_a_batch_add_up_to_those_of_all(task: Panoptic) -> None:
    scenes = (scene(), scene(labels=()), scene(labels=(1, 0)), scene(labels=(1,)))
    batch, run = batch_of(*scenes, task=task), built(task)
    parts, weights = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)], task.head.weights()
    for name, count in task.counts(batch).items():
        assert sum(task.counts(one)[name] for one in parts) == count
    whole = task.loss(run, batch)
    assert whole.keys() == weights.keys() == task.counts(batch).keys() == task.counts(batch_of(task=task)).keys()
    steady = [name for name in whole if task is MASKS or name in ("cross_entropy", "proposal_score_loss")]
    for name in steady:  # other losses are of regions, which are drawn at random
        total = sum(float(task.loss(run, one)[name].total) for one in parts)
        assert total == pytest.approx(float(whole[name].total), rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("task", [TASK, MASKS], ids=["branches", "masks"])
def test_a_batch_without_pictures_has_a_loss_that_reaches_every_parameter(task: Panoptic) -> None:
    run, none = built(task), batch_of(task=task)
    sum(term.total for term in task.loss(run, none).values()).backward()
    assert all(one.grad is not None and not one.grad.any() for one in run.model.parameters())
    assert not any(task.counts(none).values())
    with torch.no_grad():
        assert task.scorer(FACTS).add(run, none) == []
        assert task.predict(run, none, FACTS, Ask()) == []


def test_a_model_that_says_what_is_true_scores_one_and_one_that_says_nothing_zero() -> None:
    scenes = scene(), scene(labels=()), scene(labels=(1, 0))
    right, none = TASK.scorer(FACTS), TASK.scorer(FACTS)
    assert right.add(saying(*scenes), batch_of(*scenes)) == [1, 1, 1]
    found = right.scores([right.state()])
    assert found.numbers == {"PQ": 1, "SQ": 1, "RQ": 1, "PQ_things": 1, "PQ_stuff": 1}
    assert found.details["classes"]["dog"] == {"PQ": 1, "SQ": 1, "RQ": 1}
    blank = [dataclasses.replace(one, truth=SegmentMap(np.full((32, 32), -1, dtype=np.int32), ())) for one in scenes]
    assert none.add(saying(*blank), batch_of(*scenes)) == [0, 0, 0]
    assert set(none.scores([none.state()]).numbers.values()) == {0}


def test_pictures_are_scored_at_their_own_size() -> None:
    one, other = scene((16, 32), whole=(48, 96)), scene((32, 16), whole=(64, 32))
    found = TASK.found(saying(one, other), batch_of(one, other))
    assert [tuple(each.ids.shape) for each in found] == [(48, 96), (64, 32)]
    for each, true in zip(found, (one, other), strict=True):
        assert (each.ids.numpy() == true.whole.numbers + 1).mean() > 0.97
    scorer = TASK.scorer(FACTS)
    assert min(scorer.add(saying(one, other), batch_of(one, other))) > 0.75
    shrunk = as_it_was(Segments(torch.eye(4).int(), torch.tensor([1]), torch.ones(1)), Move((2, 2), (4, 4), (2.0, 2.0)))
    assert shrunk.ids.shape == (2, 2)
    assert set(shrunk.ids.flatten().tolist()) <= {0, 1}


@torch.no_grad()
def test_the_scores_of_ranks_are_those_of_all_pictures() -> None:
    scenes = [scene(whole=(40, 48), labels=(0, 1)[: i % 3]) for i in range(5)]
    moved = [dataclasses.replace(one, truth=scene(size=(32, 32), labels=(0, 1)).truth) for one in scenes]
    batch, whole = batch_of(*scenes), TASK.scorer(FACTS)
    whole.add(saying(*moved), batch)
    ranks = [TASK.scorer(FACTS) for _ in range(3)]
    for rank, (start, stop) in zip(ranks, [(0, 2), (2, 5), (5, 5)], strict=True):
        rank.add(saying(*moved[start:stop]), batch.part(start, stop))
    got, wanted = ranks[0].scores([one.state() for one in ranks]), whole.scores([whole.state()])
    assert got == wanted
    assert 0 < wanted.numbers["PQ"] < 1


@torch.no_grad()
def test_a_file_of_any_size_is_answered_in_its_own_pixels(photo, tmp_path) -> None:
    sample = TASK.open(photo(tmp_path / "wide.png", size=(128, 64)))
    assert sample.image.shape == (1, 16, 32)
    assert len(TASK.predict(built(), batch_of(sample), FACTS, Ask())) == 1
    known = dataclasses.replace(sample, truth=scene((16, 32)).truth)
    (answer,) = TASK.predict(saying(known), batch_of(sample), FACTS, Ask())
    first, *others = answer.said["segments"]
    assert (answer.said["height"], answer.said["width"]) == (64, 128)
    assert (first["id"], first["class"], first["probability"]) == (1, "sky", 0.9)
    assert sum(one["pixels"] for one in (first, *others)) == int((answer.seen[0].ids > 0).sum())
    few = [TASK.predict(saying(known), batch_of(sample), FACTS, ask)[0] for ask in (Ask(top=2), Ask(least=0.7))]
    assert [len(one.said["segments"]) for one in few] == [2, 2]
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(sample, answer))))
    assert drawn.shape[1] == 256
    assert TASK.cells(answer)["segments"] == "4"


def test_the_picture_shows_what_was_found_beside_what_is_true() -> None:
    one = scene((96, 192))
    (answer,) = TASK.predict(saying(one), batch_of(one), FACTS, Ask())
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(one, answer))))
    assert (drawn[:96, :192] == drawn[:96, 198:]).all()
    assert (drawn[24, 2:30] == 255).all()  # the border of the first thing
    nothing = dataclasses.replace(answer, seen=(Segments(torch.zeros(96, 192).int(), *_none()), answer.seen[1]))
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(one, nothing))))
    assert (drawn[:96, :192] == one.image[0, :, :, None].numpy()).all()


def _none() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def test_composed_scenes_have_digits_as_things_and_the_photograph_as_stuff() -> None:
    splits = TASK.splits(seed=0)
    assert splits.facts == {"classes": [*"0123456789", "background"], "things": [*[True] * 10, False]}
    one = splits.test.read(0)
    assert one.whole is one.truth
    assert one.truth.segments[0].label == 10
    assert TASK.about(splits.facts) == "10 classes of things, 1 of stuff"


def test_the_report_shows_every_class_also_where_nothing_was_scored() -> None:
    scorer = TASK.scorer(FACTS)
    scores = scorer.scores([scorer.state()])
    assert set(scores.numbers.values()) == {0.0}
    means, classes = TASK.panels(scores)
    assert [row[0] for row in means.rows] == ["all", "things", "stuff"]
    assert [row[1:] for row in classes.rows] == [("-", "-", "-")] * 3


def test_a_folder_without_segments_is_refused(photo, tmp_path) -> None:
    (tmp_path / "labels").mkdir()
    for number in range(3):
        photo(tmp_path / "images" / f"{number}.png", size=(48, 40), seed=number)
        Image.fromarray(np.eye(40, 48, dtype=np.uint8)).save(tmp_path / "labels" / f"{number}.png")
    with pytest.raises(InputError, match="wanted a map of the segments of each picture"):
        TASK.reading(tmp_path).splits(seed=0)
