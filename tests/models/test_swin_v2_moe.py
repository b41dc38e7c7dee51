"""Blocks of both styles against their definition, and where and how experts stand in a model."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import CosineGate, ExpertsConfig
from synchromesh.models.swin_v2 import SWIN_MOE, SWIN_V2, BlockStyle, SwinBlock, SwinV2Config
from synchromesh.models.swin_v2_moe import (
    DEMO,
    config_b,
    config_s,
    swin_v2_demo,
    swin_v2_moe,
    swin_v2_moe_demo,
)
from synchromesh.moe.capacity import FixedCapacity
from synchromesh.moe.layer import MoE, routing_options
from synchromesh.moe.record import aux_loss, load_stats
from synchromesh.moe.routing import CosineRouter
from synchromesh.testing.compare import assert_close

SMALL = SwinV2Config(image_size=32, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, drop_path=0.0)
ONE_EXPERT = ExpertsConfig(num_experts=1, blocks=((), (0, 1)), capacity=FixedCapacity(1.0), dropout=0.0, down_bias=True)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)


def attention_by_definition(block: SwinBlock, x: Tensor, style: BlockStyle) -> Tensor:
    """Attend pair by pair: two positions meet if the grid of windows, moved by the shift, has them in one cell."""
    attention, side, shift = block.attention, block.side, block.shift
    heads, size, width = attention.kernel.num_heads, x.shape[1], x.shape[3]
    place = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    cell = (place + side - shift) // side if shift else place // side
    meet = (cell[:, None] == cell[None, :]).all(-1)
    offset = (place[:, None] - place[None, :]).clamp(1 - side, side - 1).double()
    spaced = offset.sign() * (1 + 8 * offset.abs() / (side - 1)).log2() / 3
    bias = attention.position_bias.mlp(spaced).permute(2, 0, 1)
    bias = 16 * bias.sigmoid() if style is SWIN_V2 else bias
    qkv = x.flatten(1, 2) @ attention.qkv.weight.T
    if style is SWIN_V2:
        qkv = qkv + torch.cat((attention.q_bias, torch.zeros(width, dtype=x.dtype), attention.v_bias))
    else:
        qkv = qkv + attention.qkv.bias
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    if style is SWIN_V2:
        cosine = F.cosine_similarity(q[:, :, :, None], k[:, :, None, :], dim=-1)
        scores = cosine * attention.kernel.log_scale.clamp(max=math.log(100)).exp() + bias
    else:
        scores = q @ k.mT / math.sqrt(width // heads) + bias
    weights = scores.masked_fill(~meet, -math.inf).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2)).view(x.shape)


@pytest.mark.parametrize("style", [SWIN_V2, SWIN_MOE], ids=["true", "released hybrid"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_equals_its_definition(style: BlockStyle, index: int) -> None:
    config = dataclasses.replace(SMALL, style=style)
    block = SwinBlock(config, 0, index, ffn=config.ffn()(0, index, 16))
    randomise(block)
    block.double()
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    if style is SWIN_V2:
        wanted = x + block.norm1(attention_by_definition(block, x, style))
        wanted = wanted + block.norm2(block.ffn(wanted))
    else:
        wanted = x + attention_by_definition(block, block.norm1(x), style)
        wanted = wanted + block.ffn(block.norm2(wanted))
    with torch.no_grad():
        block.attention.position_bias.reset_buffers()  # float32 coordinates, rounded; compare with the exact ones below
        exact = torch.arange(1 - block.side, block.side, dtype=torch.float64)
        exact = exact.sign() * (1 + 8 * exact.abs() / (block.side - 1)).log2() / 3
        block.attention.position_bias.coordinates.copy_(torch.cartesian_prod(exact, exact))
    assert_close("block", block(x), wanted)


def test_published_models_have_ten_layers_of_experts() -> None:
    for config in (config_s(), config_b()):
        with torch.device("meta"):
            model = swin_v2_moe(config, 10, experts=ExpertsConfig(num_experts=4))
        found = [
            (stage, index)
            for stage, blocks in enumerate(part.blocks for part in model.backbone.stages)
            for index, block in enumerate(blocks)
            if isinstance(block.ffn, MoE)
        ]
        assert found == [(2, i) for i in range(1, 18, 2)] + [(3, 1)]


def test_one_expert_is_the_dense_model() -> None:
    dense = Classifier(SMALL.build(), 5)
    randomise(dense)
    experts = swin_v2_moe(SMALL, 5, experts=ONE_EXPERT)
    state = dict(dense.state_dict())
    for block in (0, 1):
        ffn, moe = (f"backbone.stages.1.blocks.{block}.ffn.{part}" for part in ("", "experts."))
        state[f"{moe}up"] = state.pop(f"{ffn}up.weight")[None]
        state[f"{moe}up_bias"] = state.pop(f"{ffn}up.bias")[None]
        state[f"{moe}down"] = state.pop(f"{ffn}down.weight").T[None]
        state[f"{moe}down_bias"] = state.pop(f"{ffn}down.bias")[None]
    missing, unexpected = experts.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".router." in name for name in missing)
    x = torch.randn(2, 3, 32, 32)
    wanted, got = dense(x), experts(x)
    assert_close("logits", got, wanted)
    dy = torch.randn_like(wanted)
    wanted.backward(dy)
    got.backward(dy)
    shared = dict(experts.named_parameters())
    for name, p in dense.named_parameters():
        if name in shared and "blocks" in name:
            assert_close(f"gradient of {name}", shared[name].grad, p.grad)
    up = dense.backbone.stages[1].blocks[0].ffn.up.weight.grad
    assert_close("gradient of up", shared["backbone.stages.1.blocks.0.ffn.experts.up"].grad, up[None])


def test_training_reports_loads_and_losses_of_every_layer() -> None:
    model = swin_v2_moe_demo()
    model(torch.randn(4, 1, 28, 28)).sum().backward()
    assert float(aux_loss(model).detach()) > 0
    loads = load_stats(model)
    assert len(loads) == 2
    assert all(int(load.tokens_per_expert.sum()) == 4 * 16 for load in loads.values())


def test_choices_per_call_reach_the_experts() -> None:
    model = swin_v2_moe_demo().eval()
    x = torch.randn(2, 1, 28, 28)
    one = model(x)
    with routing_options(model, k=2):
        two = model(x)
    assert not torch.allclose(one, two)
    assert torch.equal(model(x), one)


def test_cosine_routers_are_built() -> None:
    experts = dataclasses.replace(ONE_EXPERT, num_experts=4, router=CosineGate(dim=8))
    model = swin_v2_moe(SMALL, 5, experts=experts)
    assert sum(isinstance(module, CosineRouter) for module in model.modules()) == 2
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("build", [swin_v2_demo, swin_v2_moe_demo])
def test_reset_after_meta_fills_weights_and_buffers(build) -> None:
    with torch.device("meta"):
        model = build()
    model = model.to_empty(device="cpu")
    model.reset_parameters()
    fresh = build()
    buffers = dict(model.named_buffers())
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    wanted = fresh.state_dict()
    for name, got in model.state_dict().items():
        assert got.isfinite().all(), name
        assert float(got.std(correction=0)) == pytest.approx(float(wanted[name].std(correction=0)), rel=0.5, abs=0.01)


def test_weights_start_as_truncated_normals_of_the_configured_width() -> None:
    config = dataclasses.replace(DEMO, init_std=0.005, branch_norm_init=0.0, style=SWIN_V2)
    model = swin_v2_moe_demo(config=config)
    block = model.backbone.stages[1].blocks[1]
    for weight in (block.ffn.experts.up, block.ffn.experts.down, block.ffn.router.weight, block.attention.qkv.weight):
        assert float(weight.detach().std()) == pytest.approx(0.005, rel=0.1)
    assert not block.ffn.experts.up_bias.any()
    assert not block.norm1.weight.any()
    assert not block.norm2.weight.any()


def test_the_demo_learns_sixteen_images_by_heart() -> None:
    model = swin_v2_moe_demo(config=dataclasses.replace(DEMO, drop_path=0.0))
    images, labels = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        (loss + aux_loss(model)).backward()
        optimizer.step()
    assert float(F.cross_entropy(model.eval()(images), labels).detach()) < 0.1


@pytest.mark.parametrize("blocks", [((), (2,)), ((), (-1,)), ((),)])
def test_experts_in_a_block_that_is_not_there_are_refused(blocks: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="experts in blocks"):
        swin_v2_moe(SMALL, 5, experts=dataclasses.replace(ONE_EXPERT, blocks=blocks))


@pytest.mark.parametrize("build", [swin_v2_demo, swin_v2_moe_demo])
@pytest.mark.parametrize("style", [SWIN_V2, DEMO.style])
def test_a_batch_without_images_gives_no_logits_and_no_error(build, style) -> None:
    model = build(config=dataclasses.replace(DEMO, style=style))
    logits = model(torch.randn(0, 1, 32, 32))
    assert logits.shape == (0, 10)
    logits.sum().backward()
