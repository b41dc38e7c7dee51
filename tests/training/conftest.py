from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
from synchromesh.training.config import Keep, TrainConfig
from synchromesh.training.interrupt import StopWish
from synchromesh.training.job import Event, Job
from synchromesh.training.loader import Loading
from synchromesh.training.optim import Optim
from synchromesh.training.run_folder import build_model, identity
from synchromesh.training.task import Splits

MakeJob = Callable[..., Job]


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
