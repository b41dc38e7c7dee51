import pytest
import torch
from torch import Tensor, nn

from synchromesh.data.sources import Splits
from synchromesh.training.architecture import build_classifier
from synchromesh.training.config import TrainConfig
from synchromesh.training.evaluate import EvalOptions, evaluate


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
    for images in (splits.train, splits.test):
        images.images[:, 0, 0, 0] = images.labels.to(torch.uint8)
    return splits


def test_accuracy_is_counted_by_class(splits: Splits) -> None:
    found = evaluate(Knows(), marked(splits).test, EvalOptions(batch_size=5))
    assert found.accuracy == 28 / 32
    assert found.class_images.tolist() == [4] * 8
    assert found.class_right.tolist() == [4, 4, 4, 0, 4, 4, 4, 4]
    right, wrong = (-torch.tensor([5.0, *[0.0] * 7]).log_softmax(0)[i] for i in (0, 1))
    assert found.loss == pytest.approx(float(7 * right + wrong) / 8, rel=1e-5)


def test_the_score_does_not_depend_on_the_batch_size_and_leaves_the_mode(tiny: TrainConfig, splits: Splits) -> None:
    experts = {"capacity_factor": 0.0}
    config = tiny.model.__class__(tiny.model.swin, tiny.model.experts.__class__(blocks=((), (1,)), **experts))
    model = build_classifier(config, tiny.data.preprocess, 8).train()
    one, two = (evaluate(model, splits.test, EvalOptions(batch_size=size)) for size in (3, 32))
    assert model.training
    assert one.accuracy == two.accuracy
    assert one.loss == pytest.approx(two.loss, rel=1e-5)
    ((name, load),) = one.loads.items()
    assert int(load.tokens_per_expert.sum()) == 32 * 4  # a map of 2 x 2 positions
    assert torch.equal(load.tokens_per_expert, two.loads[name].tokens_per_expert)


def test_a_stop_between_two_batches_is_heeded_and_the_mode_comes_back(splits: Splits) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    model = Knows().train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, marked(splits).test, EvalOptions(batch_size=4), between=stop)
    assert model.training
