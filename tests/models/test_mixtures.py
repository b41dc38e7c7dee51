import dataclasses
import json
from pathlib import Path

import pytest
import torch

from synchromesh import seeds
from synchromesh.kernels import Float8Products, MXFloat8Products, Products
from synchromesh.models.mixtures import CosineGate, Gate, LinearGate
from synchromesh.moe.experts import MLPExperts
from synchromesh.moe.places import PlacedRouter
from synchromesh.moe.rounding import TokenRounding
from synchromesh.moe.routing import CosineRouter, TopKRouter
from synchromesh.recipes.catalog import CATALOG
from synchromesh.recipes.digits import digits
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.interrupt import StopWish
from synchromesh.training.job import Job
from synchromesh.training.loop import fit
from synchromesh.training.metrics import read_metrics
from synchromesh.training.run_folder import build_model
from synchromesh.training.task import Splits

KINDS = [None, Float8Products(), MXFloat8Products()]


def with_products(products: Products | None) -> TrainConfig:
    config = digits()
    experts = dataclasses.replace(config.model.experts, products=products)
    model = dataclasses.replace(config.model, embed_dim=8, num_heads=(1, 2), experts=experts)
    return dataclasses.replace(config, epochs=1, batch_size=16, model=model)


@pytest.mark.parametrize("products", KINDS, ids=str)
def test_what_experts_multiply_survives_json_and_reaches_them(products: Products | None) -> None:
    config = with_products(products)
    again = CATALOG.config(json.loads(json.dumps(encode(config))))
    assert again == config
    model = build_model(again.task, again.model, {"classes": list("abcdefgh")})
    assert {m.products for m in model.modules() if isinstance(m, MLPExperts)} == {products}


def test_a_run_with_8_bit_products_has_nearly_the_losses_of_one_without(splits: Splits, tmp_path: Path) -> None:
    losses = []
    for number, products in enumerate(KINDS):
        config, folder = with_products(products), tmp_path / str(number)
        folder.mkdir()
        with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
            model = build_model(config.task, config.model, splits.facts)
        fit(Job(config, model, splits, folder, {}, StopWish(), lambda event: None))
        losses.append([line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line])
    plain, *others = losses
    for found in others:
        assert found != plain
        assert found == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(
    ("gate", "router"),
    [
        (LinearGate(), TopKRouter),
        (LinearGate(bias_rate=1e-3, norm_topk=True), TopKRouter),
        (CosineGate(dim=8), CosineRouter),
        (LinearGate(tile=8), TokenRounding),
        (CosineGate(dim=8, tile=8), TokenRounding),
        (LinearGate(places=3), PlacedRouter),
        (CosineGate(dim=8, tile=8, places=3), PlacedRouter),
    ],
    ids=str,
)
def test_a_gate_makes_the_router_it_says(gate: Gate, router: type) -> None:
    made = gate(16, 4, 2)
    assert type(made) is router
    assert made.k == 2
    placed = made.router if isinstance(made, PlacedRouter) else made
    assert isinstance(placed, TokenRounding) == (gate.tile > 0)
    inner = placed.router if isinstance(placed, TokenRounding) else placed
    assert inner.scores.after_selection == getattr(gate, "norm_topk", False)
    assert (getattr(inner, "balance", None) is not None) == (getattr(gate, "bias_rate", 0) > 0)
