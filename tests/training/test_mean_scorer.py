import dataclasses

import pytest
import torch
from torch import Tensor, nn

from synchromesh.training.mean_scorer import MeanScorer
from synchromesh.training.task import Batch, Number, Run, Scorer

ERROR, SHARE = Number("error", "error", more_is_better=False), Number("share", "share")


@dataclasses.dataclass(frozen=True)
class Values(Batch):
    """Numbers."""

    x: Tensor


def measured(run: Run, batch: Batch) -> dict[str, Tensor]:
    assert isinstance(batch, Values)
    return {"share": (run(batch.x) > 1).float(), "error": (run(batch.x) - batch.x).abs()}


def fed(scorer: Scorer, *batches: list[float]) -> list[float]:
    model = nn.Identity()
    run = Run(model, lambda x: x * 1.5)
    return [merit for x in batches for merit in scorer.add(run, Values(torch.tensor(x)))]


@pytest.mark.parametrize("ranks", [[[[0.2, 1.0], [], [2.0]]], [[[0.2]], [[]], [[1.0, 2.0]]]])
def test_scores_are_means_over_the_samples_of_all_ranks(ranks: list[list[list[float]]]) -> None:
    scorers = [MeanScorer((ERROR, SHARE), measured) for _ in ranks]
    merits = [merit for scorer, own in zip(scorers, ranks, strict=True) for merit in fed(scorer, *own)]
    assert merits == pytest.approx([-0.1, -0.5, -1.0])  # the smaller an error, the better
    scores = scorers[0].scores([scorer.state() for scorer in scorers])
    assert scores.numbers == pytest.approx({"error": 1.6 / 3, "share": 2 / 3})


def test_the_merit_of_a_sample_is_the_first_number_as_it_is_where_more_is_better() -> None:
    assert fed(MeanScorer((SHARE, ERROR), measured), [0.2, 1.0]) == [0, 1]


def test_nothing_scored_is_zero_and_no_division_by_it() -> None:
    scorer = MeanScorer((ERROR, SHARE), measured)
    assert scorer.scores([scorer.state()]).numbers == {"error": 0, "share": 0}


def test_other_numbers_than_the_tasks_are_refused_with_both() -> None:
    with pytest.raises(
        ValueError, match=r"measured \{'share': \(2,\), 'error': \(2,\)\}, wanted error of each of the 2"
    ):
        fed(MeanScorer((ERROR,), measured), [0.2, 1.0])
    mean = MeanScorer((ERROR,), lambda run, batch: {"error": measured(run, batch)["error"].mean()})
    with pytest.raises(ValueError, match=r"measured \{'error': \(\)\}"):
        fed(mean, [0.2, 1.0])
