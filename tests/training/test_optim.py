import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from synchromesh.models.mixtures import CosineGate, ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SWIN_MOE, SWIN_V2, SwinV2Config
from synchromesh.models.swin_v2_moe import swin_v2_moe
from synchromesh.training.optim import (
    Optim,
    Schedule,
    build_optimizer,
    make_schedule,
    parameter_groups,
    set_learning_rate,
)


@pytest.mark.parametrize("style", [SWIN_V2, SWIN_MOE])
@pytest.mark.parametrize("gate", [LinearGate(), CosineGate(dim=8)])
def test_only_matrices_of_linear_layers_and_experts_decay(style: object, gate: object) -> None:
    config = SwinV2Config(
        image_size=8, patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4,
        pretrained_window_sizes=(0, 0), mask_token=True, style=style,
    )  # fmt: skip
    model = swin_v2_moe(config, 5, experts=ExpertsConfig(num_experts=4, blocks=((), (1,)), router=gate, down_bias=True))
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    with_decay = {names[id(p)] for p in decayed["params"]}
    without = {names[id(p)] for p in plain["params"]}
    assert with_decay | without == set(names.values())
    assert not with_decay & without
    wanted = {
        n for n in names.values() if n.endswith(("qkv.weight", "proj.weight", "ffn.up.weight", "ffn.down.weight"))
    }
    wanted |= {
        n for n in names.values() if n.endswith(("reduction.weight", "head.weight", "experts.up", "experts.down"))
    }
    wanted |= {n for n in names.values() if n.endswith("router.weight")}
    assert with_decay == wanted
    expert_biases = {n for n in without if n.endswith(("experts.up_bias", "experts.down_bias"))}
    assert len(expert_biases) == 2


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1, 1]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of Sequential requires a gradient"):
        build_optimizer(model, Optim())


def test_the_papers_schedule_at_batch_4096() -> None:
    rate = make_schedule(Optim(), batch_size=4096, steps_per_epoch=100, epochs=90)
    assert math.isclose(rate(0), 1e-6)
    assert math.isclose(rate(1000), 1e-3)
    assert math.isclose(rate(500), (1e-3 + 1e-6) / 2)
    assert math.isclose(rate(5000), (1e-3 + 1e-5) / 2)
    assert math.isclose(rate(9000), 1e-5)
    assert math.isclose(rate(12000), 1e-5)


def test_the_rate_rises_then_falls_without_a_jump() -> None:
    rate = Schedule(peak=1.0, start=0.1, end=0.01, warmup=10, total=100)
    values = [rate(step) for step in range(101)]
    assert all(a < b for a, b in pairwise(values[:11]))
    assert all(a > b for a, b in pairwise(values[10:]))
    assert max(abs(a - b) for a, b in pairwise(values)) < 0.1


def test_without_warm_up_the_peak_comes_first() -> None:
    assert Schedule(peak=1.0, start=0.0, end=0.0, warmup=0, total=4)(0) == 1.0


def test_decay_reaches_matrices_and_not_biases() -> None:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    optimizer = build_optimizer(model, Optim(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(model.weight, torch.full((2, 2), 0.95))
    assert torch.equal(model.bias, torch.ones(2))


def test_rates_fall_from_the_head_to_the_patches_as_swin_counts_layers() -> None:
    config = SwinV2Config(image_size=8, patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4)
    model = swin_v2_moe(config, 5, experts=ExpertsConfig(num_experts=4, blocks=((), (1,))))
    scale = {id(p): g["rate_scale"] for g in parameter_groups(model, 0.1, layer_decay=0.5) for p in g["params"]}
    named = {name: scale[id(p)] for name, p in model.named_parameters()}
    for part, above in (
        ("head.", 0), ("backbone.norm.", 0), ("backbone.stages.1.blocks.1.", 1), ("backbone.stages.1.blocks.0.", 2),
        ("backbone.stages.0.merge.", 3), ("backbone.stages.0.blocks.0.", 3), ("backbone.embed.", 4),
    ):  # fmt: skip
        assert {value for name, value in named.items() if name.startswith(part)} == {0.5**above}, part


def test_each_group_gets_its_own_rate() -> None:
    config = SwinV2Config(image_size=8, patch_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    optimizer = build_optimizer(swin_v2_moe(config, 5, experts=ExpertsConfig(blocks=((), ()))), Optim(layer_decay=0.5))
    set_learning_rate(optimizer, 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125}


def test_with_drops_the_rate_falls_to_a_tenth_at_each_and_stays() -> None:
    optim = Optim(lr=1e-4, warmup_lr=0.0, lr_batch=16, warmup_epochs=1.0, drops=(27.0, 33.0))
    rate = make_schedule(optim, batch_size=16, steps_per_epoch=10, epochs=36)
    wanted = {0: 0.0, 5: 5e-5, 10: 1e-4, 269: 1e-4, 270: 1e-5, 329: 1e-5, 330: 1e-6, 360: 1e-6}
    assert {step: rate(step) for step in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("drops", [(0.5,), (3.0, 2.0), (2.0, 2.0)])
def test_drops_in_the_warm_up_or_out_of_order_are_refused(drops: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"wanted rising epochs after the 1\.0 of warm-up"):
        Optim(warmup_epochs=1.0, drops=drops)
