import dataclasses

import pytest
import torch
from torch import Tensor, nn

from synchromesh.moe.capacity import Dropless
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import EvalOptions, Evaluation, evaluate
from synchromesh.training.run_folder import build_model
from synchromesh.training.task import Splits


class Knows(nn.Module):
    """Sees the class in the first pixel, and is wrong about class 3."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, images: Tensor) -> Tensor:
        label = ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()
        guess = torch.where(label == 3, 0, label)
        return nn.functional.one_hot(guess, 8) * self.scale


def marked(splits: Splits) -> Splits:
    for images in (splits.train.images, splits.test.images):
        images.images[:, 0, 0, 0] = images.labels.to(torch.uint8)
    return splits


def scored(config: TrainConfig, model: nn.Module, splits: Splits, **how: object) -> Evaluation:
    options = EvalOptions(batch_size=how.pop("batch_size"))
    return evaluate(config.task, splits.facts, model, splits.test, options, **how)


def test_accuracy_is_counted_by_class(tiny: TrainConfig, splits: Splits) -> None:
    found = scored(tiny, Knows(), marked(splits), batch_size=5)
    assert found.scores.numbers["accuracy"] == 28 / 32
    classes = found.scores.details["classes"]
    assert [own["images"] for own in classes.values()] == [4] * 8
    assert [own["accuracy"] for own in classes.values()] == [1, 1, 1, 0, 1, 1, 1, 1]
    right, wrong = (-torch.tensor([5.0, *[0.0] * 7]).log_softmax(0)[i] for i in (0, 1))
    assert found.scores.numbers["loss"] == pytest.approx(float(7 * right + wrong) / 8, rel=1e-5)


def test_the_worst_and_the_best_samples_are_named(tiny: TrainConfig, splits: Splits) -> None:
    found = scored(tiny, Knows(), marked(splits), batch_size=5)
    wrong = {index for index in range(32) if splits.test.read(index)[1] == 3}
    assert set(found.worst[: len(wrong)]) == wrong
    assert not wrong & set(found.best)


def test_the_score_does_not_depend_on_the_batch_size_and_leaves_the_mode(tiny: TrainConfig, splits: Splits) -> None:
    experts = dataclasses.replace(tiny.model.experts, capacity=Dropless())
    model = build_model(tiny.task, dataclasses.replace(tiny.model, experts=experts), splits.facts).train()
    one, two = (scored(tiny, model, splits, batch_size=size) for size in (3, 32))
    assert model.training
    assert one.scores.numbers["accuracy"] == two.scores.numbers["accuracy"]
    assert one.scores.numbers["loss"] == pytest.approx(two.scores.numbers["loss"], rel=1e-5)
    ((name, load),) = one.loads.items()
    assert int(load.tokens_per_expert.sum()) == 32 * 4  # a map of 2 x 2 positions
    assert torch.equal(load.tokens_per_expert, two.loads[name].tokens_per_expert)


def test_a_stop_between_two_batches_is_heeded_and_the_mode_comes_back(tiny: TrainConfig, splits: Splits) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    model = Knows().train()
    with pytest.raises(KeyboardInterrupt):
        scored(tiny, model, marked(splits), batch_size=4, between=stop)
    assert model.training
