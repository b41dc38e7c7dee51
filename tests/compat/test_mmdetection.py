"""mmdetection's names and shapes of a Cascade Mask R-CNN on a Swin, written down from its configuration."""

import re

import pytest
import torch
from torch import Tensor

from synchromesh.compat.mmdetection import from_mmdetection
from synchromesh.models.heads.cascade.box_stage import BoxStages, Norm
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeDetector, CascadeMaskRCNN
from synchromesh.models.swin_v2 import SWIN_MOE, SWIN_V2, BlockStyle, SwinV2Config

EMBED, DEPTHS, HEADS, WINDOW = 8, (1, 2, 1, 1), (1, 1, 2, 2), 4
WIDTH, HIDDEN, CLASSES, STAGES = 16, 24, 5, 3
FPN_CONVS = {"shared_convs": 2, "shared_fcs": 1}
TWO_FC = {"shared_convs": 0, "shared_fcs": 2}


def conv(name: str, inner: int, outer: int, side: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner, side, side), **({f"{name}.bias": (outer,)} if bias else {})}


def linear(name: str, inner: int, outer: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def backbone(style: BlockStyle) -> dict[str, tuple[int, ...]]:
    shapes = conv("backbone.patch_embed.proj", 3, EMBED, 4) | norm("backbone.patch_embed.norm", EMBED)
    for stage, depth in enumerate(DEPTHS):
        width = EMBED << stage
        for block in range(depth):
            own = f"backbone.layers.{stage}.blocks.{block}"
            shapes |= norm(f"{own}.norm1", width) | norm(f"{own}.norm2", width)
            shapes |= linear(f"{own}.attn.cpb_mlp.0", 2, 512)
            shapes[f"{own}.attn.cpb_mlp.2.weight"] = (HEADS[stage], 512)
            shapes[f"{own}.attn.qkv.weight"] = (3 * width, width)
            if style is SWIN_V2:
                shapes |= {f"{own}.attn.q_bias": (width,), f"{own}.attn.v_bias": (width,)}
                shapes[f"{own}.attn.logit_scale"] = (HEADS[stage], 1, 1)
            else:
                shapes[f"{own}.attn.qkv.bias"] = (3 * width,)
            shapes |= linear(f"{own}.attn.proj", width, width)
            shapes |= linear(f"{own}.mlp.fc1", width, 4 * width) | linear(f"{own}.mlp.fc2", 4 * width, width)
            shapes[f"{own}.attn.relative_position_index"] = (WINDOW**2, WINDOW**2)
            shapes[f"{own}.attn.relative_coords_table"] = (1, 2 * WINDOW - 1, 2 * WINDOW - 1, 2)
        if stage < 3:
            shapes[f"backbone.layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"backbone.layers.{stage}.downsample.norm", 2 * width if style is SWIN_V2 else 4 * width)
        shapes |= norm(f"backbone.norm{stage}", width)
    return shapes


def heads(kind: str, counts: dict[str, int], deltas: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for level in range(4):
        shapes |= conv(f"neck.lateral_convs.{level}.conv", EMBED << level, WIDTH, 1)
        shapes |= conv(f"neck.fpn_convs.{level}.conv", WIDTH, WIDTH, 3)
    shapes |= conv("rpn_head.rpn_conv", WIDTH, WIDTH, 3) | conv("rpn_head.rpn_cls", WIDTH, 3, 1)
    shapes |= conv("rpn_head.rpn_reg", WIDTH, 12, 1)
    for stage in range(STAGES):
        own = f"roi_head.bbox_head.{stage}"
        for i in range(counts["shared_convs"]):
            shapes |= conv(f"{own}.shared_convs.{i}.conv", WIDTH, WIDTH, 3, bias=not kind)
            shapes |= norm(f"{own}.shared_convs.{i}.{kind}", WIDTH) if kind else {}
            if kind == "bn":
                shapes |= {f"{own}.shared_convs.{i}.bn.{name}": (WIDTH,) for name in ("running_mean", "running_var")}
                shapes[f"{own}.shared_convs.{i}.bn.num_batches_tracked"] = ()
        for i in range(counts["shared_fcs"]):
            shapes |= linear(f"{own}.shared_fcs.{i}", HIDDEN if i else WIDTH * 49, HIDDEN)
        shapes |= linear(f"{own}.fc_cls", HIDDEN, CLASSES + 1) | linear(f"{own}.fc_reg", HIDDEN, deltas)
        own = f"roi_head.mask_head.{stage}"
        for i in range(4):
            shapes |= conv(f"{own}.convs.{i}.conv", WIDTH, WIDTH, 3)
        shapes |= conv(f"{own}.upsample", WIDTH, WIDTH, 2) | conv(f"{own}.conv_logits", WIDTH, CLASSES, 1)
    return shapes


def written(style: BlockStyle = SWIN_V2, kind: str = "bn", counts: dict[str, int] = FPN_CONVS) -> dict[str, Tensor]:
    shapes = backbone(style) | heads(kind, counts)
    return {name: torch.tensor(3) if name.endswith("tracked") else torch.randn(shape) for name, shape in shapes.items()}


def detector(
    style: BlockStyle = SWIN_V2, kind: Norm = Norm.SYNC_BATCH, convs: int = 2, linears: int = 1
) -> CascadeDetector:
    config = SwinV2Config(
        image_size=64, embed_dim=EMBED, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, style=style
    )
    boxes = BoxStages(hidden=HIDDEN, convs=convs, linears=linears, norm=kind)
    return CascadeMaskRCNN(width=WIDTH, boxes=boxes).build(config.build(), CLASSES)


def theirs(name: str) -> str:
    """The name that mmdetection has for one of our tensors."""
    if found := re.fullmatch(r"backbone\.norm\.(\w+)", name):
        return f"backbone.norm3.{found[1]}"
    pairs = (
        ("pyramid.norms.", "backbone.norm"),
        ("pyramid.sides.", "neck.lateral_convs."),
        ("pyramid.smooth.", "neck.fpn_convs."),
        ("proposals.conv.", "rpn_head.rpn_conv."),
        ("proposals.objectness.", "rpn_head.rpn_cls."),
        ("proposals.deltas.", "rpn_head.rpn_reg."),
        ("boxes.", "roi_head.bbox_head."),
        ("masks.", "roi_head.mask_head."),
        (".linears.", ".shared_fcs."),
        (".scores.", ".fc_cls."),
        (".deltas.", ".fc_reg."),
        (".logits.", ".conv_logits."),
        ("backbone.embed.", "backbone.patch_embed."),
        ("backbone.stages.", "backbone.layers."),
        (".merge.", ".downsample."),
        (".attention.position_bias.mlp.", ".attn.cpb_mlp."),
        (".attention.kernel.log_scale", ".attn.logit_scale"),
        (".attention.", ".attn."),
        (".ffn.up.", ".mlp.fc1."),
        (".ffn.down.", ".mlp.fc2."),
    )
    for ours, other in pairs:
        name = name.replace(ours, other)
    if name.startswith("neck."):
        name = re.sub(r"(\d+)\.(\w+)$", r"\1.conv.\2", name)
    if name.startswith("roi_head.mask_head."):
        name = re.sub(r"convs\.(\d+)\.(\w+)$", r"convs.\1.conv.\2", name)
    if name.startswith("roi_head.bbox_head."):
        name = name.replace(".convs.", ".shared_convs.")
    return name


CASES = [
    (SWIN_V2, "bn", Norm.SYNC_BATCH, FPN_CONVS),
    (SWIN_MOE, "gn", Norm.GROUP, FPN_CONVS),
    (SWIN_V2, "", Norm.NONE, FPN_CONVS),
    (SWIN_V2, "bn", Norm.SYNC_BATCH, TWO_FC),
]


@pytest.mark.parametrize(("style", "kind", "own", "counts"), CASES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_tensor_finds_its_place_and_back(style, kind, own, counts, prefix) -> None:
    state = written(style, kind, counts)
    model = detector(style, own, counts["shared_convs"], counts["shared_fcs"])
    given = {prefix + name: tensor for name, tensor in state.items()}
    given[f"{prefix}data_preprocessor.mean"] = torch.zeros(3, 1, 1)  # 3.x
    model.load_state_dict(from_mmdetection(given, model))
    back = {theirs(name).replace(".norm.", f".{kind}.") if "shared_convs" in theirs(name) else theirs(name): tensor
            for name, tensor in model.state_dict().items()}  # fmt: skip
    kept = {name for name in state if not name.endswith(("relative_position_index", "relative_coords_table"))}
    assert set(back) == kept
    assert all(torch.equal(back[name], state[name]) for name in kept)


@pytest.mark.parametrize("stages", [3, 1])
def test_boxes_of_each_class_and_detectors_of_one_stage_find_their_places(stages: int) -> None:
    """`reg_class_agnostic=False`; Faster and Mask R-CNN, whose names have no number of a stage."""
    state = backbone(SWIN_V2) | heads("", TWO_FC, deltas=4 * CLASSES)
    kept = {
        name: torch.randn(shape)
        for name, shape in state.items()
        if int((re.findall(r"_head\.(\d)", name) or [0])[0]) < stages
    }
    given = kept if stages > 1 else {re.sub(r"(roi_head\.\w+_head)\.0", r"\1", name): x for name, x in kept.items()}
    assert stages > 1 or "roi_head.bbox_head.fc_reg.weight" in given
    boxes = BoxStages(
        overlaps=(0.5, 0.6, 0.7)[:stages], weights=(1.0,) * stages, std=((0.1, 0.1, 0.2, 0.2),) * stages,
        hidden=HIDDEN, convs=0, linears=2, norm=Norm.NONE, class_agnostic=False,
    )  # fmt: skip
    config = SwinV2Config(
        image_size=64, embed_dim=EMBED, depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, style=SWIN_V2
    )
    model = CascadeMaskRCNN(width=WIDTH, boxes=boxes).build(config.build(), CLASSES)
    model.load_state_dict(from_mmdetection(given, model))
    for name, tensor in model.state_dict().items():
        if not name.startswith("backbone."):
            assert torch.equal(tensor, kept[theirs(name)]), name


def test_the_last_class_is_nothing_and_squares_are_flattened_channel_by_channel() -> None:
    """A box head as mmdetection runs it, step by step, on its own tensors."""
    state, model = written(kind="gn"), detector(kind=Norm.GROUP)
    model.load_state_dict(from_mmdetection(state, model))
    x = squares = torch.randn(3, WIDTH, 7, 7)
    own = "roi_head.bbox_head.1."
    for i in range(2):
        x = torch.nn.functional.conv2d(x, state[f"{own}shared_convs.{i}.conv.weight"], padding=1)
        weight, bias = (state[f"{own}shared_convs.{i}.gn.{name}"] for name in ("weight", "bias"))
        x = torch.nn.functional.group_norm(x, 16, weight, bias).relu()
    x = (x.flatten(1) @ state[f"{own}shared_fcs.0.weight"].T + state[f"{own}shared_fcs.0.bias"]).relu()
    said = model.boxes[1](squares)
    torch.testing.assert_close(said.logits, x @ state[f"{own}fc_cls.weight"].T + state[f"{own}fc_cls.bias"])
    torch.testing.assert_close(said.deltas, x @ state[f"{own}fc_reg.weight"].T + state[f"{own}fc_reg.bias"])
    assert said.logits.shape[1] == CLASSES + 1


def test_what_does_not_fit_is_named() -> None:
    model = detector()

    def refused(says: str, *left_out: str, **changes: Tensor) -> None:
        state = {name: tensor for name, tensor in written().items() if name not in left_out}
        with pytest.raises(ValueError, match=says):
            from_mmdetection(state | {name.replace("/", "."): tensor for name, tensor in changes.items()}, model)

    refused("no place for roi_head.semantic_head.weight", **{"roi_head/semantic_head/weight": torch.zeros(1)})
    refused(r"proposals\.conv\.bias is missing", "rpn_head.rpn_conv.bias")
    refused(r"the model has no boxes\.3\.scores\.bias", **{"roi_head/bbox_head/3/fc_cls/bias": torch.zeros(6)})
    refused("mmdetection 1.x", **{"bbox_head/0/fc_cls/bias": torch.zeros(6)})
    of_each = {"roi_head/bbox_head/0/fc_reg/weight": torch.zeros(4 * CLASSES, HIDDEN)}
    why = (
        r"boxes\.0\.deltas\.weight has shape \(20, 24\), wanted \(4, 24\) \(as with BoxStages\(class_agnostic=False\)\)"
    )
    refused(why, **of_each)
    table = {"backbone/layers/0/blocks/0/attn/relative_position_bias_table": torch.zeros(49, 1)}
    refused("tables of positions are the first Swin's", **table)
    refused(
        "no tensor 'stages.0.blocks.0.attn.w_msa.qkv.weight'",
        **{"backbone/stages/0/blocks/0/attn/w_msa/qkv/weight": torch.zeros(1)},
    )
    with pytest.raises(
        ValueError, match=r"the model has no boxes\.0\.convs\.0\.norm\.running_mean.* more; wanted a model"
    ):
        from_mmdetection(written(), detector(kind=Norm.GROUP))
    with pytest.raises(ValueError, match="is missing"):
        from_mmdetection({}, model)
