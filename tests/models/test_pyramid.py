"""What staged backbones share, each part against what it is said to be, written out."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from synchromesh.models.focalnet import FocalNetConfig
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.pyramid import (
    Block,
    DropPath,
    LayerScale,
    Mixer,
    MixerBlock,
    PatchEmbedding,
    PatchProjection,
    Pyramid,
    Stage,
    drop_path_rate,
    post_norm,
    pre_norm,
    run_blocks,
    with_hidden,
)
from synchromesh.models.swin_v2 import SwinBlock, SwinStage, SwinV2, SwinV2Config
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.layer import MoE
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

SMALL = FocalNetConfig(
    image_size=16, embed_dim=4, depths=(1, 1), focal_levels=(1, 1), focal_windows=(3, 3), drop_path=0.0
)


class Shift(Mixer):
    """Gives each position its left neighbour."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, 2)

    def multiply_adds(self, height: int, width: int, channels: int) -> float:
        return 7.0


def block(**changes) -> MixerBlock:
    built = MixerBlock(Shift(), 3, ffn=nn.Linear(3, 3), **changes).double()
    randomise(built)
    return built


@pytest.mark.parametrize("scaled", [None, 0.5])
@pytest.mark.parametrize("residual", [pre_norm, post_norm])
def test_a_block_mixes_then_feeds_forward_each_in_a_branch(residual, scaled: float | None) -> None:
    own = block(residual=residual, layer_scale=scaled)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    first, second = (1, 1) if own.scale1 is None or own.scale2 is None else (own.scale1.weight, own.scale2.weight)
    if residual is pre_norm:
        wanted = x + first * own.norm1(x).roll(1, 2)
        wanted = wanted + second * own.ffn(own.norm2(wanted))
    else:
        wanted = x + first * own.norm1(x.roll(1, 2))
        wanted = wanted + second * own.norm2(own.ffn(wanted))
    assert_close("block", own(x), wanted)
    assert own.multiply_adds(4, 5, 3) == 7 + 20 * (2 * 3 + 9) + (0 if scaled is None else 2 * 60)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_residual_in_place_gives_the_numbers_of_one_with_gradients(autocast: bool) -> None:
    own, x = nn.LayerNorm(6), torch.randn(2, 4, 6, dtype=torch.bfloat16 if autocast else torch.float32)
    randomise(own)
    branch, kept = nn.Linear(6, 6), x.clone()

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return post_norm(x, branch, own, DropPath(0.5).eval())

    with torch.no_grad():
        got = step()
    wanted = step()
    assert got.dtype == wanted.dtype
    assert_close("residual", got, wanted)
    assert torch.equal(x, kept)


def test_what_a_hook_saw_of_a_norm_is_not_written_to() -> None:
    own, seen = nn.LayerNorm(6), []
    own.register_forward_hook(lambda _m, _i, output: seen.append((output, output.clone())))
    with torch.no_grad():
        post_norm(torch.randn(2, 6), nn.Identity(), own, DropPath(0.0))
    assert torch.equal(*seen[0])


def test_positions_without_a_picture_are_zero_to_mixers_and_unseen_by_experts() -> None:
    experts = ExpertsConfig(num_experts=2, blocks=((0,), ()), capacity=Dropless())
    backbone = dataclasses.replace(SMALL, experts=experts).build().double().eval()
    layer = next(module for module in backbone.modules() if isinstance(module, MoE))
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _m, _i, given, _o: seen.append(given["mask"]), with_kwargs=True)
    x, mask = torch.randn(1, 3, 16, 16, dtype=torch.float64), torch.ones(1, 16, 16, dtype=torch.bool)
    mask[:, :, 8:] = False
    found = backbone(x, mask=mask)
    assert seen[0].tolist() == [[[True, True, False, False]] * 4]
    assert [bool(part[:, :, :, part.shape[3] // 2 :].any()) for part in found.maps] == [False, False]
    assert_close("pooled", found.pooled, found.last[:, :, :1].mean((1, 2)))
    other = torch.where(mask[:, None], x, 5.0)
    assert_close("without its padding", backbone(other, mask=mask).pooled, found.pooled)
    with pytest.raises(ValueError, match="a mask that leaves a picture without a pixel"):
        backbone(x, mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match=r"got a mask of torch\.float32"):
        backbone(x, mask=mask.float())


def test_drop_path_drops_whole_images_and_keeps_the_mean() -> None:
    drop, x = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = drop(x)
    kept = dropped[:, 0, 0] != 0
    assert torch.equal(dropped[kept], torch.full_like(dropped[kept], 1 / 0.75))
    assert not dropped[~kept].any()
    assert float(dropped.mean()) == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    assert [drop_path_rate(0.3, (1, 3), *at) for at in ((0, 0), (1, 0), (1, 2))] == pytest.approx([0, 0.1, 0.3])
    assert drop_path_rate(0.3, (1,), 0, 0) == 0


def test_a_layer_scale_starts_as_said_and_starts_again() -> None:
    scale = LayerScale(3, 1e-4)
    assert torch.equal(scale(torch.ones(2, 3)), torch.full((2, 3), 1e-4))
    randomise(scale)
    scale.initialize(0.02)
    assert torch.equal(scale.weight, torch.full((3,), 1e-4))


def test_patches_pad_on_the_right_and_at_the_bottom() -> None:
    cut, x = PatchProjection(2, 4, 3).double(), torch.randn(1, 4, 7, 2, dtype=torch.float64)
    padded = torch.zeros(1, 6, 9, 2, dtype=torch.float64)
    padded[:, :4, :7] = x
    assert cut(x).shape == (1, 2, 3, 4)
    assert torch.equal(cut(x), cut(padded))
    for row, column in ((0, 0), (1, 2)):
        square = padded[0, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].permute(2, 0, 1)
        wanted = cut.norm((cut.proj.weight * square).sum((1, 2, 3)) + cut.proj.bias)
        assert_close("patch", cut(x)[0, row, column], wanted)
    assert cut.multiply_adds(2, 3) == 6 * (2 * 9 * 4 + 4)


def test_an_embedding_refuses_wrong_channels_and_hides() -> None:
    embed = PatchEmbedding(3, 4, 2, mask_token=True)
    hidden = torch.tensor([[True, False, False, True]])
    got, plain = embed(torch.ones(1, 3, 4, 4), hidden), embed(torch.ones(1, 3, 4, 4))
    assert torch.equal(got[0, 0, 1], plain[0, 0, 1])
    assert torch.equal(got[0, 1, 1], embed.mask_token)
    with pytest.raises(ValueError, match="images have 1 channels, wanted 3"):
        embed(torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"hidden has shape \(1, 3\), wanted \(1, 4\)"):
        with_hidden(plain, hidden[:, :3], embed.mask_token)
    with pytest.raises(ValueError, match="no mask token"):
        with_hidden(plain, hidden, None)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    blocks, x = [block(), block()], torch.randn(1, 4, 5, 3, dtype=torch.float64)
    found = []
    for checkpointed in (False, True):
        for own in blocks:
            own.zero_grad()
        run_blocks(blocks, x, checkpointed=checkpointed).square().sum().backward()
        found.append([{name: g.clone() for name, g in gradients(own).items()} for own in blocks])
    for plain, again in zip(*found, strict=True):
        assert plain.keys() == again.keys()
        assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_swinv2_stands_on_it_under_the_names_of_its_tensors() -> None:
    model = SwinV2Config(image_size=16, embed_dim=4, depths=(1, 1), num_heads=(1, 1), window_size=2).build()
    assert isinstance(model, Pyramid)
    assert isinstance(model, SwinV2)
    assert all(isinstance(stage, SwinStage) and isinstance(stage, Stage) for stage in model.stages)
    assert all(isinstance(b, Block) for b in model.modules() if isinstance(b, SwinBlock))
    own = "attention.q_bias attention.v_bias attention.qkv.weight attention.kernel.log_scale "
    own += "attention.position_bias.mlp.0.weight attention.position_bias.mlp.0.bias "
    own += "attention.position_bias.mlp.2.weight attention.proj.weight attention.proj.bias norm1.weight norm1.bias "
    own += "ffn.up.weight ffn.up.bias ffn.down.weight ffn.down.bias norm2.weight norm2.bias"
    wanted = [
        *("embed.proj.weight", "embed.proj.bias", "embed.norm.weight", "embed.norm.bias"),
        *(f"stages.0.blocks.0.{name}" for name in own.split()),
        *("stages.0.merge.reduction.weight", "stages.0.merge.norm.weight", "stages.0.merge.norm.bias"),
        *(f"stages.1.blocks.0.{name}" for name in own.split()),
        *("norm.weight", "norm.bias"),
    ]
    assert list(model.state_dict()) == wanted  # in this order: an optimizer's state is kept by number
