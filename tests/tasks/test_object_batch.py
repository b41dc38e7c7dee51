import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.colors import RandomColors
from synchromesh.data.images import Preprocess
from synchromesh.data.moves import Fit, RandomMoves, Size
from synchromesh.data.object_sources import ObjectFiles
from synchromesh.data.photographs import PhotographFolder
from synchromesh.data.scene import Scene
from synchromesh.data.scenes import ComposedScenes
from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.object_batch import SceneData, Scenes
from synchromesh.testing.squares import write_squares
from synchromesh.training.codec import encode

CPU = torch.device("cpu")


def learnt(task: Detection, numbers: Sequence[int] = range(6), seed: int = 0) -> Scenes:
    splits = task.splits(seed=0)
    samples = [splits.train.read(n, lambda n=n: np.random.default_rng([seed, n])) for n in numbers]
    return task.prepare(samples, splits.facts, CPU, np.random.default_rng(0))


def test_settings_that_were_written_before_there_were_files_are_read_as_they_were() -> None:
    old = SceneData(ComposedScenes(train=4), Preprocess(image_size=64))
    written = {name: value for name, value in encode(old).items() if name in ("kind", "source", "preprocess")}
    assert CATALOG.decode(SceneData, json.loads(json.dumps(written))) == old


def test_settings_of_files_come_back_from_a_file(squares: Detection) -> None:
    assert CATALOG.decode(Detection, json.loads(json.dumps(encode(squares)))) == squares
    data = dataclasses.replace(squares.data, source=ObjectFiles(Path("a.json"), Path("b")), colors=RandomColors())
    assert CATALOG.decode(SceneData, json.loads(json.dumps(encode(data)))) == data


@pytest.mark.parametrize("change", [{"moves": RandomMoves()}, {"fit": Fit(longer=5)}, {"colors": RandomColors()}])
def test_composed_scenes_are_not_moved(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="composed scenes are new ones each time"):
        SceneData(**change)


def test_facts_are_the_classes_and_what_the_file_calls_them(squares: Detection) -> None:
    splits = squares.splits(seed=0)
    assert splits.facts == {"classes": ["blue", "red"], "category_ids": [3, 7]}
    assert (len(splits.train), len(splits.test)) == (6, 6)


def test_training_pads_to_the_largest_crop_whatever_the_samples_and_boxes_hold_their_squares(
    squares: Detection,
) -> None:
    batch = learnt(squares)
    assert batch.images.shape == (6, 3, 32, 32)
    assert learnt(squares, [2]).images.shape == (1, 3, 32, 32)
    assert learnt(squares, []).images.shape == (0, 3, 32, 32)
    objects = batch.objects()
    assert len(objects) > 0
    for which, box, mask in zip(objects.image, objects.boxes, objects.masks, strict=True):
        height, width = batch.sizes[which]
        assert not mask[height:].any()
        assert not mask[:, width:].any()
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        hull = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert (hull - box).abs().max() <= 1
    assert len(batch.part(0, 0).objects().masks) == 0


def test_a_batch_has_one_of_the_sizes_drawn_alike_for_all_its_parts(squares: Detection) -> None:
    batch, shapes = learnt(squares), set()
    for seed in range(6):
        whole = squares.shaped(batch, np.random.default_rng(seed))
        part = squares.shaped(batch.part(0, 2), np.random.default_rng(seed))
        none = squares.shaped(batch.part(0, 0), np.random.default_rng(seed))
        assert whole.images.shape[1:] == part.images.shape[1:] == none.images.shape[1:]
        assert torch.equal(whole.part(0, 2).images, part.images)
        shapes.add(tuple(whole.images.shape[2:]))
        assert squares.counts(whole) == squares.counts(batch)
    assert shapes == {(32, 32), (16, 16)}  # a crop of 32 x 32 fits into 16 x 24 so


def test_objects_of_a_batch_of_another_size_lie_where_their_pixels_do(squares: Detection) -> None:
    batch = learnt(squares)
    small = batch.resized(0.5)
    assert small.images.shape[2:] == (16, 16)
    for one, other in zip(batch.boxes, small.boxes, strict=True):
        assert torch.allclose(other, one * 0.5)
    for (height, width), (h, w) in zip(batch.sizes, small.sizes, strict=True):
        assert (abs(h - height * 0.5) <= 0.5, abs(w - width * 0.5) <= 0.5) == (True, True)
    for one, other in zip(batch.scales, small.scales, strict=True):
        assert other == pytest.approx((one[0] * 0.5, one[1] * 0.5))
    for mask, box in zip(small.objects().masks, small.objects().boxes, strict=True):
        area = float((box[2] - box[0]) * (box[3] - box[1]))
        assert float(mask.sum()) == pytest.approx(area, rel=0.35)
    assert batch.resized(1.0) is batch


@pytest.mark.parametrize("sizes", [((64, 128), (128, 64)), ((96, 96), (64, 128)), ((128, 128), (64, 128))])
def test_objects_keep_their_shape_at_sizes_of_other_shapes(squares: Detection, sizes: tuple[Size, ...]) -> None:
    data = dataclasses.replace(squares.data, moves=RandomMoves(sizes, scale=(1.0, 1.0)))
    task = dataclasses.replace(squares, data=data)
    batch = learnt(task)
    for seed in range(6):
        small = task.shaped(batch, np.random.default_rng(seed))
        assert tuple(small.images.shape[2:]) in {
            tuple(round(s * data.moves.shrunk(k)) for s in data.moves.largest()) for k in sizes
        }
        for one, other in zip(batch.boxes, small.boxes, strict=True):
            sides, smaller = one[:, 2:] - one[:, :2], other[:, 2:] - other[:, :2]
            assert torch.allclose(sides[:, 0] * smaller[:, 1], sides[:, 1] * smaller[:, 0])


def test_what_is_scored_is_padded_alone_as_in_a_batch_where_the_size_is_known(squares: Detection) -> None:
    splits = squares.splits(seed=0)
    samples = [splits.test.read(n) for n in range(3)]
    whole = squares.prepare(samples, splits.facts, CPU, None)
    assert whole.images.shape == (3, 3, 32, 32)
    assert whole.masks is None
    for place, sample in enumerate(samples):
        assert max(sample.image.shape[1:]) == 32
        alone = squares.prepare([sample], splits.facts, CPU, None)
        assert torch.equal(alone.images[0], whole.images[place])
    for fit, canvas in ((Fit(size=(24, 20)), (24, 20)), (Fit(shorter=20, longer=40), (1, 1))):
        assert dataclasses.replace(squares.data, fit=fit).canvas(learning=False) == canvas


def test_crowds_are_not_learnt_from(tmp_path: Path, squares: Detection) -> None:
    path = tmp_path / "instances_train.json"
    before = len(learnt(squares).objects())
    found = json.loads(path.read_text())
    for one in found["annotations"][1:]:
        one["iscrowd"] = 1
    path.write_text(json.dumps(found))
    assert before > 1
    assert len(learnt(squares).objects()) == 1


def test_data_of_a_user_replace_those_of_a_recipe_and_photographs_stay_backgrounds(tmp_path: Path, photo) -> None:
    composed = SceneData(preprocess=Preprocess(image_size=64))
    photo(tmp_path / "photos" / "a.png")
    there = composed.on(tmp_path / "photos")
    assert isinstance(there.source, ComposedScenes)
    assert there.source.photographs == PhotographFolder(tmp_path / "photos")
    path = write_squares(tmp_path, "train", 2)
    for given in (path, tmp_path):
        files = composed.on(given)
        assert files.source == ObjectFiles(given)
        assert files.moves is not None
        assert files.moves.sizes == ((64, 64),)
    again = dataclasses.replace(files, source=ObjectFiles(path, Path("x"), 0.25)).on(tmp_path)
    assert again.source == ObjectFiles(tmp_path, None, 0.25)
    task = Detection(data=again).with_pictures(Path("there"))
    assert task.data.source == ObjectFiles(tmp_path, Path("there"), 0.25)
    with pytest.raises(InputError, match="with_pictures"):
        Detection().with_pictures(Path("there"))


def test_a_file_is_opened_as_those_that_are_scored(squares: Detection, photo, tmp_path: Path) -> None:
    scene = squares.open(photo(tmp_path / "wide.png", size=(96, 48)))
    assert isinstance(scene, Scene)
    assert scene.image.shape == (3, 16, 32)
    assert scene.picture is not None
    assert (scene.picture.height, scene.picture.width) == (48, 96)
