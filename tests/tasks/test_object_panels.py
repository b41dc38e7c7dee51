import json

import torch

from synchromesh.data.annotation import Annotation
from synchromesh.data.instances import Instances
from synchromesh.data.scores.boxes import ObjectNumbers, ObjectScores
from synchromesh.data.scores.coco import TWELVE
from synchromesh.data.scores.rle import encoded
from synchromesh.tasks.object_panels import object_details, object_panels
from synchromesh.training.codec import decode, encode
from synchromesh.training.panels import Bars, Curves, Panel, Sheet

BOX = (0.0, 0.0, 10.0, 10.0)


class Square:
    """The region of the box."""

    def mask(self, height: int, width: int):
        pixels = torch.zeros(height, width, dtype=torch.bool)
        pixels[:10, :10] = True
        return pixels.numpy()

    def moved(self, move: object):
        raise AssertionError("scores are of whole pictures")


def scored(*, masks: bool) -> ObjectNumbers:
    """A cat that is found, its mask only to three fifths, and a dog that is not."""
    scores = ObjectScores(("cat", "dog", "owl"), masks=masks)
    objects = [Annotation(BOX, label, Square(), area=100.0) for label in (0, 1)]
    found = Instances(torch.tensor([BOX]), torch.tensor([0]), torch.tensor([0.9]))
    part = torch.zeros(1, 32, 32, dtype=torch.bool)
    part[0, :10, :6] = True
    scores.add(objects, found, height=32, width=32, rles=encoded(part))
    return scores.numbers([scores.state()])


def test_details_are_plain_and_lose_no_number() -> None:
    numbers = scored(masks=True)
    details = object_details(numbers)
    assert json.loads(json.dumps(details)) == details
    assert numbers.masks is not None
    assert details["objects"] == 2
    for kind, prefix, own in (("boxes", "", numbers.boxes), ("masks", "mask_", numbers.masks)):
        assert details[kind] == own.twelve
        assert details[f"{prefix}AP_by_class"] == own.by_class
        for iou, points in own.curves.items():
            assert details[f"{prefix}precision"][iou] == [round(precision, 4) for _, precision in points]
    assert details["AP_by_class"] == {"cat": 1, "dog": 0, "owl": None}
    assert set(object_details(scored(masks=False))) == {"objects", "boxes", "AP_by_class", "precision"}


def test_panels_show_all_twelve_numbers_classes_and_curves_of_boxes_and_masks() -> None:
    sheet, bars, curves = object_panels(object_details(scored(masks=True)))
    assert isinstance(sheet, Sheet)
    assert sheet.columns == ("number", "what", "boxes", "masks")
    assert tuple(name for name, *_ in sheet.rows) == TWELVE
    assert sheet.rows[0] == (
        "AP",
        "average precision over IoU 0.50 to 0.95",
        "0.500",
        "0.150",
    )  # of ten thresholds the mask reaches three
    assert sheet.rows[4] == ("APm", "of objects up to 96² pixels", "-", "-")
    assert isinstance(bars, Bars)
    assert bars.labels == ("cat", "dog", "owl")
    assert bars.series["boxes"] == (1, 0, 0)
    assert isinstance(curves, Curves)
    assert list(curves.series) == ["boxes, IoU 0.50", "boxes, IoU 0.75", "masks, IoU 0.50", "masks, IoU 0.75"]
    assert curves.series["boxes, IoU 0.75"] == tuple((n / 100, 0.5) for n in range(101))
    assert curves.series["masks, IoU 0.75"] == tuple((n / 100, 0.0) for n in range(101))


def test_panels_without_masks_do_not_speak_of_them_and_survive_the_summary() -> None:
    panels = object_panels(object_details(scored(masks=False)))
    sheet, bars, curves = panels
    assert isinstance(sheet, Sheet)
    assert isinstance(bars, Bars)
    assert isinstance(curves, Curves)
    assert sheet.columns == ("number", "what", "boxes")
    assert list(bars.series) == ["boxes"]
    assert list(curves.series) == ["boxes, IoU 0.50", "boxes, IoU 0.75"]
    read = json.loads(json.dumps([encode(panel) for panel in panels]))
    assert tuple(decode(Panel, panel) for panel in read) == panels


def test_panels_of_nothing_to_find_are_empty() -> None:
    scores = ObjectScores(("cat",))
    sheet, _, curves = object_panels(object_details(scores.numbers([scores.state()])))
    assert isinstance(sheet, Sheet)
    assert isinstance(curves, Curves)
    assert {row[2] for row in sheet.rows} == {"-"}
    assert curves.series == {}
