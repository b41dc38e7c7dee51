import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from synchromesh.data.mixing import soft_targets
from synchromesh.errors import NonFiniteError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import parallelize
from synchromesh.parallel.sharded import Sharded
from synchromesh.tasks.classification import Labelled
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.config import TrainConfig
from synchromesh.training.job import Job
from synchromesh.training.loop import fit
from synchromesh.training.metrics import read_metrics
from synchromesh.training.optim import build_optimizer
from synchromesh.training.precision import Precision, in_precision
from synchromesh.training.run_folder import build_model
from synchromesh.training.step import Counts, StepNumbers, Trainee, train_step
from synchromesh.training.window import Window

MakeJob = Callable[..., Job]
CPU = torch.device("cpu")


def batch(count: int, seed: int = 0) -> Labelled:
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(count) % 8
    return Labelled(torch.randn(count, 1, 8, 8, generator=generator), labels, soft_targets(labels, 8, 0.1))


def scaler(scale: float = 1024.0) -> GradScaler:
    return GradScaler("cpu", init_scale=scale)


def take(trainee: Trainee, config: TrainConfig, data: Labelled, samples: int) -> StepNumbers:
    counts = Counts(samples, dict.fromkeys(config.task.counts(data), samples))
    optimizer = build_optimizer(trainee.model, config.optim)
    return train_step(trainee, optimizer, data, config, step=0, rate=1e-2, counts=counts, device=CPU)


def model_of(config: TrainConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config.task, config.model, {"classes": list("abcdefgh")}).train()


def overflows(model: nn.Module) -> None:
    model.get_submodule("head").register_full_backward_pre_hook(lambda module, grad: (grad[0] * math.inf,))


@pytest.fixture
def plain(tiny: TrainConfig) -> TrainConfig:
    return dataclasses.replace(tiny, bf16=False)


def test_a_scaled_loss_gives_the_steps_and_numbers_of_one_that_is_not(plain: TrainConfig) -> None:
    one, two = model_of(plain), model_of(plain)
    wanted = take(Trainee(one, one), plain, batch(8), 8)
    found = take(Trainee(two, two, scaler=scaler()), plain, batch(8), 8)
    assert found.loss == wanted.loss
    assert found.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-5)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_overflows_is_left_out_and_the_scale_is_halved(plain: TrainConfig) -> None:
    model, own = model_of(plain), scaler()
    overflows(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    numbers = take(Trainee(model, model, scaler=own), plain, batch(8), 8)
    assert not math.isfinite(numbers.gradient_norm)
    assert math.isfinite(numbers.loss)
    assert own.get_scale() == 512
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    window = Window()
    window.add(numbers, {}, 1.0)
    json.dumps(window.to_json(), allow_nan=False)  # it can be saved


def test_an_overflow_that_no_scale_mends_stops_the_run(plain: TrainConfig) -> None:
    model = model_of(plain)
    overflows(model)
    with pytest.raises(NonFiniteError, match="the gradient is NaN or infinite at step 1"):
        take(Trainee(model, model, scaler=scaler(1.0)), plain, batch(8), 8)


def on_ranks(config: TrainConfig) -> tuple[bool, float]:
    grid, model = Grid.from_group(dist.group.WORLD), model_of(config)
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    if grid.rank == 1:
        overflows(model)
    before, own = {name: p.detach().clone() for name, p in model.named_parameters()}, scaler()
    take(Trainee(model, run, grid, own), config, batch(4, grid.rank), 8)
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters()), own.get_scale()


def test_an_overflow_on_one_rank_is_left_out_on_all(plain: TrainConfig) -> None:
    assert run_ranks(on_ranks, 2, plain) == [(True, 512.0)] * 2


def test_a_run_in_float16_goes_on_bit_for_bit_with_its_scale(tiny: TrainConfig, make_job: MakeJob) -> None:
    config = dataclasses.replace(tiny, fp16=True, keep=dataclasses.replace(tiny.keep, checkpoint_steps=3))
    whole = make_job(config, "whole")
    fit(whole)
    with pytest.raises(RuntimeError, match="crashed"):
        fit(make_job(config, "cut", crash_at=7))
    cut = make_job(config, "cut")
    fit(cut)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(cut.model.state_dict()[name], tensor), name
    states = [
        json.loads((job.checkpoints / "step-00000012" / "state.json").read_text())["scaler"] for job in (whole, cut)
    ]
    assert states[0] == states[1]
    assert 0 < states[0]["_growth_tracker"] <= 12
    assert read_metrics(whole.folder / "metrics.jsonl")[-2]["loss_scale"] == states[0]["scale"] <= 65536


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False}, None),
        ({"fp16": True}, torch.float16),
        ({"fp16": True, "bf16": False}, torch.float16),
    ],
)
def test_products_are_of_the_numbers_that_the_run_wants(tiny: TrainConfig, how: dict, wanted: object) -> None:
    config = dataclasses.replace(tiny, **how)
    layer = nn.Linear(4, 4)
    found = in_precision(layer, layer, CPU, config.precision)(torch.ones(2, 4))
    assert config.precision.dtype is wanted
    assert found.dtype is (wanted or torch.float32)
    assert config.precision.scaler(CPU).is_enabled() is (wanted is torch.float16)


def test_channels_last_reaches_convolutions_and_changes_no_number(plain: TrainConfig, make_job: MakeJob) -> None:
    seen: list[Tensor] = []
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 6, 6)
    y = in_precision(layer, layer, CPU, Precision(channels_last=True))(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x))
    other = make_job(dataclasses.replace(plain, channels_last=True), "last")
    one, two = fit(make_job(plain, "plain")), fit(other)
    assert two.evaluation.scores.numbers == pytest.approx(dict(one.evaluation.scores.numbers), rel=1e-3)
    weights = [p for p in other.model.parameters() if p.ndim == 4]
    assert weights
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
