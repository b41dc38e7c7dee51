"""The plans of a run whose experts are frozen: their layers have no training forward, and so nothing to tell of it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from synchromesh import Adaptive, Grid, MLPExperts, MoE, TopKRouter
from synchromesh.errors import InputError
from synchromesh.training.config import Parallelism
from synchromesh.training.plans import PLANS_FILE, Plans

ALONE = Grid(None)


def model_of() -> nn.ModuleDict:
    return nn.ModuleDict({"moe": MoE(TopKRouter(8, 4), MLPExperts(4, 8, hidden=16), strategy=Adaptive(ALONE))})


def test_a_layer_that_never_trained_ran_by_no_plan_and_is_repeated_by_none(tmp_path: Path) -> None:
    model = model_of().eval()
    model["moe"](torch.randn(3, 8))
    plans = Plans(model, ALONE, Parallelism())
    assert plans.ran() == {"moe": {}}
    plans.save(tmp_path)
    again = Plans(model_of(), ALONE, Parallelism(replay=tmp_path))
    assert again.ran() == {"moe": {}}


def test_a_layer_that_a_file_of_plans_does_not_know_is_named(tmp_path: Path) -> None:
    Plans(model_of(), ALONE, Parallelism()).save(tmp_path)
    assert (tmp_path / PLANS_FILE).is_file()
    other = nn.ModuleDict({"deep": model_of()})
    with pytest.raises(InputError, match=r"holds no plans of the layer 'deep\.moe' to repeat"):
        Plans(other, ALONE, Parallelism(replay=tmp_path))
