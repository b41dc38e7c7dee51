import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synchromesh import seeds
from synchromesh.data.augment import Augment
from synchromesh.errors import InputError, NonFiniteError, StoppedError, UnreadableError
from synchromesh.tasks.classification import LabelledImages
from synchromesh.training.config import Freeze, Start, TrainConfig
from synchromesh.training.interrupt import StopWish
from synchromesh.training.job import Event, Job, Outcome
from synchromesh.training.loop import fit
from synchromesh.training.metrics import read_metrics
from synchromesh.training.run_folder import build_model
from synchromesh.training.start import freeze
from synchromesh.training.task import Draw, Splits

TIMES = ("seconds", "images_per_second")  # what no two runs share


class CrashError(Exception):
    """Stands for a kill: nothing of the loop runs after it."""


def job(config: TrainConfig, splits: Splits, folder: Path, *, crash_at: int = -1, stop: StopWish | None = None) -> Job:
    with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
        model = build_model(config.task, config.model, splits.facts)
    freeze(model, config.start.freeze)
    folder.mkdir(parents=True, exist_ok=True)

    def tell(event: Event) -> None:
        if event.kind == "step" and event.step == crash_at:
            raise CrashError

    return Job(config, model, splits, folder, {"facts": dict(splits.facts)}, stop or StopWish(), tell)


def run(config: TrainConfig, splits: Splits, folder: Path, **how: Any) -> tuple[dict[str, Tensor], Outcome]:
    work = job(config, splits, folder, **how)
    outcome = fit(work)
    return work.model.state_dict(), outcome


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]
    assert not different


def test_the_same_seed_gives_the_same_numbers_whatever_was_drawn_before(
    tiny: TrainConfig, splits: Splits, tmp_path: Path
) -> None:
    one, _ = run(tiny, splits, tmp_path / "one")
    torch.manual_seed(99)
    two, _ = run(tiny, splits, tmp_path / "two")
    assert_same(one, two)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    other, _ = run(dataclasses.replace(tiny, seed=1), splits, tmp_path / "other")
    assert not torch.equal(one["head.weight"], other["head.weight"])


# Before the first checkpoint, at one, beside one, at the end of an epoch, at the last step: each once, of both kinds.
SAMPLE = {(1, 1), (1, 6), (1, 11), (4, 0), (4, 4), (4, 5)}
CRASHES = [
    pytest.param(every, step, marks=[] if (every, step) in SAMPLE else pytest.mark.exhaustive)
    for every in (1, 4)
    for step in (0, 1, 4, 5, 6, 11)
]


@pytest.mark.parametrize(("every", "crash_at"), CRASHES)
def test_a_run_cut_off_anywhere_continues_bit_for_bit(
    tiny: TrainConfig, splits: Splits, tmp_path: Path, crash_at: int, every: int
) -> None:
    config = dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, checkpoint_steps=every))
    whole, outcome = run(config, splits, tmp_path / "whole")
    with pytest.raises(CrashError):
        run(config, splits, tmp_path / "cut", crash_at=crash_at)
    continued, again = run(config, splits, tmp_path / "cut")
    assert_same(whole, continued)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert again.standing.step == outcome.standing.step == 12
    assert again.standing.samples == 192
    assert again.evaluation.scores == outcome.evaluation.scores


def test_a_run_cut_off_twice_and_with_a_truncated_checkpoint_continues_bit_for_bit(
    tiny: TrainConfig, splits: Splits, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, checkpoint_steps=2))
    whole, _ = run(config, splits, tmp_path / "whole")
    for crash_at in (5, 9):
        with pytest.raises(CrashError):
            run(config, splits, tmp_path / "cut", crash_at=crash_at)
    newest = sorted((tmp_path / "cut" / "checkpoints").glob("step-*"))[-1] / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    continued, _ = run(config, splits, tmp_path / "cut")
    assert_same(whole, continued)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_training_time_adds_up_over_the_parts(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, checkpoint_steps=1))
    with pytest.raises(CrashError):
        run(config, splits, tmp_path, crash_at=8)
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1] / "state.json"
    before = json.loads(newest.read_text())["standing"]["seconds"]
    _, outcome = run(config, splits, tmp_path)
    assert before > 0
    assert outcome.standing.seconds > before


def test_a_stop_wish_saves_and_the_rest_follows_bit_for_bit(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    whole, _ = run(tiny, splits, tmp_path / "whole")
    stop = StopWish()
    stop.signal = signal.SIGTERM
    with pytest.raises(StoppedError) as caught:
        run(tiny, splits, tmp_path / "cut", stop=stop)
    assert (caught.value.signal, caught.value.step) == (signal.SIGTERM, 1)
    continued, _ = run(tiny, splits, tmp_path / "cut")
    assert_same(whole, continued)
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_accuracy_rises_on_patterns_that_can_be_learnt(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny,
        epochs=12,
        task=dataclasses.replace(tiny.task, augment=Augment()),
        optim=dataclasses.replace(tiny.optim, lr=5e-3),
    )
    _, outcome = run(config, splits, tmp_path)
    assert outcome.evaluation.scores.numbers["accuracy"] > 0.9
    assert outcome.evaluation.samples == 32


def test_metrics_hold_what_the_page_about_them_says(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    run(tiny, splits, tmp_path)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in found] == [
        ("train", 3), ("train", 6), ("test", 6), ("train", 9), ("train", 12), ("test", 12),
    ]  # fmt: skip
    for line in found:
        assert line["epoch"] == line["step"] / 6
        (shares,) = line["load"].values()
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert 0 <= line["drop_rate"] < 1
        if line["kind"] == "train":
            assert line["loss"] == pytest.approx(line["task_loss"] + line["aux_loss"])
            assert line["bad_images"] == 0
    assert any(line["drop_rate"] > 0 for line in found)  # its capacity factor is 1


def test_a_nan_keeps_the_last_good_checkpoint(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, checkpoint_steps=2))
    work = job(config, splits, tmp_path)
    norm = work.model.get_submodule("backbone.norm")

    def spoil(_module: object, _inputs: object, output: Tensor) -> Tensor:
        return output * torch.nan if spoil_now else output

    spoil_now = False
    norm.register_forward_hook(spoil)

    def tell(event: Event) -> None:
        nonlocal spoil_now
        spoil_now = spoil_now or (event.kind == "step" and event.step >= 4)

    with pytest.raises(NonFiniteError, match=r"at step 6; first seen in the output of backbone\.norm") as caught:
        fit(dataclasses.replace(work, tell=tell))
    assert caught.value.step == 6
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_other_data_than_before_is_refused(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    run(tiny, splits, tmp_path)
    fewer = dataclasses.replace(splits, train=LabelledImages(splits.train.images.subset(range(64))))
    with pytest.raises(InputError, match="was trained on 96 images, the data now holds 64"):
        run(tiny, fewer, tmp_path)


@pytest.mark.parametrize("what", [Freeze.MOE, Freeze.BACKBONE])
def test_what_is_frozen_stays_bit_for_bit(tiny: TrainConfig, splits: Splits, tmp_path: Path, what: Freeze) -> None:
    config = dataclasses.replace(tiny, start=Start(freeze=what))
    before = {k: v.clone() for k, v in job(config, splits, tmp_path / "x").model.state_dict().items()}
    after, _ = run(config, splits, tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {
        n for n in before if (".ffn.router" in n or ".ffn.experts" in n if what is Freeze.MOE else n[:4] != "head")
    }
    assert not changed & frozen
    assert "head.weight" in changed


def test_the_best_evaluation_is_kept_beside_the_last(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    _, outcome = run(tiny, splits, tmp_path)
    (best,) = (tmp_path / "checkpoints").glob("best-*")
    assert best.name == f"best-{outcome.standing.best_step:08d}"
    run(dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, best=False)), splits, tmp_path / "none")
    assert not list((tmp_path / "none" / "checkpoints").glob("best-*"))


def test_tensorboard_events_are_written_on_demand(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, tensorboard=True)), splits, tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"test/accuracy" in events.read_bytes()


def test_a_run_that_can_read_nothing_is_refused_and_says_why(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    class Broken:
        def __len__(self) -> int:
            return len(splits.train)

        def read(self, index: int, draw: Draw | None = None) -> Any:
            raise UnreadableError(tmp_path / f"{index}.png", "no picture")

    skipping = dataclasses.replace(tiny, loading=dataclasses.replace(tiny.loading, skip_bad_images=True))
    with pytest.raises(InputError, match=r"none of the images to learn from could be read: .*left_out\.jsonl says why"):
        run(skipping, dataclasses.replace(splits, train=Broken()), tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    assert {line["path"] for line in listed} == {str(tmp_path / f"{i}.png") for i in range(len(splits.train))}


def test_unreadable_test_samples_are_listed_too(tiny: TrainConfig, splits: Splits, tmp_path: Path) -> None:
    class OneBroken:
        def __len__(self) -> int:
            return len(splits.test)

        def read(self, index: int, draw: Draw | None = None) -> Any:
            if index == 3:
                raise UnreadableError(tmp_path / "3.png", "no picture")
            return splits.test.read(index, draw)

    skipping = dataclasses.replace(tiny, loading=dataclasses.replace(tiny.loading, skip_bad_images=True))
    _, outcome = run(skipping, dataclasses.replace(splits, test=OneBroken()), tmp_path / "run")
    assert outcome.evaluation.bad == (f"cannot read the image {tmp_path / '3.png'}: no picture",)
    (line,) = (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": str(tmp_path / "3.png"), "reason": "no picture"}


def test_a_run_ends_early_after_evaluations_that_are_none_the_better_and_a_resumed_one_too(
    tiny: TrainConfig, splits: Splits, tmp_path: Path
) -> None:
    still = dataclasses.replace(
        tiny, epochs=6, patience=2, optim=dataclasses.replace(tiny.optim, lr=0.0, warmup_lr=0.0)
    )
    still = dataclasses.replace(still, optim=dataclasses.replace(still.optim, final_lr=0.0))
    _, outcome = run(still, splits, tmp_path / "whole")
    assert (outcome.standing.step, outcome.standing.best_step, outcome.standing.stale) == (18, 6, 2)
    with pytest.raises(CrashError):
        run(still, splits, tmp_path / "cut", crash_at=16)
    run(still, splits, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    _, again = run(still, splits, tmp_path / "cut")  # finished: nothing is done
    assert again.standing == dataclasses.replace(
        outcome.standing, seconds=again.standing.seconds, step_seconds=again.standing.step_seconds
    )
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
