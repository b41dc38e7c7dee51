"""The published costs of SwinV2-MoE (arXiv 2206.03382, tables 11 and 12), reproduced without allocating a weight."""

import dataclasses

import pytest
import torch

from synchromesh.models.costs import costs
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import CosineGate, ExpertsConfig
from synchromesh.models.swin_v2 import SWIN_V2
from synchromesh.models.swin_v2_moe import (
    config_b,
    config_s,
    swin_v2_demo,
    swin_v2_moe_b,
    swin_v2_moe_demo,
    swin_v2_moe_s,
)
from synchromesh.moe.capacity import Dropless, FixedCapacity
from synchromesh.moe.layer import routing_options

BUILD = {"S": (config_s, swin_v2_moe_s), "B": (config_b, swin_v2_moe_b)}
TABLE_11 = [  # size, experts, k, capacity factor, million parameters, million active, GFLOPs
    ("S", 8, 1, 1.0, 173.3, 65.8, 6.76),
    ("S", 16, 1, 1.0, 296.1, 65.8, 6.76),
    ("S", 32, 1, 1.0, 541.8, 65.8, 6.76),
    ("S", 64, 1, 1.0, 1033.0, 65.8, 6.76),
    ("S", 128, 1, 1.0, 2016.0, 65.8, 6.76),
    ("B", 8, 1, 1.0, 300.3, 109.3, 11.78),
    ("B", 16, 1, 1.0, 518.7, 109.3, 11.78),
    ("B", 32, 1, 1.0, 955.3, 109.3, 11.78),
    ("B", 32, 2, 1.0, 955.3, 136.6, 14.80),  # table 11 prints 11.78 here, which is k = 2 at f = 0.5
    ("B", 32, 2, 0.625, 955.3, 136.6, 12.54),
]
TABLE_12 = [  # k, capacity factor, GFLOPs of B with 32 experts
    (1, 1.25, 12.54),
    (1, 1.0, 11.78),
    (1, 0.625, 10.65),
    (1, 0.5, 10.27),
    (2, 1.25, 16.31),
    (2, 1.0, 14.80),
    (2, 0.625, 12.54),
    (2, 0.5, 11.78),
]


def near(wanted: float) -> object:
    return pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize(("size", "millions", "gflops"), [("S", 65.8, 6.76), ("B", 109.3, 11.78)])
@pytest.mark.parametrize("true_style", [False, True])
def test_dense_models_cost_what_table_11_says(size: str, millions: float, gflops: float, true_style: bool) -> None:
    config = BUILD[size][0]()
    config = dataclasses.replace(config, style=SWIN_V2) if true_style else config
    with torch.device("meta"):
        got = costs(Classifier(config.build(), 21841))
    assert got.parameters / 1e6 == near(millions)
    assert got.active_parameters == got.parameters
    assert got.gflops == near(gflops)


@pytest.mark.parametrize(("size", "num_experts", "k", "factor", "millions", "active", "gflops"), TABLE_11)
def test_models_with_experts_cost_what_table_11_says(
    size: str, num_experts: int, k: int, factor: float, millions: float, active: float, gflops: float
) -> None:
    experts = ExpertsConfig(num_experts=num_experts, k=k, capacity=FixedCapacity(factor))
    with torch.device("meta"):
        got = costs(BUILD[size][1](experts=experts))
    assert got.parameters / 1e6 == near(millions)
    assert got.active_parameters / 1e6 == near(active)
    assert got.gflops == near(gflops)


def test_choices_per_call_cost_what_table_12_says() -> None:
    with torch.device("meta"):
        model = swin_v2_moe_b()
    for k, factor, gflops in TABLE_12:
        with routing_options(model, k=k, capacity=FixedCapacity(factor)):
            assert costs(model).gflops == near(gflops), (k, factor)


def test_cosine_routers_are_counted_apart() -> None:
    with torch.device("meta"):
        linear, cosine = (swin_v2_moe_s(experts=ExpertsConfig(router=gate)) for gate in (LINEAR, CosineGate()))
    assert costs(cosine).active_parameters == costs(linear).active_parameters
    assert costs(linear).router_parameters == 32 * (9 * 384 + 768)
    assert costs(cosine).router_parameters == 9 * (384 * 256) + 768 * 256 + 10 * (256 + 32 * 256 + 1)


def test_the_demo_and_its_dense_twin_cost_the_same() -> None:
    dense, moe = costs(swin_v2_demo()), costs(swin_v2_moe_demo(experts=DROPLESS))
    assert moe.active_parameters == dense.active_parameters
    assert moe.multiply_adds == dense.multiply_adds
    assert moe.parameters > 2 * dense.parameters


LINEAR = ExpertsConfig().router
DROPLESS = ExpertsConfig(num_experts=8, blocks=((), (1, 3)), capacity=Dropless(), down_bias=True)
