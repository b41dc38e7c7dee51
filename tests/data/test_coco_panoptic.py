import json

import numpy as np
import pytest

from synchromesh.data import coco_panoptic
from synchromesh.data.annotated import Fault
from synchromesh.data.coco_panoptic import CocoPanoptic
from synchromesh.errors import InputError

CATEGORIES = [
    {"id": 90, "name": "sky", "isthing": 0},
    {"id": 1, "name": "cat", "isthing": 1},
]
SEGMENTS = [
    {"id": 300, "category_id": 1, "iscrowd": 0, "bbox": [0, 0, 1, 1], "area": 1},
    {"id": 70_000, "category_id": 90, "iscrowd": 0},
    {"id": 2, "category_id": 1, "iscrowd": 1},
]
IDS = [[300, 300, 70_000, 70_000], [2, 2, 0, 0]]


@pytest.fixture
def panoptic(tmp_path, picture, label_file):
    def write(segments=SEGMENTS, *, annotations=None, images=({"id": 4, "file_name": "a.jpg"},), pixels=IDS, **members):
        picture("images/a.jpg", 2, 4)
        ids = np.array(pixels)
        label_file("masks/a.png", np.stack([ids % 256, ids // 256 % 256, ids // 65_536], axis=-1))
        shown = [{"height": 2, "width": 4, **one} for one in images]
        own = (
            [{"image_id": 4, "file_name": "a.png", "segments_info": list(segments)}]
            if annotations is None
            else annotations
        )
        whole = {"images": shown, "annotations": own, "categories": CATEGORIES, **members}
        path = tmp_path / "panoptic.json"
        path.write_text(json.dumps(whole))
        return CocoPanoptic(path, tmp_path / "masks", tmp_path / "images")

    return write


def test_ids_are_three_bytes_and_segments_say_their_class(panoptic) -> None:
    annotated = panoptic().load()
    assert (annotated.classes, annotated.category_ids, annotated.things) == (("cat", "sky"), (1, 90), (True, False))
    (picture,) = annotated.pictures
    assert picture.number == 4
    found = picture.opened(3)[1]
    assert found.labels().tolist() == [[0, 0, 1, 1], [255, 255, 255, 255]]
    assert [one.id for one in found.segments] == [300, 70_000, 2]
    assert [one.crowd for one in found.segments] == [False, False, True]
    assert found.instances(annotated.things).boxes.tolist() == [[0.0, 0.0, 2.0, 1.0]]
    assert annotated.notes() == ()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"id": 5, "category_id": 8}, "segments of unknown categories, left out"),
        ({"id": 5}, "segments of unknown categories, left out"),
        ({"id": 0, "category_id": 1}, "segments without an id of 1 to 16,777,215, left out"),
        ({"id": 1 << 24, "category_id": 1}, "segments without an id of 1 to 16,777,215, left out"),
        ({"category_id": 1}, "segments without an id of 1 to 16,777,215, left out"),
        ({"id": 300, "category_id": 90}, "segment ids given twice, of which the first is taken"),
        (7, "segments without an id of 1 to 16,777,215, left out"),
    ],
)
def test_a_segment_that_makes_no_sense_is_void_named_and_counted(panoptic, wrong, what) -> None:
    annotated = panoptic([*SEGMENTS, wrong]).load()
    assert annotated.faults[what].count == 1
    assert "of picture 4" in annotated.notes()[0]
    assert len(annotated.pictures[0].segments.segments) == 3
    assert annotated.pictures[0].opened(1)[1].labels().tolist()[0] == [0, 0, 1, 1]


NO_PIXEL = "segments without a pixel, of which nothing is learnt"
NO_SEGMENT = "ids of pixels that segments_info lacks, which are void"


def test_ids_that_only_the_json_or_only_the_pixels_have_are_named_and_counted(panoptic) -> None:
    annotated = panoptic([*SEGMENTS, {"id": 9, "category_id": 1}], pixels=[[300, 6, 70_000, 6], [2, 2, 0, 5]]).load()
    assert annotated.faults == {
        NO_PIXEL: Fault(1, ("9 of a.png",)),
        NO_SEGMENT: Fault(2, ("5 in 1 of 8 pixels of a.png", "6 in 2 of 8 pixels of a.png")),
    }
    assert annotated.remarks == ("1 of 1 files of ids were compared with segments_info to count this",)


def test_a_segment_of_the_json_that_is_left_out_is_not_called_missing_too(panoptic) -> None:
    strange = [{"id": 9, "category_id": 8}, {"id": 5, "category_id": 8}, {"id": 300, "category_id": 90}]
    annotated = panoptic([*SEGMENTS, *strange], pixels=[[300, 300, 70_000, 5], [2, 2, 0, 5]]).load()
    assert annotated.faults.keys() == {
        "segments of unknown categories, left out",
        "segment ids given twice, of which the first is taken",
    }


def test_of_many_files_of_ids_some_are_looked_at_each_with_its_own_segments(panoptic, picture, monkeypatch) -> None:
    monkeypatch.setattr(coco_panoptic, "LOOKED_AT", 2)
    names = [(number, f"{number}.jpg") for number in (7, 8, 9)]
    for _, name in names:
        picture(f"images/{name}", 2, 4)
    images = [{"id": number, "file_name": name} for number, name in names]
    # The annotations stand in another order than the pictures, and one that nobody uses lies between them.
    lost = {9: [{"id": 11, "category_id": 1}], 8: [{"id": 12, "category_id": 1}], 5: [], 7: []}
    own = [{"image_id": i, "file_name": "a.png", "segments_info": [*SEGMENTS, *more]} for i, more in lost.items()]
    annotated = panoptic(annotations=own, images=images).load()
    assert annotated.faults[NO_PIXEL] == Fault(1, ("11 of a.png",))  # those of pictures 7 and 9 are looked at
    assert "2 of 3 files of ids were compared" in annotated.remarks[0]
    assert NO_SEGMENT not in annotated.faults


def test_a_file_of_ids_that_cannot_be_read_is_named_when_the_set_is_loaded(panoptic, tmp_path) -> None:
    reader = panoptic()
    (tmp_path / "masks/a.png").write_bytes(b"no picture")
    assert "a.png" in reader.load().faults["files of ids that cannot be used"].examples[0]


def test_pictures_and_annotations_that_do_not_match_are_named(panoptic, picture) -> None:
    picture("images/b.jpg", 2, 4)
    picture("images/c.jpg", 2, 4)
    images = [{"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}, {"id": 6, "file_name": "c.jpg"}]
    own = {"image_id": 4, "file_name": "a.png", "segments_info": SEGMENTS}
    others = [{**own, "image_id": 99}, own, {**own, "image_id": 5, "file_name": "gone.png"}]
    annotated = panoptic(annotations=[{**own, "image_id": 6}, *others, own], images=images).load()
    assert [picture.number for picture in annotated.pictures] == [4, 6]
    assert [len(picture.segments.segments) for picture in annotated.pictures] == [3, 3]
    counts = {what: fault.count for what, fault in annotated.faults.items()}
    assert counts["annotations of unknown pictures, left out"] == 1
    assert counts["second annotations of a picture, left out"] == 1
    assert counts["files of ids that are missing, left out"] == 1
    assert counts["pictures without segments that can be used, left out"] == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/a.png"])
def test_a_file_of_ids_cannot_leave_its_folder(panoptic, name) -> None:
    annotation = {"image_id": 4, "file_name": name, "segments_info": SEGMENTS}
    with pytest.raises(InputError, match=r"panoptic\.json, picture 4 .* leads out of the folder"):
        panoptic(annotations=[annotation]).load()


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ([{"image_id": 4, "bbox": [0, 0, 1, 1]}], "no list 'segments_info'"),
        ([5], "the annotation at place 0 is 5"),
        ([], "1 pictures without segments"),
        ([{"image_id": 9, "file_name": "a.png", "segments_info": []}], "1 annotations of unknown pictures"),
    ],
)
def test_a_file_that_makes_no_sense_as_a_whole_is_refused_by_name(panoptic, annotations, says) -> None:
    with pytest.raises(InputError, match=says) as error:
        panoptic(annotations=annotations).load()
    assert "panoptic.json" in str(error.value)
