import dataclasses
import json
from pathlib import Path

import pytest
import torch

from synchromesh import seeds
from synchromesh.data.sources import Splits
from synchromesh.moe.experts import MLPExperts
from synchromesh.training.architecture import Factors, SwinMoE, build_classifier
from synchromesh.training.codec import decode, encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.interrupt import StopWish
from synchromesh.training.loop import Job, fit
from synchromesh.training.metrics import read_metrics


def with_factors(config: TrainConfig, factors: Factors) -> TrainConfig:
    assert isinstance(config.model, SwinMoE)
    experts = dataclasses.replace(config.model.experts, products=factors)
    return dataclasses.replace(config, epochs=1, model=dataclasses.replace(config.model, experts=experts))


@pytest.mark.parametrize("factors", Factors)
def test_what_experts_multiply_survives_json_and_reaches_them(tiny: TrainConfig, factors: Factors) -> None:
    config = with_factors(tiny, factors)
    again = decode(TrainConfig, json.loads(json.dumps(encode(config))))
    assert again == config
    model = build_classifier(again.model, again.data.preprocess, 8)
    assert {m.products for m in model.modules() if isinstance(m, MLPExperts)} == {factors.chosen()}


def test_a_run_with_8_bit_products_has_nearly_the_losses_of_one_without(
    tiny: TrainConfig, splits: Splits, tmp_path: Path
) -> None:
    losses = {}
    for factors in Factors:
        config, folder = with_factors(tiny, factors), tmp_path / factors.value
        folder.mkdir()
        with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
            model = build_classifier(config.model, config.data.preprocess, len(splits.train.classes))
        fit(Job(config, model, splits, folder, {}, StopWish(), lambda event: None))
        losses[factors] = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    plain = losses.pop(Factors.THEMSELVES)
    for found in losses.values():
        assert found != plain
        assert found == pytest.approx(plain, rel=0.02)
