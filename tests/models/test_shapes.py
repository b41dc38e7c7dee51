from typing import Any

import pytest
import torch

from synchromesh.models.costs import costs
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.shapes import IMPORTS, SHAPES, in_python
from synchromesh.models.swin_v2_moe import config_b, swin_v2_moe


def test_swinv2_moe_b_has_nine_layers_in_stage_3_and_one_in_stage_4():
    shape = SHAPES["swinv2_moe_b"](ExpertsConfig())
    third, fourth = shape.layers
    assert (third.count, third.tokens, third.work.width, third.work.hidden) == (9, 144, 512, 2048)
    assert (fourth.count, fourth.tokens, fourth.work.width) == (1, 36, 1024)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (32, 2)])
def test_experts_and_the_rest_are_the_whole_model(experts, k):
    config = ExpertsConfig(num_experts=experts, k=k)
    with torch.device("meta"):
        counted = costs(swin_v2_moe(config_b(), 21841, experts=config))
    shape = SHAPES["swinv2_moe_b"](config)
    own = sum(kind.count * experts * sum(kind.work.parts_per_expert) for kind in shape.layers)
    assert shape.dense_parameters + own == counted.parameters
    rows = 1.25 * k  # of the capacity that costs counts by
    products = sum(kind.count * kind.tokens * rows * 2 * kind.work.width * kind.work.hidden for kind in shape.layers)
    assert shape.dense_products + products == pytest.approx(counted.multiply_adds, rel=1e-6)


def test_the_python_of_a_shape_makes_its_model():
    made: dict[str, Any] = {}
    lines = in_python("swinv2_moe_s", experts=4, k=2, recomputed=True)
    with torch.device("meta"):
        exec("\n".join([*IMPORTS, *lines]), made)
    shape = SHAPES["swinv2_moe_s"](ExpertsConfig(num_experts=4, k=2))
    in_experts = sum(kind.count * kind.work.experts * sum(kind.work.parts_per_expert) for kind in shape.layers)
    assert sum(p.numel() for p in made["model"].parameters()) == shape.dense_parameters + in_experts
    assert made["config"].checkpointed
