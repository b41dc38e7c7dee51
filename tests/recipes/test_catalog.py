import math

import pytest
import torch

from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import ImportanceLoad
from synchromesh.recipes.catalog import RECIPES
from synchromesh.training.architecture import SwinMoE, build_classifier, model_size
from synchromesh.training.config import Freeze
from synchromesh.training.optim import make_schedule


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_named_as_it_is_called_and_builds_its_model(name: str) -> None:
    config = RECIPES[name]()
    assert config.name == name
    with torch.device("meta"):
        model = build_classifier(config.model, config.data.preprocess, 10)
    assert any(isinstance(m, MoE) for m in model.modules())
    assert model.get_submodule("head").weight.shape[0] == 10


@pytest.mark.parametrize(
    ("name", "width", "drop_path", "millions"),
    [("swinv2_moe_s_22k", 96, 0.2, 541.8), ("swinv2_moe_b_22k", 128, 0.3, 955.3)],
)
def test_pre_training_has_the_papers_settings(name: str, width: int, drop_path: float, millions: float) -> None:
    config = RECIPES[name]()
    assert isinstance(config.model, SwinMoE)
    swin, experts = config.model.swin, config.model.experts
    assert (swin.embed_dim, swin.depths, swin.window_size, swin.drop_path) == (width, (2, 2, 18, 2), 12, drop_path)
    assert (swin.init_std, swin.released_style) == (0.005, True)
    assert (experts.count, experts.k, experts.capacity_factor, experts.prioritized) == (32, 1, 1.25, True)
    assert (experts.noise, experts.dropout, experts.down_bias) == (1.0, 0.1, False)
    assert experts.loss == ImportanceLoad(0.01)
    assert (config.epochs, config.batch_size, config.label_smoothing) == (90, 4096, 0.1)
    optim = config.optim
    assert (optim.weight_decay, optim.clip_norm, optim.betas, optim.eps) == (0.1, 3.0, (0.9, 0.999), 1e-8)
    rate = make_schedule(optim, batch_size=4096, steps_per_epoch=100, epochs=90)
    assert all(math.isclose(rate(step), wanted) for step, wanted in ((0, 1e-6), (1000, 1e-3), (9000, 1e-5)))
    augment = config.augment
    assert augment.mixing is not None
    assert (augment.mixing.mixup, augment.mixing.cutmix, augment.erase, augment.flip) == (0.8, 1.0, 0.25, 0.5)
    assert augment.rand_augment is not None
    assert (augment.rand_augment.magnitude, augment.rand_augment.spread) == (9.0, 0.5)
    with torch.device("meta"):
        model = build_classifier(config.model, config.data.preprocess, 21841)
    assert model_size(model).parameters / 1e6 == pytest.approx(millions, rel=5e-3)


def test_the_twin_of_the_demo_costs_what_one_token_costs_in_the_moe() -> None:
    config = RECIPES["demo"]()
    assert config.twin is not None
    sizes = [model_size(build_classifier(a, config.data.preprocess, 10)) for a in (config.model, config.twin)]
    router = sizes[0].active - sizes[1].active
    assert 0 < router < 0.01 * sizes[1].active
    assert sizes[1].parameters == sizes[1].active
    assert sizes[0].parameters > 2 * sizes[1].parameters


def test_the_demo_chooses_nothing_on_its_test_images() -> None:
    config = RECIPES["demo"]()
    assert config.keep.best is False
    assert config.data.source.held_out == 0


def test_fine_tuning_and_probing_start_from_weights() -> None:
    assert RECIPES["finetune_1k"]().start.weights is not None
    probe = RECIPES["few_shot"]()
    assert (probe.start.freeze, probe.data.shots) == (Freeze.BACKBONE, 5)
