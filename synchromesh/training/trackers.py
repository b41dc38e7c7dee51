"""Trackers: where the numbers of a run go besides metrics.jsonl. All of them by one interface, the first rank alone."""

from __future__ import annotations

import json
import time
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from synchromesh.errors import InputError
from synchromesh.training.durable import write_json

MOST_AT_ONCE = 1000  # numbers that MLflow takes in one call
IDS = "trackers.json"  # in the run folder: what each service calls the run, so that a resumed one goes on there


@dataclass(frozen=True)
class Place:
    """What a tracker is opened for.

    Attributes:
        folder: of the run.
        settings: of the run, as plain JSON values.
        step: optimizer steps done; what an earlier process wrote after them is not part of the run.
    """

    folder: Path
    settings: Mapping[str, Any]
    step: int


class Tracker(ABC):
    """Takes the numbers of one run."""

    @abstractmethod
    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Take numbers, such as "train/loss", of one step."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is left."""


class Tracking(ABC):
    """Settings of a tracker: a frozen dataclass of plain values."""

    @abstractmethod
    def open(self, place: Place) -> Tracker:
        """Begin, or go on. Raises InputError where a package is missing, or the service refuses."""


@final
@dataclass(frozen=True)
class TensorBoard(Tracking):
    """TensorBoard events in the folder `tensorboard` of the run; events after a resumed step are hidden."""

    def open(self, place: Place) -> Tracker:
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra
        except ImportError as error:
            raise _missing("--tensorboard", "tensorboard", "report") from error
        return _Board(SummaryWriter(str(place.folder / "tensorboard"), purge_step=place.step))


@final
@dataclass(frozen=True)
class Wandb(Tracking):
    """Weights & Biases.

    Attributes:
        project: where the run is listed.
        entity: whose project; none for your own.
        name: of the run; none for that of its folder.
        offline: write into `wandb` of the run folder alone, for `wandb sync` later.
    """

    project: str = "synchromesh"
    entity: str | None = None
    name: str | None = None
    offline: bool = False

    def open(self, place: Place) -> Tracker:
        try:
            import wandb  # an extra
        except ImportError as error:
            raise _missing("--keep.wandb", "wandb", "trackers") from error
        own = _id_of(place.folder, "wandb", lambda: uuid.uuid4().hex[:12])
        try:
            run = wandb.init(
                project=self.project, entity=self.entity, name=self.name or place.folder.name, id=own, resume="allow",
                dir=str(place.folder), mode="offline" if self.offline else "online", config=dict(place.settings),
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError(
                f"Weights & Biases refuses the run: {error}; --keep.wandb.offline needs no login"
            ) from error
        return _WandbRun(run)


@final
@dataclass(frozen=True)
class MLflow(Tracking):
    """MLflow.

    Attributes:
        uri: of the tracking server, or of another store that your MLflow writes to; none for what MLflow itself takes.
        experiment: where the run is listed.
        name: of the run; none for that of its folder.
    """

    uri: str | None = None
    experiment: str = "synchromesh"
    name: str | None = None

    def open(self, place: Place) -> Tracker:
        try:
            from mlflow import MlflowClient  # an extra
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise _missing("--keep.mlflow", "mlflow-skinny", "trackers") from error
        try:
            client = MlflowClient(tracking_uri=self.uri)
            own = _id_of(place.folder, "mlflow", lambda: self._begin(client, place))
            client.update_run(own, status="RUNNING")
        except MlflowException as error:
            raise InputError(f"MLflow refuses the run: {error}") from error
        return _MLflowRun(client, own)

    def _begin(self, client: Any, place: Place) -> str:
        found = client.get_experiment_by_name(self.experiment)
        experiment = client.create_experiment(self.experiment) if found is None else found.experiment_id
        own = client.create_run(experiment, run_name=self.name or place.folder.name).info.run_id
        client.log_dict(own, dict(place.settings), "recipe.json")
        return own


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics by "kind/name"; those that are not finite are null there, and left out.

    >>> flat({"kind": "train", "step": 3, "loss": 0.5, "load": {"ffn": [0.25, 0.75]}})
    {'train/loss': 0.5, 'train/load/ffn/expert_0': 0.25, 'train/load/ffn/expert_1': 0.75}
    """
    found = {name: float(v) for name, v in line.items() if isinstance(v, (int, float)) and name != "step"}
    for layer, shares in line.get("load", {}).items():
        found.update({f"load/{layer}/expert_{number}": share for number, share in enumerate(shares)})
    return {f"{line['kind']}/{name}": value for name, value in found.items()}


class _Board(Tracker):
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandbRun(Tracker):
    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflowRun(Tracker):
    """What a server does not take is kept, and sent again with the next numbers: a run does not end for it."""

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run
        self._waiting: list[Any] = []

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in numbers.items()]
        self._send()

    def close(self) -> None:
        problem = self._send()
        if problem:
            warnings.warn(f"MLflow did not take {len(self._waiting)} numbers of the run: {problem}", stacklevel=2)
        else:
            self._client.set_terminated(self._run)

    def _send(self) -> str:
        from mlflow.exceptions import MlflowException

        try:
            while self._waiting:
                self._client.log_batch(self._run, metrics=self._waiting[:MOST_AT_ONCE])
                self._waiting = self._waiting[MOST_AT_ONCE:]
        except MlflowException as error:
            return str(error)
        return ""


def _id_of(folder: Path, service: str, begin: Any) -> str:
    """Return what a service calls the run in this folder; a new run begins there, and is remembered."""
    path = folder / IDS
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
        own = known.get(service)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: remove it, and the run is listed anew") from error
    if isinstance(own, str):
        return own
    own = begin()
    write_json(path, {**known, service: own})
    return own


def _missing(option: str, package: str, extra: str) -> InputError:
    return InputError(f"{option} needs the package {package}: pip install 'synchromesh[{extra}]'")
