import dataclasses

import pytest
import torch
from torch import Tensor, nn

from synchromesh.data.mixing import soft_targets
from synchromesh.errors import NonFiniteError
from synchromesh.models.mixtures import LinearGate
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.routing import BiasBalance
from synchromesh.tasks.classification import Labelled
from synchromesh.testing.compare import assert_close
from synchromesh.training.config import TrainConfig
from synchromesh.training.diagnose import first_non_finite
from synchromesh.training.optim import build_optimizer
from synchromesh.training.run_folder import build_model
from synchromesh.training.step import Counts, StepNumbers, Trainee, train_step

CLASSES = 8


class Plain(nn.Module):
    """Two linear layers, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.second = nn.Linear(16, CLASSES)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1).double()).relu())


class Fails(nn.Module):
    """A layer that divides by zero, forward or backward."""

    def __init__(self, *, forward: bool) -> None:
        super().__init__()
        self.divide = forward

    def forward(self, x: Tensor) -> Tensor:
        if self.divide:
            return x / torch.zeros_like(x)
        return x + (x * 0).abs().sqrt()  # 0 forward, 0 * inf backward


def batch(count: int = 12) -> Labelled:
    labels = torch.arange(count) % CLASSES
    return Labelled(torch.randn(count, 1, 8, 8), labels, soft_targets(labels, CLASSES, 0.1))


def model_of(config: TrainConfig) -> nn.Module:
    return build_model(config.task, config.model, {"classes": list(range(CLASSES))}).train()


def take(model: nn.Module, data: Labelled, config: TrainConfig, *, step: int = 0) -> StepNumbers:
    optimizer, counts = build_optimizer(model, config.optim), Counts(len(data), config.task.counts(data))
    cpu = torch.device("cpu")
    return train_step(Trainee(model, model), optimizer, data, config, step=step, rate=1e-3, counts=counts, device=cpu)


def gradients_after(model: nn.Module, data: Labelled, config: TrainConfig) -> dict[str, Tensor | None]:
    take(model, data, config)
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def plain(tiny: TrainConfig) -> TrainConfig:
    """The tiny recipe in full precision, without clipping, in one piece."""
    return dataclasses.replace(tiny, bf16=False, optim=dataclasses.replace(tiny.optim, clip_norm=0.0))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulated_gradients_equal_those_of_the_whole_batch(plain: TrainConfig, parts: int) -> None:
    model = Plain()
    data = batch(12)
    split = dataclasses.replace(plain, batch_size=60, accumulate=parts)
    twin = Plain()
    twin.load_state_dict(model.state_dict())
    whole = gradients_after(model, data, plain)
    for name, gradient in gradients_after(twin, data, split).items():
        assert_close(name, gradient, whole[name])
    for name, parameter in twin.named_parameters():
        assert_close(f"{name} after the step", parameter, dict(model.named_parameters())[name])


def test_accumulated_moe_losses_are_the_mean_over_the_parts(plain: TrainConfig) -> None:
    experts = dataclasses.replace(plain.model.experts, router=LinearGate(noise=0.0), capacity=Dropless())
    config = dataclasses.replace(plain, model=dataclasses.replace(plain.model, experts=experts))
    model = model_of(config)
    for module in model.modules():
        if hasattr(module, "rate") and isinstance(module.rate, float):
            module.rate = 0.0  # no drop path: two halves then see what the whole saw
    half = batch(8)
    data = Labelled(half.images.repeat(2, 1, 1, 1), half.labels.repeat(2), half.targets.repeat(2, 1))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    once = take(model, data, config)
    model.load_state_dict(state)
    twice = take(model, data, dataclasses.replace(config, accumulate=2))
    assert once.aux_loss > 0
    assert twice.aux_loss == pytest.approx(once.aux_loss, rel=1e-5)
    assert twice.task_loss == pytest.approx(once.task_loss, rel=1e-5)


def test_the_balance_bias_moves_once_a_step(plain: TrainConfig) -> None:
    model = model_of(plain)
    take(model, batch(16), dataclasses.replace(plain, accumulate=2))
    (balance,) = (module for module in model.modules() if isinstance(module, BiasBalance))
    assert set(balance.steps.abs().tolist()) <= {0, 1}
    assert balance.steps.abs().max() == 1
    assert balance.tokens_per_expert.sum() == 0


def test_the_gradient_is_clipped_and_its_norm_reported_before(plain: TrainConfig) -> None:
    clipped = dataclasses.replace(plain, optim=dataclasses.replace(plain.optim, clip_norm=0.01))
    model = Plain()
    numbers = take(model, batch(), clipped)
    after = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert numbers.gradient_norm > 0.01
    assert float(after) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("forward", "text"), [(True, r"the loss .* the output of 2 \(Fails\)"), (False, "the gradient")]
)
def test_a_non_finite_number_stops_before_the_step_and_names_step_and_layer(
    plain: TrainConfig, forward: bool, text: str
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Fails(forward=forward), nn.Linear(16, CLASSES))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=text) as caught:
        take(model, batch(), plain, step=41)
    assert caught.value.step == 42
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_bad_gradient_is_traced_to_the_last_layer_before_it(plain: TrainConfig) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Fails(forward=False), nn.Linear(16, CLASSES))
    with pytest.raises(NonFiniteError, match=r"the gradient of 1\.(bias|weight)"):
        take(model, batch(), plain)


def test_a_bad_parameter_is_named(plain: TrainConfig) -> None:
    model = Plain()
    with torch.no_grad():
        model.second.bias[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the parameter second\.bias"):
        take(model, batch(), plain)


def test_a_bad_number_made_outside_of_any_layer_is_seen_where_it_enters() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * torch.inf)

    model = Outside()
    assert first_non_finite(model, lambda: model(torch.ones(2, 4)).sum()) == "the input of two (Linear)"


def test_the_same_step_draws_the_same_random_numbers(tiny: TrainConfig) -> None:
    data = batch(16)
    losses = []
    for noise in (1, 2):
        torch.manual_seed(0)
        model = model_of(tiny)
        torch.manual_seed(noise)
        losses.append((take(model, data, tiny, step=7), take(model, data, tiny, step=8)))
    assert losses[0] == losses[1]
