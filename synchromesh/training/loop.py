"""The training loop: steps, evaluations and checkpoints until the last epoch, from wherever the run folder stands."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from synchromesh import seeds
from synchromesh.errors import CollapsedError, InputError, NonFiniteError, StoppedError
from synchromesh.moe.record import load_stats
from synchromesh.parallel.parallelize import parallelize
from synchromesh.training.agree import counted, largest, loads_over_ranks, on_first
from synchromesh.training.average import Average
from synchromesh.training.checkpoint import (
    Snapshot,
    newest_checkpoint,
    restore_average,
    restore_model,
    restore_optimizer,
    save_best,
)
from synchromesh.training.codec import encode
from synchromesh.training.evaluate import EvalOptions, Evaluation, evaluate
from synchromesh.training.job import Event, Job, Outcome, Standing
from synchromesh.training.left_out import LeftOutFile
from synchromesh.training.loader import EpochPlace, Loaded, Part, train_batches
from synchromesh.training.metrics import METRICS_FILE, MetricsWriter, drop_rate, load_shares
from synchromesh.training.optim import build_optimizer, group_steps, make_schedule, set_group_steps
from synchromesh.training.plans import Plans, expert_counts, strategies
from synchromesh.training.precision import compile_blocks, quiet_compiler
from synchromesh.training.saver import Saver
from synchromesh.training.start import still
from synchromesh.training.step import Counts, Trainee, own_numbers, train_step
from synchromesh.training.trackers import Place
from synchromesh.training.window import Window


def fit(job: Job) -> Outcome:
    """Train to the end, continuing from the newest unharmed checkpoint in the run folder.

    Raises:
        StoppedError: `job.stop` asked for it; everything is saved.
        NonFiniteError: the loss or a gradient became NaN or infinite; the last checkpoint stays as it is.
        InputError: a sample is unreadable.
    """
    loop = _Loop(job)
    with _deterministic_on_cpu(loop.device), quiet_compiler(), loop:
        while True:
            if loop.evaluation_due():
                loop.evaluate()
            if loop.standing.step == job.total or loop.gave_up():
                break
            loop.train_epoch()
        loop.save()
        loop.finish_saving()
    return Outcome(loop.standing, loop.last_evaluation or loop.score(), loop.plans.ran(), loop.average)


class _Loop:
    """The moving parts of one `fit`."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.model, self.grid = job, job.config, job.model, job.grid
        self.device = next(job.model.parameters()).device
        if job.config.channels_last:
            job.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if job.config.compile:
            compile_blocks(job.model)
        scaler = job.config.precision.scaler(self.device)
        run = parallelize(job.model, job.grid, strategy=strategies(job.config.parallelism, job.grid))
        self.plans = Plans(job.model, job.grid, job.config.parallelism)
        self.trainee, self.part = Trainee(job.model, run, job.grid, scaler), Part(job.grid.rank, job.grid.size)
        self.average = Average(job.model, job.config.ema)
        self.optimizer: Optimizer = build_optimizer(job.model, job.config.optim)
        self.schedule = make_schedule(
            job.config.optim,
            batch_size=job.config.batch_size,
            steps_per_epoch=job.epoch_steps,
            epochs=job.config.epochs,
        )
        self.standing, self.window = Standing(), Window()
        self.last_evaluation: Evaluation | None = None
        self._saved: tuple[int, int] | None = None
        self.left_out = LeftOutFile(job.folder, job.grid, lambda text: self._tell("note", text=text))
        self.saver, self._saving = Saver(job.checkpoints, job.grid.with_own_group()), False
        size = self._restore()
        self.metrics: MetricsWriter | None = None
        if job.grid.rank == 0:
            place = Place(job.folder, encode(job.config), self.standing.step)
            trackers = [tracking.open(place) for tracking in job.config.keep.trackings]
            self.metrics = MetricsWriter(job.folder / METRICS_FILE, size=size, trackers=trackers)
        self._saved_at = self._clock = time.perf_counter()

    def __enter__(self) -> _Loop:
        self._clock = time.perf_counter()
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if self.grid.group is None or isinstance(error, StoppedError | NonFiniteError | CollapsedError):
            self.saver.join()  # after other errors ranks may be gone: what they write together is never finished
        if self.metrics is not None:
            self.metrics.close()

    def train_epoch(self) -> None:
        """Take the steps of the epoch that are still to come."""
        job, config = self.job, self.config
        epoch, first = divmod(self.standing.step, job.epoch_steps)
        place = EpochPlace(config.seed, epoch, first)
        self.model.train()
        still(self.model, config.start.freeze)
        batches = train_batches(
            job.splits.train, config.batch_size, place=place, loading=config.loading, part=self.part
        )
        started = time.perf_counter()
        for loaded in batches:
            self._step(loaded, started)
            self._after_step()
            started = time.perf_counter()
        self.left_out.check_some_read(self.standing.samples, config.task.unit)

    def _step(self, loaded: Loaded, started: float) -> None:
        now, task = self.standing, self.config.task
        rng = seeds.numpy_generator(self.config.seed, seeds.AUGMENT, now.step, *own_numbers(self.part))
        batch = task.prepare(loaded.samples, self.job.splits.facts, self.device, rng)
        batch = task.shaped(batch, seeds.numpy_generator(self.config.seed, seeds.SHAPE, now.step))
        own = task.counts(batch)
        samples, bad, *terms = counted(self.grid, [len(batch), len(loaded.bad), *own.values()], self.device)
        now.bad += bad
        self.left_out.add(loaded.left_out, of=bad)
        if samples > 0:
            rate, counts = self.schedule(now.step), Counts(samples, dict(zip(own, terms, strict=True)))
            numbers = train_step(
                self.trainee, self.optimizer, batch, self.config, step=now.step, rate=rate, counts=counts,
                device=self.device,
            )  # fmt: skip
            self.average.update(now.step)
            taken = time.perf_counter() - started
            self.window.add(numbers, loads_over_ranks(self.grid, load_stats(self.model)), taken)
            now.step_seconds += taken
            now.samples += samples
            self._tell("step", line={"loss": numbers.loss, "learning_rate": rate, task.unit: samples})
        now.step += 1  # without readable samples too: every rank, and a resumed run, counts the same steps

    def _after_step(self) -> None:
        keep, step = self.config.keep, self.standing.step
        self._tick()
        if step % keep.log_steps == 0 or step == self.job.total:
            line = {
                **self.window.line(self.config.task.unit),
                "learning_rate": self.schedule(step - 1),
                f"bad_{self.config.task.unit}": self.standing.bad,
                **({"loss_scale": self.trainee.scaler.get_scale()} if self.config.fp16 else {}),
            }
            self._write("train", line)
            self.window = Window()
        late = self._heed_others()
        if late or (keep.checkpoint_steps and step % keep.checkpoint_steps == 0):
            self.save()

    def evaluation_due(self) -> bool:
        """Whether an epoch has just ended that is to be evaluated, and was not."""
        step, every = self.standing.step, self.config.keep.evaluate_epochs * self.job.epoch_steps
        return self.standing.evaluated < step and (step == self.job.total or step % every == 0) and step > 0

    def gave_up(self) -> bool:
        """Whether the last evaluations were none the better, as many as the run has patience for."""
        return 0 < self.config.patience <= self.standing.stale

    def evaluate(self) -> None:
        """Score the test samples, write the line, save, and keep the best."""
        self.last_evaluation = found = self.score()
        now, task = self.standing, self.config.task
        now.evaluated = now.step
        headline = found.scores.numbers[task.numbers[0].name]
        better = task.numbers[0].better(headline, now.best)
        now.stale = 0 if better else now.stale + 1
        if better:
            now.best, now.best_step = headline, now.step
        self._tick()
        line = {**found.scores.numbers, f"{task.unit}_per_second": found.samples / found.seconds}
        self._write("test", {**line, "drop_rate": drop_rate(found.loads), "load": load_shares(found.loads)})
        self.save(best=better and self.config.keep.best)
        if self.gave_up():
            self._tell("note", text=f"ends early: {now.stale} evaluations without a better {task.numbers[0].title}")

    def score(self) -> Evaluation:
        """Evaluate the weights as they are, or their average; a stop wish is heeded between two batches."""
        config, splits = self.config, self.job.splits
        options = EvalOptions(config.loading, config.eval_batch_size, config.precision)
        with self.average.in_place():
            found = evaluate(
                config.task, splits.facts, self.model, splits.test, options, between=self._heed_stop, grid=self.grid
            )
        self.left_out.add(found.left_out, of=len(found.left_out))
        return found

    def save(self, *, best: bool = False) -> None:
        """Begin to write a checkpoint of this moment, unless there is one; best keeps it as the best one too."""
        now = self.standing
        if self._saved == (now.step, now.evaluated):
            return
        self.finish_saving()
        self._tick()
        state = {
            "step": now.step,
            "train_samples": len(self.job.splits.train),
            "standing": dataclasses.asdict(now),
            "window": self.window.to_json(),
            "metrics_bytes": 0 if self.metrics is None else self.metrics.sync(),
            "grid": {"ranks": self.grid.size, "ranks_per_node": self.grid.ranks_per_node},
            "experts": expert_counts(self.model),
            "group_steps": group_steps(self.optimizer),
            "scaler": self.trainee.scaler.state_dict(),
            "plans": self.plans.state(),
            "versions": {"synchromesh": version("synchromesh"), "torch": torch.__version__},
            **self.job.identity,
        }
        own_group = self.saver.grid  # the thread's collectives must not mix with those of training
        with self.average.out_of_place():  # an evaluation that is asked to stop saves too
            average = self.average.values
            snapshot = Snapshot.of(self.model, self.optimizer, state, own_group, average=average, copy=True)

        def then(folder: Path) -> None:
            if best:
                on_first(own_group, lambda: save_best(self.job.checkpoints, folder))

        on_first(self.grid, lambda: self.plans.save(self.job.folder))
        self.saver.start(snapshot, then)
        self._saved, self._saved_at, self._saving = (now.step, now.evaluated), time.perf_counter(), True

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written; all ranks call it together."""
        self.saver.join()
        if self._saving:
            self._saving = False
            self._tell("saved", text=str(self.job.checkpoints))

    def _restore(self) -> int:
        """Continue from the newest unharmed checkpoint; return how many bytes of the metrics belong to it."""
        found = newest_checkpoint(self.job.checkpoints, damaged=self._note_damaged, grid=self.grid)
        if found is None:
            return 0
        state, samples, unit = self.job.upgrade(found.state), len(self.job.splits.train), self.config.task.unit
        if state["train_samples"] != samples:
            raise InputError(
                f"{self.job.folder} was trained on {state['train_samples']} {unit}, the data now holds {samples}: "
                "bring the data back, or start a new run"
            )
        restore_model(found.folder, self.model, self.grid)
        restore_optimizer(found.folder, self.model, self.optimizer, self.grid)
        set_group_steps(self.optimizer, state.get("group_steps", []))
        if state.get("scaler"):
            self.trainee.scaler.load_state_dict(state["scaler"])
        if self.config.ema is not None:
            restore_average(found.folder, self.model, self.average.values, self.grid)
        if "plans" in state:  # older checkpoints have none
            self.plans.restore(state["plans"])
        self.standing = Standing(**state["standing"])
        self.window = Window.from_json(state["window"], self.device)
        self._saved = (self.standing.step, self.standing.evaluated)
        if self.standing.best_step == self.standing.step and self.config.keep.best:
            on_first(self.grid, lambda: save_best(self.job.checkpoints, found.folder))  # it may have been killed before
        self._tell("note", text=f"continuing {self.job.folder} after step {self.standing.step} of {self.job.total}")
        return state["metrics_bytes"]

    def _note_damaged(self, text: str) -> None:
        self._tell("note", text=f"{text}; using the one before it")

    def _heed_stop(self) -> None:
        self._heed_others()

    def _heed_others(self) -> bool:
        """Save and stop where any rank was asked to; else tell whether the first rank finds a checkpoint due."""
        late = self.grid.rank == 0 and time.perf_counter() - self._saved_at > self.config.keep.checkpoint_seconds
        # One all-reduce for all that ranks must decide alike: stopping, saving, joining the writer (once no rank is
        # busy: whoever waits for it blocks training), and what the adaptive plans have to agree on.
        wishes = [self.job.stop.signal or 0, int(late), int(self.saver.busy)]
        signal, due, busy, *plans = largest(self.grid, [*wishes, *self.plans.ask()], self.device)
        self.plans.tell(plans)
        if signal:
            self.save()
            self.finish_saving()
            raise StoppedError(signal=signal, step=self.standing.step)
        if self._saving and not busy:
            self.finish_saving()
        return bool(due)

    def _tick(self) -> None:
        """Bring `seconds` up to now."""
        now = time.perf_counter()
        self.standing.seconds += now - self._clock
        self._clock = now

    def _write(self, kind: str, numbers: dict[str, Any]) -> None:
        step = self.standing.step
        place = {"kind": kind, "step": step, "epoch": step / self.job.epoch_steps, "seconds": self.standing.seconds}
        if self.metrics is not None:
            self.metrics.write({**place, **numbers})
        self._tell(kind, line={**place, **numbers})

    def _tell(self, kind: str, *, line: dict[str, Any] | None = None, text: str = "") -> None:
        if self.grid.rank == 0:
            self.job.tell(Event(kind, self.standing.step, self.job.total, line or {}, text))


@contextmanager
def _deterministic_on_cpu(device: torch.device) -> Iterator[None]:
    """Let no CPU kernel add in an order that threads decide; GPUs keep their speed."""
    if device.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True)
    # Deterministic mode also fills fresh memory, which helps to debug and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore[reportAttributeAccessIssue]
