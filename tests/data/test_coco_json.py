import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synchromesh.data.annotated import Annotated
from synchromesh.data.annotation import AnnotatedPicture
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.picture_files import read_annotated
from synchromesh.data.regions import CompressedRuns, Polygons, RunLengths
from synchromesh.errors import InputError, UnreadableError

OUTLINE = [[2.0, 3.0, 12.0, 3.0, 12.0, 11.0, 2.0, 11.0]]


def loaded(path: Path) -> Annotated[AnnotatedPicture]:
    return CocoJson(path, path.parent / "images").load()


def counts(annotated: Annotated) -> dict[str, int]:
    return {what: fault.count for what, fault in annotated.faults.items()}


def test_a_file_is_read_as_it_says(coco) -> None:
    annotated = loaded(coco([{"segmentation": OUTLINE, "area": 70.5, "iscrowd": 0}]))
    (picture,) = annotated.pictures
    assert (picture.number, picture.height, picture.width, picture.path.name) == (1, 20, 30, "0.png")
    (found,) = picture.objects
    assert (found.box, found.label, found.area, found.number) == ((2.0, 3.0, 12.0, 11.0), 0, 70.5, 1)
    assert not found.ignored
    assert not found.crowd
    assert isinstance(found.region, Polygons)
    assert found.region.mask(20, 30).sum() == 80
    assert annotated.classes == ("cat",)
    assert annotated.notes() == ()


def test_gaps_between_category_ids_are_closed_and_kept_for_results(coco) -> None:
    categories = [{"id": 90, "name": "brush"}, {"id": 1, "name": "man"}, {"id": 17, "name": "cat"}]
    annotated = loaded(coco([{"category_id": 90}, {"category_id": 1}], categories=categories))
    assert annotated.classes == ("man", "cat", "brush")
    assert annotated.category_ids == (1, 17, 90)
    assert [one.label for one in annotated.pictures[0].objects] == [2, 0]


def test_members_may_stand_in_any_order(coco) -> None:
    path = coco([{}])
    whole = json.loads(path.read_text())
    for order in (["annotations", "categories", "images"], ["categories", "annotations", "images"]):
        path.write_text(json.dumps({name: whole[name] for name in order}))
        assert len(loaded(path).pictures[0].objects) == 1


def test_pictures_without_boxes_are_kept_and_objects_stay_with_their_picture(coco) -> None:
    images = [{"id": 7}, {"id": 3}, {"id": 5}]
    annotated = loaded(
        coco([{"image_id": 5, "id": 50}, {"image_id": 7, "id": 70}, {"image_id": 5, "id": 51}], images=images)
    )
    assert [(p.number, [one.number for one in p.objects]) for p in annotated.pictures] == [
        (7, [70]),
        (3, []),
        (5, [50, 51]),
    ]
    assert [p.number for p in annotated.pictures[1:]] == [3, 5]
    assert annotated.pictures[-1].number == 5
    with pytest.raises(IndexError):
        annotated.pictures[3]


def test_crowds_are_ignored_and_so_is_what_the_file_says_to_ignore(coco) -> None:
    runs = {"counts": [20 * 30 - 5, 5], "size": [20, 30]}
    annotated = loaded(coco([{"iscrowd": 1, "segmentation": runs}, {"ignore": 1}, {}]))
    assert [(one.crowd, one.ignored) for one in annotated.pictures[0].objects] == [
        (True, True),
        (False, True),
        (False, False),
    ]


def test_both_kinds_of_run_lengths_give_their_mask(coco) -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:9, 10:17] = True
    runs = RunLengths.of(mask)
    kinds = (np.asarray(runs.counts).tolist(), runs.compressed())
    annotated = loaded(coco([{"segmentation": {"counts": kind, "size": [20, 30]}} for kind in kinds]))
    for one in annotated.pictures[0].objects:
        assert isinstance(one.region, CompressedRuns)
        assert np.array_equal(one.region.mask(20, 30), mask)


def test_annotation_id_0_and_none_at_all_are_as_good_as_another(coco) -> None:
    annotated = loaded(coco([{"id": 0}, {"id": "absent", "bbox": [1, 1, 4, 4]}]))
    assert [one.number for one in annotated.pictures[0].objects] == [0, 1]
    assert annotated.faults == {}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"image_id": 99}, "annotations of unknown pictures, left out"),
        ({"image_id": "one"}, "annotations of unknown pictures, left out"),
        ({"image_id": 2}, "annotations of pictures whose file is missing, left out"),
        ({"category_id": 99}, "annotations of unknown categories, left out"),
        ({"category_id": "absent"}, "annotations of unknown categories, left out"),
        ({"category_id": 2**70}, "annotations of unknown categories, left out"),
        ({"bbox": "absent"}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, 3]}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, "3", 4]}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, None, 4]}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, math.nan, 4]}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, math.inf, 4]}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, 10**400, 4]}, "annotations without a box of four finite numbers, left out"),
        ({"bbox": [1, 2, 0, 4]}, "boxes without area, left out"),
        ({"bbox": [1, 2, 3, -4]}, "boxes without area, left out"),
        ({"bbox": [30, 2, 3, 4]}, "boxes outside of their picture, left out"),
        ({"bbox": [1, -8, 3, 4]}, "boxes outside of their picture, left out"),
    ],
)
def test_an_annotation_that_cannot_be_used_is_left_out_counted_and_named(coco, wrong, what) -> None:
    images = [{"id": 1}, {"id": 2, "missing": True}]
    annotated = loaded(coco([{"id": 40}, {"id": 41, **wrong}, {"id": 42, **wrong}], images=images))
    assert [one.number for one in annotated.pictures[0].objects] == [40]
    assert annotated.faults[what].count == 2
    (note,) = [note for note in annotated.notes() if what in note]
    assert note.startswith(f"{annotated.origin}: 2 {what}: annotation 41")
    assert "annotation 42" in note


def test_of_many_faults_three_are_named(coco) -> None:
    annotated = loaded(coco([{}, *({"bbox": [0, 0, 0, 0]} for _ in range(9))]))
    fault = annotated.faults["boxes without area, left out"]
    assert (fault.count, len(fault.examples)) == (9, 3)
    assert annotated.notes()[0].endswith("annotation 2 of 0.png, annotation 3 of 0.png, annotation 4 of 0.png, ...")


def test_a_box_that_reaches_out_is_cut_and_counted_unless_by_rounding(coco) -> None:
    annotated = loaded(coco([{"bbox": [-4, 5, 40, 10]}, {"bbox": [-0.5, 5, 31.0, 10], "id": 8}]))
    assert [one.box for one in annotated.pictures[0].objects] == [(0.0, 5.0, 30.0, 15.0), (-0.5, 5.0, 30.5, 15.0)]
    assert counts(annotated) == {"boxes that reach out of their picture, cut at its border": 1}


def test_where_many_boxes_are_cut_a_note_asks_whether_they_are_corners(coco) -> None:
    corners = [[12, 4, 22, 14], [16, 8, 28, 18], [2, 3, 9, 9], [10, 10, 15, 19]]
    annotated = loaded(coco([{"bbox": box} for box in corners] + [{"bbox": [0, 0, 0, 0]}]))
    assert "3 of 4 boxes reach out of their picture: they may be corners (x1, y1, x2, y2)" in annotated.remarks[0]
    assert "wanted x, y, width, height" in annotated.notes()[-1]
    one = loaded(coco([{"bbox": [25, 4, 22, 14]}, *({"bbox": [n, 3, 10, 8]} for n in range(4))]))
    assert counts(one)["boxes that reach out of their picture, cut at its border"] == 1
    assert one.remarks == ()


@pytest.mark.parametrize(
    "region",
    [
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4]],
        [1, 2, 3, 4, 5, 6],
        [[1, 2, 3, 4, 5, "6"]],
        [[1, 2, 3, 4, 5, math.nan]],
        {"counts": [3, 4], "size": [20, 30]},
        {"counts": [600.0], "size": [20, 30]},
        {"counts": "32", "size": [20, 30]},
        {"counts": "3 2", "size": [20, 30]},
        {"counts": [600], "size": [30, 20]},
        {"counts": [600]},
        {"counts": [600], "size": "no"},
        "mask.png",
    ],
)
def test_an_object_whose_region_makes_no_sense_keeps_its_box_and_is_counted(coco, region) -> None:
    annotated = loaded(
        coco([{"segmentation": region}, {"segmentation": OUTLINE, "id": 9}, {"segmentation": [], "id": 10}])
    )
    broken, whole, without = annotated.pictures[0].objects
    assert broken.region is None
    assert broken.box == (2.0, 3.0, 12.0, 11.0)
    assert whole.region.mask(20, 30).sum() == 80
    assert without.region is None
    assert counts(annotated) == {"regions that make no sense, left out of objects that keep their boxes": 1}
    assert "annotation 1" in annotated.notes()[0]


def test_the_outlines_that_make_sense_are_kept_beside_one_that_does_not(coco) -> None:
    annotated = loaded(coco([{"segmentation": [[1.0, 2, 3], *OUTLINE]}, {"segmentation": OUTLINE, "id": 2}]))
    assert [one.region.mask(20, 30).sum() for one in annotated.pictures[0].objects] == [80, 80]
    assert counts(annotated) == {"regions with an outline that makes no sense, whose other outlines are kept": 1}


def test_ids_given_twice_are_told_and_only_true_twins_are_left_out(coco) -> None:
    other = [3, 3, 5, 5]
    annotated = loaded(coco([{"id": 5}, {"id": 5}, {"id": 5, "bbox": other}, {"id": 6}, {"id": 7, "bbox": other}]))
    assert [one.number for one in annotated.pictures[0].objects] == [5, 5, 6, 7]
    assert counts(annotated) == {
        "annotations that are there twice, left out once": 1,
        "annotation ids of several annotations, which are all kept": 1,
    }


def test_picture_and_category_ids_given_twice_are_told_and_the_first_is_taken(coco) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]
    annotated = loaded(coco([{}], images=[{"id": 1}, {"id": 1, "file_name": "other.png"}], categories=categories))
    assert [picture.path.name for picture in annotated.pictures] == ["0.png"]
    assert annotated.classes == ("cat",)
    assert annotated.faults["picture ids given twice, of which the first is taken"].examples == ("1 (other.png)",)
    assert annotated.faults["category ids given twice, of which the first is taken"].examples == ("1 (dog)",)


def test_classes_of_one_name_can_be_told_apart(coco) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 4, "name": "cat"}, {"id": 5}]
    assert loaded(coco([{}], categories=categories)).classes == ("cat #1", "cat #4", "5")


def test_a_picture_whose_file_is_missing_is_left_out_counted_and_named(coco) -> None:
    annotated = loaded(coco([{}], images=[{"id": 1}, {"id": 2, "file_name": "gone.png", "missing": True}]))
    assert len(annotated) == 1
    assert annotated.faults["pictures whose file is missing, left out"].examples == ("picture 2 (gone.png)",)


def test_pictures_that_say_too_little_are_left_out_and_named(coco) -> None:
    annotated = loaded(coco([{}], images=[{"id": 1}, {"id": None}, {"id": 5, "file_name": ""}]))
    assert counts(annotated) == {"pictures without a whole number as id or without a file name, left out": 2}


def test_where_no_picture_can_be_used_the_error_says_what_is_wrong_with_all_of_them(coco) -> None:
    says = (
        r"none of the 3 pictures of .*instances\.json can be read from .*images: 2 pictures without a whole number "
        r"as id or without a file name, left out, such as the picture at place 0 \(id 'a1', 0\.png\); "
        r"1 pictures whose file is missing, left out, such as picture 7"
    )
    with pytest.raises(InputError, match=says):
        loaded(coco([{}], images=[{"id": "a1"}, {"id": "a2"}, {"id": 7, "missing": True}]))


def test_a_size_that_the_file_does_not_say_is_read_from_the_picture(coco, picture) -> None:
    picture("images/0.png", 12, 17)
    annotated = loaded(coco([{}], images=[{"id": 1, "height": 0, "width": None}]))
    assert (annotated.pictures[0].height, annotated.pictures[0].width) == (12, 17)


@pytest.mark.parametrize(
    "name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", "C:\\secret.png"]
)
def test_a_file_name_cannot_leave_the_folder(coco, picture, name) -> None:
    picture("secret.png", 20, 30)
    with pytest.raises(InputError, match=r"instances\.json, picture 2: the name .* leads out of the folder"):
        loaded(coco([{}], images=[{"id": 1}, {"id": 2, "file_name": name}]))


def test_names_may_lead_into_inner_folders_also_as_windows_writes_them(coco, picture) -> None:
    picture("images/deep/er/a.png", 20, 30)
    for name in ("deep/er/a.png", "./deep/er/a.png", "deep\\er\\a.png"):
        annotated = loaded(coco([{}], images=[{"id": 1, "file_name": name, "missing": True}]))
        assert annotated.pictures[0].path.name == "a.png"


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"images": "absent"}, "has no 'images'"),
        ({"categories": "absent"}, "has no 'categories'"),
        ({"categories": []}, "has no 'categories'"),
        ({"categories": [{"name": "cat"}]}, "the category at place 0 has no whole number"),
        ({"images": {}}, "'images' is no list"),
        ({"annotations": 5}, "'annotations' is no list"),
        ({"annotations": "absent"}, "has no 'annotations' but"),
        ({"annotations": [5]}, "the annotation at place 0 is 5"),
        ({"images": [None]}, "the picture at place 0 is None"),
        ({"images": []}, "it names none"),
        (
            {"images": [{"id": 1, "file_name": "gone.png"}]},
            r"1 pictures whose file is missing, left out, such as picture 1 \(gone\.png\)",
        ),
        (
            {"annotations": [{"bbox": [0, 0, 1, 1]}]},
            "none of the 1 annotations .* can be used: 1 annotations of unknown",
        ),
    ],
)
def test_a_file_that_makes_no_sense_as_a_whole_is_refused_by_name(coco, members, says) -> None:
    path = coco([{}])
    whole = {**json.loads(path.read_text()), **members}
    path.write_text(json.dumps({name: value for name, value in whole.items() if value != "absent"}))
    with pytest.raises(InputError, match=says) as error:
        loaded(path)
    assert path.name in str(error.value)


def test_a_missing_folder_of_pictures_is_named(coco) -> None:
    with pytest.raises(InputError, match="elsewhere does not exist"):
        CocoJson(coco([{}]), Path("elsewhere")).load()


BRIGHT = (4, 2, 9, 14)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_picture_annotated_as_its_file_lies_is_read_so_and_the_notes_say_it(coco, picture, orientation) -> None:
    """The camera was turned, and whoever annotated did not look at EXIF: boxes belong to the file's own pixels."""
    path = picture("images/0.png", 20, 30, orientation=orientation, bright=BRIGHT)
    annotated = loaded(coco([{}], images=[{"id": 1, "height": 20, "width": 30}]))
    assert "1 of 1 pictures are annotated as their files lie" in annotated.notes()[0]
    image = read_annotated(path, 1, (20, 30))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))
    left, top, right, bottom = BRIGHT
    assert np.asarray(image)[top:bottom, left:right].min() == 255


def test_a_picture_annotated_upright_is_turned(coco, picture) -> None:
    path = picture("images/0.png", 20, 30, orientation=6, bright=BRIGHT)
    annotated = loaded(coco([{}], images=[{"id": 1, "height": 30, "width": 20}]))
    assert annotated.notes() == ()
    wanted = np.rot90(np.asarray(Image.open(path)), -1)
    assert np.array_equal(np.asarray(read_annotated(path, 1, (30, 20))), wanted)


def test_a_picture_of_another_size_is_refused_with_both_sizes(coco, picture) -> None:
    path = picture("images/0.png", 10, 15)
    annotated = loaded(coco([{}], images=[{"id": 1, "height": 20, "width": 30}]))
    assert "1 of 1 pictures cannot be used" in annotated.notes()[0]
    for size in ((20, 30), (15, 10)):
        with pytest.raises(UnreadableError, match=f"it has 10 x 15 pixels, its annotations say {size[0]} x {size[1]}"):
            read_annotated(path, 1, size)


def test_pictures_are_divided_by_the_seed_alone(coco) -> None:
    annotated = loaded(coco([{}], images=[{"id": number + 1} for number in range(10)]))
    train, test = annotated.divided(0.3, seed=1)
    numbers = [[picture.number for picture in part.pictures] for part in (train, test)]
    assert [len(own) for own in numbers] == [7, 3]
    assert sorted([*numbers[0], *numbers[1]]) == list(range(1, 11))
    assert [picture.number for picture in annotated.divided(0.3, seed=1)[1].pictures] == numbers[1]
    assert [picture.number for picture in annotated.divided(0.3, seed=2)[1].pictures] != numbers[1]
    with pytest.raises(InputError, match="1 pictures, wanted two"):
        annotated.chosen([0]).divided()
