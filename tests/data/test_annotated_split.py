import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.annotated_split import (
    AnnotatedSplit,
    DepthScenes,
    LabelScenes,
    ObjectScenes,
    PanopticScenes,
    Reading,
)
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.coco_panoptic import CocoPanoptic
from synchromesh.data.colors import RandomColors
from synchromesh.data.depth_maps import DepthFolders
from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.mosaic import Mosaic
from synchromesh.data.moves import Fit, RandomMoves
from synchromesh.data.scene import returned
from synchromesh.errors import InputError, UnreadableError
from synchromesh.training.codec import decode, encode
from synchromesh.training.task import Split

HEIGHT, WIDTH = 60, 80
BOXES = ((10, 8, 40, 32), (50, 30, 72, 54))
READING = Reading(1, Fit(longer=40), RandomMoves(sizes=((48, 48),), scale=(0.7, 2.0)))


def outline(box: tuple[int, ...]) -> list[list[float]]:
    left, top, right, bottom = map(float, box)
    return [[left, top, right, top, right, bottom, left, bottom]]


@pytest.fixture
def objects(coco, picture) -> CocoJson:
    """Dark pictures with bright squares that are annotated, and a third square that is to be ignored."""
    annotations, images = [], []
    for number in range(3):
        path = picture(f"images/{number}.png", HEIGHT, WIDTH, bright=BOXES[number % 2])
        images.append({"id": number + 1, "file_name": path.name, "height": HEIGHT, "width": WIDTH})
        left, top, right, bottom = BOXES[number % 2]
        box = [left, top, right - left, bottom - top]
        annotations.append({"image_id": number + 1, "bbox": box, "segmentation": outline(BOXES[number % 2])})
    annotations.append({"image_id": 1, "bbox": [60, 2, 9, 9], "iscrowd": 1})
    path = coco(annotations, images=images)
    return CocoJson(path, path.parent / "images")


def bright_box(image: torch.Tensor) -> list[int]:
    """The box around pixels that are brighter than half way between ground and square."""
    bright = image[0] > 147
    rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_a_picture_to_score_on_is_whole_and_goes_back_to_its_own_pixels(objects) -> None:
    split = AnnotatedSplit(objects.load(), ObjectScenes(masks=True), READING)
    assert isinstance(split, Split)
    assert len(split) == 3
    scene = split.read(0)
    assert scene.image.shape == (1, 30, 40)
    assert scene.scale == (0.5, 0.5)
    assert scene.truth.boxes.tolist() == [[5.0, 4.0, 20.0, 16.0]]
    assert returned(scene.truth, scene.move).boxes.tolist() == [list(map(float, BOXES[0]))]
    assert [(one.ignored, one.crowd) for one in scene.picture.objects] == [(False, False), (True, True)]
    assert scene.picture.number == 1


@pytest.mark.parametrize("masks", [False, True])
def test_pixels_boxes_and_masks_of_a_crop_belong_together(objects, masks) -> None:
    split = AnnotatedSplit(objects.load(), ObjectScenes(masks), READING)
    shown = flipped = 0
    for seed in range(40):
        scene = split.read(seed % 3, lambda seed=seed: np.random.default_rng(seed))
        assert scene.move.size == tuple(scene.image.shape[1:])
        assert 30 < max(scene.image.shape[1:]) <= 48
        flipped += scene.move.flip
        for place in range(len(scene.truth)):
            shown += 1
            box = scene.truth.boxes[place]
            assert np.abs(np.array(bright_box(scene.image)) - box.numpy()).max() <= 1
            if masks:
                assert scene.truth.masks.shape[1:] == scene.image.shape[1:]
                assert np.abs(np.array(bright_box(255 * scene.truth.masks)) - box.numpy()).max() <= 1
                assert (scene.image[0][scene.truth.masks[place]] > 147).float().mean() > 0.85
    assert shown > 25
    assert 8 < flipped < 32


def test_what_is_drawn_is_drawn_from_the_generator_alone(objects) -> None:
    colours = dataclasses.replace(READING, colors=RandomColors())
    for reading in (READING, colours):
        split = AnnotatedSplit(objects.load(), ObjectScenes(), reading)
        one, two, other = (split.read(1, lambda seed=seed: np.random.default_rng(seed)) for seed in (4, 4, 5))
        assert torch.equal(one.image, two.image)
        assert one.move == two.move != other.move
    assert len({value for seed in range(9) for value in _ground(split, seed)}) > 3
    assert torch.equal(split.read(1).image, AnnotatedSplit(objects.load(), ObjectScenes(), READING).read(1).image)


def _ground(split: AnnotatedSplit, seed: int) -> list[int]:
    return split.read(1, lambda: np.random.default_rng(seed)).image.flatten().mode().values.reshape(1).tolist()


def test_what_a_crop_hides_is_not_learnt_from_but_scored_on(objects) -> None:
    reading = Reading(1, Fit(longer=40), RandomMoves(sizes=((20, 20),), scale=(4.0, 4.0), least_visible=1.0))
    split = AnnotatedSplit(objects.load(), ObjectScenes(), reading)
    counts = [len(split.read(0, lambda seed=seed: np.random.default_rng(seed)).truth) for seed in range(20)]
    assert counts == [0] * 20  # the square is larger than the crop
    assert len(split.read(0).truth) == 1


def test_a_box_that_rounding_has_put_beyond_the_border_is_scored_on(coco) -> None:
    path = coco([{"bbox": [-0.5, 2, 10, 10]}])
    reading = Reading(1, Fit(longer=30), RandomMoves(least_visible=1.0))
    split = AnnotatedSplit(CocoJson(path, path.parent / "images").load(), ObjectScenes(), reading)
    assert split.read(0).truth.boxes.tolist() == [[0.0, 2.0, 9.5, 12.0]]


@pytest.mark.parametrize("masks", [False, True])
def test_a_mosaic_has_the_objects_of_four_samples(objects, masks) -> None:
    reading = dataclasses.replace(READING, mosaic=Mosaic(1.0))
    split = AnnotatedSplit(objects.load(), ObjectScenes(masks), reading)
    scenes = [split.read(0, lambda seed=seed: np.random.default_rng(seed)) for seed in range(12)]
    assert all(scene.image.shape == (1, 48, 48) for scene in scenes)
    assert max(len(scene.truth) for scene in scenes) >= 3
    assert split.read(0).image.shape == (1, 30, 40)  # never where it is scored
    rare = AnnotatedSplit(objects.load(), ObjectScenes(), dataclasses.replace(READING, mosaic=Mosaic(0.5)))
    composed = [rare.read(0, lambda seed=seed: np.random.default_rng(seed)).move is None for seed in range(30)]
    assert 5 < sum(composed) < 25


def test_whole_pictures_may_be_learnt_from(objects) -> None:
    split = AnnotatedSplit(objects.load(), ObjectScenes(), dataclasses.replace(READING, moves=None))
    assert split.read(0, lambda: np.random.default_rng(0)).image.shape == (1, 30, 40)
    with pytest.raises(ValueError, match="give moves"):
        dataclasses.replace(split, reading=dataclasses.replace(READING, moves=None, mosaic=Mosaic(0.5)))
    with pytest.raises(ValueError, match="not of LabelScenes"):
        AnnotatedSplit(objects.load(), LabelScenes(), dataclasses.replace(READING, mosaic=Mosaic(0.5)))


@pytest.mark.parametrize("orientation", [6, 8])
def test_boxes_fit_the_pixels_whichever_way_round_a_picture_was_annotated(coco, picture, orientation) -> None:
    left, top, right, bottom = BOXES[0]
    lying = {"bbox": [left, top, right - left, bottom - top]}
    turned = (
        [HEIGHT - bottom, left, HEIGHT - top, right] if orientation == 6 else [top, WIDTH - right, bottom, WIDTH - left]
    )
    upright = {"bbox": [turned[0], turned[1], turned[2] - turned[0], turned[3] - turned[1]]}
    for height, width, box in ((HEIGHT, WIDTH, lying), (WIDTH, HEIGHT, upright)):
        picture("images/0.png", HEIGHT, WIDTH, orientation=orientation, bright=BOXES[0])
        path = coco([dict(box)], images=[{"id": 1, "height": height, "width": width}])
        reading = dataclasses.replace(READING, fit=Fit(longer=80))
        scene = AnnotatedSplit(CocoJson(path, path.parent / "images").load(), ObjectScenes(), reading).read(0)
        assert tuple(scene.image.shape[1:]) == (height, width)
        assert scene.truth.boxes.tolist() == [list(map(float, bright_box(scene.image)))]


def test_a_picture_of_another_size_than_annotated_is_named_and_can_be_skipped(objects, picture) -> None:
    annotated = objects.load()
    picture("images/0.png", HEIGHT // 2, WIDTH // 2)
    split = AnnotatedSplit(annotated, ObjectScenes(), READING)
    with pytest.raises(InputError, match=r"0\.png: it has 30 x 40 pixels, its annotations say 60 x 80"):
        split.read(0)
    assert len(split.read(1).truth) == 1


def test_a_region_that_cannot_be_drawn_names_picture_and_annotation(coco, picture, monkeypatch) -> None:
    path = coco([{"id": 31, "segmentation": {"counts": [600], "size": [20, 30]}}])
    annotated = CocoJson(path, path.parent / "images").load()
    columns = annotated.pictures.columns
    object.__setattr__(columns, "letters", b"32" + columns.letters[2:])
    with pytest.raises(UnreadableError, match=r"0\.png: annotation 31: "):
        AnnotatedSplit(annotated, ObjectScenes(masks=True), READING).read(0)


def test_a_file_that_nobody_has_annotated_is_read_as_one_to_score_on(picture) -> None:
    path = picture("new.png", HEIGHT, WIDTH, bright=BOXES[0])
    scene = READING.unknown(path)
    assert scene.truth is None
    assert scene.image.shape == (1, 30, 40)
    assert (scene.picture.height, scene.picture.width, scene.picture.path) == (HEIGHT, WIDTH, path)
    assert bright_box(scene.image) == [5, 4, 20, 16]


VALUE = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
VALUE[8:32, 10:40] = 1


@pytest.fixture
def pixels(tmp_path: Path, picture, label_file) -> Path:
    """A dark picture with a bright square, and files that say the same."""
    picture("images/a.png", HEIGHT, WIDTH, bright=BOXES[0])
    label_file("labels/a.png", VALUE)
    label_file("depth/a.png", 1000 + 500 * VALUE, mode="I;16")
    label_file("ids/a.png", np.stack([VALUE + 1, 0 * VALUE, 0 * VALUE], axis=-1))
    segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
    whole = {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "ground", "isthing": 0}, {"id": 2, "name": "square", "isthing": 1}],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(whole))
    return tmp_path


def test_labels_segments_and_distances_stay_on_their_pixels(pixels) -> None:
    labels = LabelFolders(pixels / "images", pixels / "labels", ("ground", "square")).load()
    depths = DepthFolders(pixels / "images", pixels / "depth").load()
    panoptic = CocoPanoptic(pixels / "panoptic.json", pixels / "ids", pixels / "images").load()
    bright = 0
    for seed in range(20):

        def draw(seed=seed):
            return np.random.default_rng(seed)

        scene = AnnotatedSplit(labels, LabelScenes(), READING).read(0, draw)
        assert scene.labels.shape == scene.image.shape[1:]
        assert (scene.labels == (scene.image[0] > 147)).float().mean() > 0.96
        bright += int(scene.labels.sum())
        assert scene.whole is None
        metres = AnnotatedSplit(depths, DepthScenes(), READING).read(0, draw).depth
        assert torch.equal(metres > 1.25, scene.labels == 1)
        segments = AnnotatedSplit(panoptic, PanopticScenes(), READING).read(0, draw).truth
        assert np.array_equal(segments.labels(), scene.labels.numpy())
    assert bright


def test_what_is_scored_on_has_its_pixels_as_they_were(pixels) -> None:
    labels = LabelFolders(pixels / "images", pixels / "labels", ("ground", "square")).load()
    scene = AnnotatedSplit(labels, LabelScenes(), READING).read(0)
    assert scene.image.shape == (1, 30, 40)
    assert np.array_equal(scene.whole.values, VALUE)
    assert np.array_equal(scene.labels.numpy(), VALUE[1::2, 1::2])
    assert scene.picture.path.name == "a.png"
    depth = AnnotatedSplit(DepthFolders(pixels / "images", pixels / "depth").load(), DepthScenes(), READING).read(0)
    assert depth.whole.metres.shape == (HEIGHT, WIDTH)
    panoptic = CocoPanoptic(pixels / "panoptic.json", pixels / "ids", pixels / "images").load()
    scene = AnnotatedSplit(panoptic, PanopticScenes(), READING).read(0)
    assert np.array_equal(scene.whole.labels(), VALUE)
    assert scene.truth.instances(panoptic.things).boxes.tolist() == [[5.0, 4.0, 20.0, 16.0]]


def test_how_pictures_are_read_goes_to_disk_and_back() -> None:
    for reading in (
        READING,
        Reading(colors=RandomColors(), mosaic=Mosaic(0.3)),
        Reading(moves=None, fit=Fit(size=(4, 6))),
    ):
        assert decode(Reading, json.loads(json.dumps(encode(reading)))) == reading
