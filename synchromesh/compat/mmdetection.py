"""Weights of mmdetection's Cascade Mask R-CNN, 2.x and 3.x, under the names of a `CascadeDetector`.

    backbone.*                                      Microsoft's names of a Swin, see compat/swin.py
    backbone.norm{i}                                of the map of stage i; the last one is our backbone's own
    neck.{lateral_convs,fpn_convs}.{i}.conv         pyramid.{sides,smooth}.{i}
    rpn_head.{rpn_conv,rpn_cls,rpn_reg}             proposals.{conv,objectness,deltas}
    roi_head.bbox_head.{s}.shared_convs.{i}.conv    boxes.{s}.convs.{i}.conv; behind it .bn or .gn for .norm
    roi_head.bbox_head.{s}.shared_fcs.{i}           boxes.{s}.linears.{i}
    roi_head.bbox_head.{s}.{fc_cls,fc_reg}          boxes.{s}.{scores,deltas}
    roi_head.mask_head.{s}.convs.{i}.conv           masks.{s}.convs.{i}
    roi_head.mask_head.{s}.{upsample,conv_logits}   masks.{s}.{upsample,logits}

`fc_reg` has four deltas or, with mmdetection's `reg_class_agnostic=False`, four for each class, class by class, as ours
with `BoxStages(class_agnostic=False)`. Detectors of one stage, Faster and Mask R-CNN, have these names without {s}.

No tensor changes: as in ours, the class of nothing is the last one, and a square of features is flattened channel by
channel. 3.x adds `data_preprocessor.*`, which is left out: pictures are normalised elsewhere.

The first Swin, whose checkpoints are the published ones, has tables of position biases, which no backbone here has: it
is refused by the name of such a table. mmdetection takes the mean of the stages' logits where we take that of their
probabilities, as Cascade R-CNN does, and as many points in a bin as it has cells: scores differ a little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from synchromesh.compat.swin_names import from_released
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeDetector

_NAMED = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"neck\.lateral_convs\.(\d+)\.conv\.(\w+)", r"pyramid.sides.\1.\2"),
        (r"neck\.fpn_convs\.(\d+)\.conv\.(\w+)", r"pyramid.smooth.\1.\2"),
        (r"rpn_head\.rpn_conv\.(\w+)", r"proposals.conv.\1"),
        (r"rpn_head\.rpn_cls\.(\w+)", r"proposals.objectness.\1"),
        (r"rpn_head\.rpn_reg\.(\w+)", r"proposals.deltas.\1"),
        (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.conv\.(\w+)", r"boxes.\1.convs.\2.conv.\3"),
        (r"roi_head\.bbox_head\.(\d+)\.shared_convs\.(\d+)\.[bg]n\.(\w+)", r"boxes.\1.convs.\2.norm.\3"),
        (r"roi_head\.bbox_head\.(\d+)\.shared_fcs\.(\d+)\.(\w+)", r"boxes.\1.linears.\2.\3"),
        (r"roi_head\.bbox_head\.(\d+)\.fc_cls\.(\w+)", r"boxes.\1.scores.\2"),
        (r"roi_head\.bbox_head\.(\d+)\.fc_reg\.(\w+)", r"boxes.\1.deltas.\2"),
        (r"roi_head\.mask_head\.(\d+)\.convs\.(\d+)\.conv\.(\w+)", r"masks.\1.convs.\2.\3"),
        (r"roi_head\.mask_head\.(\d+)\.upsample\.(\w+)", r"masks.\1.upsample.\2"),
        (r"roi_head\.mask_head\.(\d+)\.conv_logits\.(\w+)", r"masks.\1.logits.\2"),
    )
)
_MAP_NORM = re.compile(r"backbone\.norm(\d+)\.(\w+)")
_ONE_STAGE = re.compile(r"(roi_head\.(?:bbox|mask)_head\.)(?!\d)")
_LEFT_OUT = "data_preprocessor."


def from_mmdetection(state: Mapping[str, Tensor], model: CascadeDetector) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint for `model.load_state_dict`: all that the model has, and nothing else.

    Args:
        state: what mmdetection's file holds under `state_dict`.
        model: with the stages, norms, widths and classes of the checkpoint: `BoxStages(convs=0, linears=2)` for
            `Shared2FCBBoxHead`, `norm=Norm.SYNC_BATCH` for `SyncBN`, `class_agnostic=False` for
            `reg_class_agnostic=False`; one overlap, weight and std for Faster and Mask R-CNN.

    Raises:
        ValueError: there is a tensor that the model does not have, one is missing, or has another shape.
    """
    if state and all(key.startswith("module.") for key in state):  # written by a model that several ranks trained
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if any(key.startswith("bbox_head.") for key in state):
        raise ValueError(
            "got weights of mmdetection 1.x (bbox_head without roi_head), whose first class is nothing: "
            "wanted those of 2.x or 3.x; its tools/model_converters/upgrade_model_version.py makes them"
        )
    last = len(model.strides) - 1
    found: dict[str, Tensor] = {}
    released: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in state.items():
        if key.startswith(_LEFT_OUT):
            continue
        name = _our_name(key, last)
        if name is not None:
            found[name] = tensor
        elif key.startswith("backbone."):
            released[key.removeprefix("backbone.")] = tensor
        else:
            unknown.append(key)
    found |= from_released(released)
    _check(found, unknown, model.state_dict())
    return found


def _our_name(key: str, last: int) -> str | None:
    """Return our name of a tensor of pyramid and heads; None for others."""
    norm = _MAP_NORM.fullmatch(key)
    if norm is not None:
        return f"backbone.norm.{norm[2]}" if int(norm[1]) == last else f"pyramid.norms.{norm[1]}.{norm[2]}"
    key = _ONE_STAGE.sub(r"\g<1>0.", key)
    for theirs, ours in _NAMED:
        if theirs.fullmatch(key):
            return theirs.sub(ours, key)
    return None


def _check(found: Mapping[str, Tensor], unknown: Sequence[str], own: Mapping[str, Tensor]) -> None:
    said = [f"the model has no place for {key}" for key in unknown]
    said += [f"the model has no {name}" for name in found if name not in own]
    said += [f"{name} is missing" for name in own if name not in found]
    for name in own:
        if name in found and found[name].shape != own[name].shape:
            got, wanted = tuple(found[name].shape), tuple(own[name].shape)
            said.append(f"{name} has shape {got}, wanted {wanted}{_why(name, got, wanted)}")
    if said:
        more = f" and {len(said) - 3} more" if len(said) > 3 else ""
        raise ValueError(
            f"the weights do not fit the model: {'; '.join(said[:3])}{more}; "
            "wanted a model of the same stages, layers, norms, widths and classes"
        )


def _why(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Return which setting decides about a shape that does not fit; nothing where none is known."""
    if not re.fullmatch(r"boxes\.\d+\.deltas\.\w+", name) or 4 not in (got[0], wanted[0]):
        return ""
    return f" (as with BoxStages(class_agnostic={got[0] == 4}))"
