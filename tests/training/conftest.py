import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from synchromesh import seeds
from synchromesh.data.augment import Affine, Augment
from synchromesh.data.images import Preprocess
from synchromesh.data.mixing import Mixing
from synchromesh.data.sources import ScikitDigits
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import FixedCapacity, batch_prioritized
from synchromesh.moe.losses import LoadBalance, OverRanks
from synchromesh.tasks.classification import Classification, Data
from synchromesh.training.codec import encode
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.interrupt import StopWish
from synchromesh.training.job import Event, Job
from synchromesh.training.loader import Loading
from synchromesh.training.optim import Optim
from synchromesh.training.panels import Bars, Curves, Matrix, Sheet
from synchromesh.training.run_folder import build_model, identity
from synchromesh.training.task import Splits

MakeJob = Callable[..., Job]

LAYER = "backbone.stages.1.blocks.1.ffn"
PANELS = (
    Sheet("Sizes <of> boxes", ("size", "AP"), (("small", "0.250"), ("large", "-"))),
    Bars("AP of classes", "class", "AP in 1", ("cat", "dog"), {"boxes": (0.5, 0.25), "masks": (0.4, 0.2)}),
    Matrix("Confusion matrix", ("cat", "dog"), ((7, 1), (0, 5))),
    Curves(
        "Precision, recall", "recall of all", "precision of all",
        {f"IoU {iou}": tuple((n / 8, 1 - iou * (n / 8) ** 2) for n in range(9)) for iou in (0.5, 0.75)},
    ),
)  # fmt: skip


def numbers(prefix: str) -> dict[str, float]:
    values = {
        "test_accuracy": 0.98765, "test_loss": 0.05, "train_seconds": 123.4, "images_per_second": 987.0,
        "evaluated_images_per_second": 2345.0, "parameters": 1234567, "active_parameters": 456789,
    }  # fmt: skip
    return {prefix + name: value for name, value in values.items()}


def write_run(folder: Path, config: TrainConfig, *, finished: bool = True, twin: bool = True) -> None:
    """Write what a run of six epochs with a twin leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(encode(config)))
    lines = []
    for i in range(1, 13):
        common = {"step": i, "epoch": i / 2, "seconds": 1.0 * i, "accuracy": 1 - 0.5 / i, "loss": 1 / i}
        load = {LAYER: [0.25 + 0.01 * i, 0.25, 0.25, 0.25 - 0.01 * i]}
        train = {
            "kind": "train",
            "task_loss": 1 / i,
            "learning_rate": 1e-3 * i,
            "images_per_second": 900.0 + 50 * (i % 3),
            "drop_rate": 0.1 / i,
            "load": load,
        }
        lines.append({**common, **train})
        if i % 2 == 0:
            lines.append({**common, "kind": "test", "images_per_second": 2000.0, "drop_rate": 0.03 / i, "load": load})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if twin:
        _write_twin(folder, lines)
    if finished:
        write_summary(folder, twin=twin)


def _write_twin(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "dense").mkdir()
    dense = [{**line, "load": {}, "drop_rate": 0.0} for line in lines]
    (folder / "dense" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in dense))


def write_summary(folder: Path, *, twin: bool) -> None:
    """Write what a finished run says of itself."""
    (folder / "pictures").mkdir()
    Image.new("L", (9, 5)).save(folder / "pictures" / "worst-1.png")
    summary = {
        **numbers(""), **(numbers("dense_") if twin else {}), "recipe": "tiny", "seed": 0, "epochs": 6,
        "test_images": 1000, "device": "cpu", "dead_experts": 0, "test_load": {LAYER: [0.3, 0.25, 0.25, 0.2]},
        "test_drop_rate": 0.01, "plans": {}, "panels": [encode(panel) for panel in PANELS],
        "pictures": {"worst-1.png": "4, taken for 9 (98.0%)\nworst 1: test images number 7", "best-1.png": "gone"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def written() -> Callable[..., None]:
    """Write the folder of a run, finished or not, with a twin or without."""
    return write_run


@pytest.fixture
def tiny() -> TrainConfig:
    """A model of a few thousand parameters, with everything random switched on: noise, drop path, affine, mixing."""
    experts = ExpertsConfig(
        num_experts=4,
        blocks=((), (1,)),
        router=LinearGate(noise=1.0, bias_rate=1e-3),
        capacity=FixedCapacity(1.0, priority=batch_prioritized),
        losses=(OverRanks(LoadBalance(0.01)),),
        dropout=0.0,
        down_bias=True,
    )
    return TrainConfig(
        name="tiny",
        task=Classification(
            data=Data(ScikitDigits(), Preprocess(image_size=8, channels=1)),
            augment=Augment(affine=Affine(), mixing=Mixing(chance=0.5)),
        ),
        model=SwinV2Config(
            embed_dim=8, depths=(1, 2), num_heads=(1, 2), patch_size=2, window_size=4, drop_path=0.2, experts=experts
        ),
        optim=Optim(lr=1e-3, lr_batch=16, warmup_epochs=0.5),
        epochs=2,
        batch_size=16,
        eval_batch_size=32,
        loading=Loading(workers=1),
        keep=Keep(log_steps=3, checkpoint_seconds=1e9),
    )


@pytest.fixture
def make_job(splits: Splits, tmp_path: Path) -> MakeJob:
    """Make the job of a configuration in a folder of this name; it crashes when that many steps are done."""

    def make(config: TrainConfig, name: str, *, crash_at: int = -1, **others: Any) -> Job:
        with seeds.torch_seeded(torch.device("cpu"), config.seed, seeds.INIT):
            model = build_model(config.task, config.model, splits.facts)
        (tmp_path / name).mkdir(exist_ok=True)

        def tell(event: Event) -> None:
            if event.kind == "step" and event.step == crash_at:
                raise RuntimeError("crashed")  # stands for a kill: nothing of the loop runs after it

        own = identity(config.task, config.model, splits.facts)
        return Job(config, model, others.pop("splits", splits), tmp_path / name, own, StopWish(), tell, **others)

    return make
