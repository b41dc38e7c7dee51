"""What reports and `eval` show of objects that were found: COCO's numbers, AP of each class, precision and recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from synchromesh.data.scores.boxes import ObjectNumbers
from synchromesh.data.scores.coco import TWELVE, CocoNumbers
from synchromesh.tasks.object_confusion import confusion_sheet
from synchromesh.training.panels import Bars, Curves, Panel, Sheet

_SAID = dict(
    zip(
        TWELVE,
        (
            *("average precision over IoU 0.50 to 0.95", "at IoU 0.50", "at IoU 0.75"),
            *("of objects up to 32² pixels", "of objects up to 96² pixels", "of larger objects"),
            *("average recall with 1 result for each class of a picture", "with 10 results", "with 100 results"),
            *("of objects up to 32² pixels", "of objects up to 96² pixels", "of larger objects"),
        ),
        strict=True,
    )
)


def object_details(numbers: ObjectNumbers) -> dict[str, Any]:
    """Return numbers as plain JSON values.

        objects          how many there were to find
        boxes            COCO's twelve numbers, by the overlap of boxes
        AP_by_class      of each class
        precision        by IoU, the best precision at recall 0.00, 0.01 to 1.00 or higher, mean over classes

    Where masks were scored: masks, mask_AP_by_class and mask_precision. None stands where there was nothing to find.
    """
    masks = {} if numbers.masks is None else _details("masks", "mask_", numbers.masks)
    return {"objects": numbers.objects, **_details("boxes", "", numbers.boxes), **masks}


def object_panels(details: Mapping[str, Any]) -> Sequence[Panel]:
    """Return the panels of what `object_details` made, and of what was `confused` where that is known."""
    kinds = {"boxes": ""} if "masks" not in details else {"boxes": "", "masks": "mask_"}
    rows = [(name, said, *(_cell(details[kind][name]) for kind in kinds)) for name, said in _SAID.items()]
    classes = {kind: details[f"{prefix}AP_by_class"] for kind, prefix in kinds.items()}
    heights = {kind: tuple(ap or 0.0 for ap in own.values()) for kind, own in classes.items()}
    curves = {
        f"{kind}, {iou}": tuple((n / (len(own) - 1), precision) for n, precision in enumerate(own))
        for kind, prefix in kinds.items()
        for iou, own in details[f"{prefix}precision"].items()
    }
    taken = (confusion_sheet(details["confused"]),) if "confused" in details else ()
    return (
        *taken,
        Sheet("As COCO scores it", ("number", "what", *kinds), tuple(rows)),
        Bars("AP of each class", "class", "AP", tuple(classes["boxes"]), heights),
        Curves("Precision and recall", "recall", "precision", curves),
    )


def _details(kind: str, prefix: str, numbers: CocoNumbers) -> dict[str, Any]:
    return {
        kind: dict(numbers.twelve),
        f"{prefix}AP_by_class": dict(numbers.by_class),
        f"{prefix}precision": {
            iou: [round(precision, 4) for _, precision in points] for iou, points in numbers.curves.items()
        },
    }


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
