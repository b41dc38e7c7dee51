import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.agree import ALONE
from synchromesh.training.evaluate import SHOWN_SAMPLES, Evaluation, evaluate
from synchromesh.training.gallery import draw_gallery
from synchromesh.training.task import Answer, Batch, Number, Run, Scorer, Scores, Splits, Task, Term


@dataclasses.dataclass(frozen=True)
class Values(Batch):
    """Numbers."""

    x: Tensor


@dataclasses.dataclass(frozen=True)
class Listed:
    """Numbers by number; one of them cannot be read."""

    values: tuple[float, ...]
    bad: int = -1

    def __len__(self) -> int:
        return len(self.values)

    def read(self, index: int, draw: Any = None) -> float:
        if index == self.bad:
            raise InputError(f"number {index} is unreadable")
        return self.values[index]


class Distances(Scorer):
    """A sample is the better the nearer the model's answer is to it."""

    def add(self, run: Run, batch: Batch) -> list[float]:
        assert isinstance(batch, Values)
        return (-(run(batch.x) - batch.x).abs()).tolist()

    def state(self) -> None:
        return None

    def scores(self, states: Any) -> Scores:
        return Scores({"distance": 0.0})


@dataclasses.dataclass(frozen=True)
class Repeat(Task):
    """Say a number again. Its pictures are texts: the sample, the answer, and who drew."""

    draws: bool = True

    unit = "numbers"
    numbers = (Number("distance", "distance", more_is_better=False),)

    def splits(self, *, seed: int) -> Splits:
        raise NotImplementedError  # pictures are made of scores alone

    def build(self, backbone: Any, facts: Any) -> nn.Module:
        return Rounds()

    def prepare(self, samples: Any, facts: Any, device: torch.device, rng: np.random.Generator | None) -> Values:
        return Values(torch.tensor(samples, dtype=torch.float64, device=device))

    def counts(self, batch: Batch) -> dict[str, int]:
        raise NotImplementedError  # pictures are made of scores alone

    def loss(self, run: Run, batch: Batch) -> dict[str, Term]:
        raise NotImplementedError  # pictures are made of scores alone

    def scorer(self, facts: Any) -> Scorer:
        return Distances()

    def predict(self, run: Run, batch: Batch, facts: Any, ask: Any) -> list[Answer]:
        assert isinstance(batch, Values)
        assert not run.model.training
        assert not torch.is_grad_enabled()
        return [Answer({"value": value}) for value in run(batch.x).tolist()]

    def draw(self, sample: Any, answer: Answer) -> bytes | None:
        return f"{sample} {answer.said['value']} {os.getpid()}".encode() if self.draws else None


class Rounds(nn.Module):
    """Says whole numbers only, so that it does best on those."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.one).round()


# Distances to the whole numbers: 0.01 to 0.14, in another order.
VALUES = tuple(n + 0.01 * d for n, d in enumerate((9, 2, 14, 5, 11, 1, 7, 13, 3, 10, 6, 12, 4, 8)))


def shown(folder: Path, captions: dict[str, str]) -> dict[str, str]:
    """Return the sample of each picture, by its caption."""
    return {caption: (folder / "pictures" / name).read_text().split()[0] for name, caption in captions.items()}


def scored(splits: Splits, grid: Grid = ALONE) -> Evaluation:
    return evaluate(Repeat(), {}, Rounds(), splits.test, grid=grid)


def test_the_samples_with_the_least_and_the_most_merit_are_drawn_in_this_order(tmp_path: Path) -> None:
    splits = Splits(Listed(()), Listed(VALUES))
    model = Rounds().train()
    captions = draw_gallery(Repeat(), model, splits, scored(splits), tmp_path, ALONE)
    by_distance = sorted(range(len(VALUES)), key=lambda i: abs(VALUES[i] - round(VALUES[i])))
    worst, best = by_distance[::-1][:SHOWN_SAMPLES], by_distance[:SHOWN_SAMPLES]
    wanted = {f"worst {place + 1}: test numbers number {i}": str(VALUES[i]) for place, i in enumerate(worst)}
    wanted |= {f"best {place + 1}: test numbers number {i}": str(VALUES[i]) for place, i in enumerate(best)}
    assert shown(tmp_path, captions) == wanted
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(captions)
    assert model.training  # and it was not while it answered


def test_a_sample_among_the_worst_is_not_shown_again_among_the_best(tmp_path: Path) -> None:
    splits = Splits(Listed(()), Listed(VALUES[: SHOWN_SAMPLES + 2]))
    found = scored(splits)
    assert set(found.worst) & set(found.best)
    drawn = list(shown(tmp_path, draw_gallery(Repeat(), Rounds(), splits, found, tmp_path, ALONE)).values())
    assert len(drawn) == len(set(drawn)) == SHOWN_SAMPLES + 2


@dataclasses.dataclass(frozen=True)
class Judged(Repeat):
    """Says how far off an answer is."""

    def verdict(self, answer: Answer) -> str:
        return f"said {answer.said['value']:.0f}"


def test_a_verdict_stands_before_the_number_of_the_sample(tmp_path: Path) -> None:
    splits = Splits(Listed(()), Listed((1.1, 3.0)))
    captions = draw_gallery(Judged(), Rounds(), splits, scored(splits), tmp_path, ALONE)
    assert captions["worst-1.png"] == "said 1\nworst 1: test numbers number 0"


@pytest.mark.parametrize(
    ("task", "bad", "count"), [(Repeat(), 2, 14), (Repeat(), -1, 0), (Repeat(draws=False), -1, 14)],
    ids=["one of them has become unreadable", "nothing was scored", "the task draws nothing"],
)  # fmt: skip
def test_there_are_no_pictures_where_there_is_nothing_to_show(
    task: Repeat, bad: int, count: int, tmp_path: Path
) -> None:
    found = scored(Splits(Listed(()), Listed(VALUES[:count])))
    assert draw_gallery(task, Rounds(), Splits(Listed(()), Listed(VALUES, bad)), found, tmp_path, ALONE) == {}
    assert list(tmp_path.iterdir()) == []


def on_rank(folder: str) -> tuple[int, Evaluation, dict[str, str]]:
    grid, splits = Grid(dist.group.WORLD), Splits(Listed(()), Listed(VALUES))
    found = scored(splits, grid)
    return os.getpid(), found, draw_gallery(Repeat(), Rounds(), splits, found, Path(folder), grid)


def test_ranks_choose_the_samples_of_one_process_and_the_first_one_draws(tmp_path: Path) -> None:
    splits = Splits(Listed(()), Listed(VALUES))
    (tmp_path / "alone").mkdir()
    (tmp_path / "ranks").mkdir()
    alone = draw_gallery(Repeat(), Rounds(), splits, scored(splits), tmp_path / "alone", ALONE)
    (first, found, captions), *others = run_ranks(on_rank, 3, str(tmp_path / "ranks"))
    assert (found.worst, found.best, found.samples) == (scored(splits).worst, scored(splits).best, len(VALUES))
    assert captions == alone
    assert shown(tmp_path / "ranks", captions) == shown(tmp_path / "alone", alone)
    assert all(own == captions for _, _, own in others)
    drew = {(tmp_path / "ranks" / "pictures" / name).read_text().split()[2] for name in captions}
    assert drew == {str(first)}
