import builtins
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synchromesh.errors import InputError
from synchromesh.training.codec import decode, encode
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.job import Job
from synchromesh.training.loop import fit
from synchromesh.training.metrics import MetricsWriter, read_metrics
from synchromesh.training.trackers import IDS, MLflow, Place, TensorBoard, Tracker, Tracking, Wandb, flat

MakeJob = Callable[..., Job]


def keeping(config: TrainConfig, **how: Any) -> TrainConfig:
    return dataclasses.replace(config, epochs=1, keep=dataclasses.replace(config.keep, **how))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that MLflow writes to, without a server; it asks to be told that this is wanted."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def test_every_tracker_gets_the_numbers_of_every_line_and_nothing_that_is_not_finite(tmp_path: Path) -> None:
    class Notes(Tracker):
        def __init__(self) -> None:
            self.lines: list[Any] = []

        def write(self, numbers: Any, step: int) -> None:
            self.lines.append((step, dict(numbers)))

        def close(self) -> None:
            self.lines.append("closed")

    one, two = Notes(), Notes()
    writer = MetricsWriter(tmp_path / "m.jsonl", trackers=[one, two])
    writer.write({"kind": "train", "step": 3, "loss": math.nan, "lr": 0.5, "load": {"a.ffn": [0.25, 0.75]}})
    writer.close()
    wanted = {"train/lr": 0.5, "train/load/a.ffn/expert_0": 0.25, "train/load/a.ffn/expert_1": 0.75}
    assert one.lines == two.lines == [(3, wanted), "closed"]


def test_mlflow_has_the_numbers_and_the_recipe_of_a_run_that_was_cut_off_as_one_run(
    tiny: TrainConfig, make_job: MakeJob, store: str
) -> None:
    from mlflow import MlflowClient

    config = keeping(tiny, mlflow=MLflow(store, "trials"), checkpoint_steps=1, log_steps=1)
    with pytest.raises(RuntimeError, match="crashed"):
        fit(make_job(config, "run", crash_at=4))
    job = make_job(config, "run")
    fit(job)
    client = MlflowClient(tracking_uri=store)
    (found,) = client.search_runs([client.get_experiment_by_name("trials").experiment_id])
    assert found.info.run_id == json.loads((job.folder / IDS).read_text())["mlflow"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    losses = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "train/loss")}
    lines = read_metrics(job.folder / "metrics.jsonl")
    assert losses == {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert [m.value for m in client.get_metric_history(found.info.run_id, "test/accuracy")] == [lines[-1]["accuracy"]]
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["recipe.json"]


def test_what_an_mlflow_does_not_take_is_sent_again_and_missed_at_the_end(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    def down(*given: Any, **named: Any) -> None:
        raise MlflowException("no answer")

    tracker = MLflow(store).open(Place(tmp_path, {}, 0))
    run = json.loads((tmp_path / IDS).read_text())["mlflow"]
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", down)
        tracker.write({"train/loss": 2.0}, 1)
    tracker.write({"train/loss": 1.0}, 2)
    client = MlflowClient(tracking_uri=store)
    assert [(m.step, m.value) for m in client.get_metric_history(run, "train/loss")] == [(1, 2.0), (2, 1.0)]
    monkeypatch.setattr(MlflowClient, "log_batch", down)
    tracker.write({"train/loss": 0.0}, 3)
    with pytest.warns(UserWarning, match="MLflow did not take 1 numbers of the run: no answer"):
        tracker.close()


def test_an_mlflow_that_refuses_says_why_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(InputError, match="MLflow refuses the run: "):
        MLflow("unknown://nowhere").open(Place(tmp_path, {}, 0))


def test_wandb_writes_offline_into_the_run_folder_and_a_resumed_run_has_the_same_name(
    tiny: TrainConfig, make_job: MakeJob
) -> None:
    wandb = pytest.importorskip("wandb")
    config = keeping(tiny, wandb=Wandb(project="trials", offline=True), checkpoint_steps=1)
    with pytest.raises(RuntimeError, match="crashed"):
        fit(make_job(config, "run", crash_at=4))
    job = make_job(config, "run")
    fit(job)
    wandb.teardown()  # its own process writes the files, until then
    own = json.loads((job.folder / IDS).read_text())["wandb"]
    runs = sorted((job.folder / "wandb").glob(f"offline-run-*-{own}/run-{own}.wandb"))
    assert runs
    written = b"".join(file.read_bytes() for file in runs)
    assert b"test/accuracy" in written
    assert b"embed_dim" in written


def test_tensorboard_writes_into_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = TensorBoard().open(Place(tmp_path, {}, 0))
    board.write({"train/loss": 0.5}, 3)
    board.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize(
    ("tracking", "package", "said"),
    [
        (TensorBoard(), "torch.utils.tensorboard", r"--tensorboard needs the package tensorboard: .*\[report\]"),
        (Wandb(), "wandb", r"--keep\.wandb needs the package wandb: .*\[trackers\]"),
        (MLflow(), "mlflow", r"--keep\.mlflow needs the package mlflow-skinny: .*\[trackers\]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tracking: Tracking, package: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def absent(module: str, *others: Any) -> Any:
        if module == package:
            raise ImportError(module)
        return real(module, *others)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=said):
        tracking.open(Place(tmp_path, {}, 0))


def test_a_damaged_file_of_names_is_named(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    (tmp_path / IDS).write_text("[1")
    with pytest.raises(InputError, match=r"trackers\.json is damaged: remove it"):
        Wandb(offline=True).open(Place(tmp_path, {}, 0))


def test_trackers_are_settings_of_a_recipe() -> None:
    keep = Keep(tensorboard=True, wandb=Wandb("p", offline=True), mlflow=MLflow("http://here"))
    assert decode(Keep, encode(keep)) == keep
    assert [type(tracking) for tracking in keep.trackings] == [TensorBoard, Wandb, MLflow]
    assert flat({"kind": "test", "step": 1, "name": "x"}) == {}
