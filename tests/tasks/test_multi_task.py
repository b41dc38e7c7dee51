import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data.images import Preprocess
from synchromesh.data.scenes import ComposedScenes
from synchromesh.errors import InputError
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.tasks.dense_kinds import DenseKind
from synchromesh.tasks.multi_task import ALL, MultiTask
from synchromesh.tasks.pixels import PixelData
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
TASK = MultiTask(
    PixelData(ComposedScenes(train=4, test=3, fewest=1, most=2, smallest=10, largest=14), Preprocess(image_size=32)),
    width=8,
)
SWIN = SwinV2Config(image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, in_channels=1)


@pytest.fixture(scope="module")
def splits():
    return TASK.splits(seed=0)


def ran(task: MultiTask, facts) -> Run:
    torch.manual_seed(0)
    model = task.build(SWIN, facts).eval()
    return Run(model, model)


def test_losses_of_parts_add_up_and_an_empty_part_reaches_every_parameter(splits):
    run, facts = ran(TASK, splits.facts), splits.facts
    batch = TASK.prepare([splits.test.read(i) for i in range(3)], facts, CPU, None)
    whole = TASK.loss(run, batch)
    assert list(whole) == [kind.value for kind in ALL] == list(TASK.counts(batch))
    parts = [batch.part(*cut) for cut in ((0, 2), (2, 2), (2, 3))]
    for name, term in whole.items():
        torch.testing.assert_close(sum(TASK.loss(run, one)[name].total for one in parts), term.total)
        assert sum(TASK.counts(one)[name] for one in parts) == TASK.counts(batch)[name]
    empty = TASK.prepare([], facts, CPU, None)
    sum(term.total for term in TASK.loss(run, empty).values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in run.model.parameters())


def test_scores_are_each_tasks_number_and_their_mean_change_and_ranks_add_up(splits):
    samples = [splits.test.read(i) for i in range(3)]
    single = (0.02, 0.5, 0.4, 9.0)
    task = dataclasses.replace(TASK, single=single)
    run = ran(task, splits.facts)
    one, two = task.scorer(splits.facts), task.scorer(splits.facts)
    whole = task.scorer(splits.facts)
    batches = [task.prepare(own, splits.facts, CPU, None) for own in (samples[:1], samples[1:], samples)]
    for scorer, batch in zip((one, two, whole), batches, strict=True):
        assert len(scorer.add(run, batch)) == len(batch)
    idle = task.scorer(splits.facts)
    found = whole.scores([whole.state()])
    for name, value in one.scores([one.state(), two.state(), idle.state()]).numbers.items():
        assert value == pytest.approx(found.numbers[name], rel=1e-5)
    assert set(found.numbers) == {number.name for number in task.numbers}
    assert task.numbers[0].name == "mean_change"
    own = [found.numbers[name] for name in ("mIoU", "saliency_IoU", "edge_F", "offset_error")]
    changes = [(a - b) / b for a, b in zip(own, single, strict=True)]
    assert found.numbers["mean_change"] == pytest.approx((sum(changes[:3]) - changes[3]) / 4)
    assert [row[0] for row in task.panels(found)[0].rows] == [kind.value for kind in ALL]
    assert TASK.numbers[0].name == "mIoU"


def test_one_task_alone_is_the_same_task_without_the_others(splits):
    task = dataclasses.replace(TASK, tasks=(DenseKind.EDGES,), weights=(2.0,))
    run = ran(task, splits.facts)
    assert list(run.model.heads) == ["edges"]
    batch = task.prepare([splits.test.read(0)], splits.facts, CPU, None)
    assert {name: term.weight for name, term in task.loss(run, batch).items()} == {"edges": 2.0}
    assert [number.name for number in task.numbers] == ["edge_F"]


def test_a_picture_of_another_size_is_answered_and_drawn_at_its_own(splits, tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90), dtype=np.uint8)).save(tmp_path / "a.png")
    run, sample = ran(TASK, splits.facts), TASK.open(tmp_path / "a.png")
    batch = TASK.prepare([sample], splits.facts, CPU, None)
    with torch.no_grad():
        (found,) = TASK.found(run, batch)
        small = run(batch.images)["offsets"][0, :, :18, :32].abs().mean(dim=(1, 2)) * 10  # in pixels of the image
    assert {kind: tuple(x.shape) for kind, x in found.items()} == {
        kind: (channels, 50, 90) for kind, channels in zip(ALL, (11, 1, 1, 2), strict=True)
    }
    got = found[DenseKind.OFFSETS].abs().mean(dim=(1, 2)).tolist()
    assert got == pytest.approx((small * 90 / 32).tolist(), rel=0.1)
    (answer,) = TASK.predict(run, batch, splits.facts, Ask(top=2))
    assert set(answer.said) == {"height", "width", *(kind.value for kind in ALL)}
    assert len(answer.said["semantic"]) <= 2
    for one in (sample, splits.test.read(0)):
        seen = TASK.prepare([one], splits.facts, CPU, None)
        assert TASK.draw(one, TASK.predict(run, seen, splits.facts, Ask())[0]).startswith(b"\x89PNG")
    assert TASK.cells(answer)["edges"]


def test_a_task_without_data_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the task 'normals' has no data: .* wanted some of \['semantic'"):
        MultiTask(tasks=(DenseKind.SEMANTIC, DenseKind.NORMALS))
    for folder in ("images/train", "images/val", "labels/train", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / folder / "a.png")
    with pytest.raises(InputError, match=r"LabelledPicture, wanted a map of the segments"):
        TASK.reading(tmp_path).splits(seed=0)


def test_settings_that_contradict_each_other_are_refused():
    wrong = {
        "one or more": {"tasks": ()},
        "numbers in single": {"single": (1.0,)},
        "numbers in weights": {"weights": (1.0,)},
        "each once": {"tasks": (DenseKind.EDGES,) * 2},
    }
    for said, settings in wrong.items():
        with pytest.raises(ValueError, match=said):
            MultiTask(**settings)
