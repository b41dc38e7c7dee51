from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.losses import LoadBalance
from synchromesh.training.architecture import ExpertLayers, Swin, SwinMoE
from synchromesh.training.augment import Affine, Augment
from synchromesh.training.config import Data, Keep, TrainConfig
from synchromesh.training.images import MemoryImages, Preprocess
from synchromesh.training.loader import Loading
from synchromesh.training.mixing import Mixing
from synchromesh.training.optim import Optim
from synchromesh.training.sources import ScikitDigits, Splits


@pytest.fixture
def tiny() -> TrainConfig:
    """A model of a few thousand parameters, with everything random switched on: noise, drop path, affine, mixing."""
    swin = Swin(embed_dim=8, depths=(1, 2), num_heads=(1, 2), patch_size=2, window_size=4, drop_path=0.2)
    experts = ExpertLayers(
        count=4, blocks=((), (1,)), capacity_factor=1.0, noise=1.0, loss=LoadBalance(0.01), bias_rate=1e-3
    )
    return TrainConfig(
        name="tiny",
        model=SwinMoE(swin, experts),
        data=Data(ScikitDigits(), Preprocess(image_size=8, channels=1)),
        augment=Augment(affine=Affine(), mixing=Mixing(chance=0.5)),
        optim=Optim(lr=1e-3, lr_batch=16, warmup_epochs=0.5),
        epochs=2,
        batch_size=16,
        eval_batch_size=32,
        loading=Loading(workers=1),
        keep=Keep(log_steps=3, checkpoint_seconds=1e9),
    )


@pytest.fixture
def splits() -> Splits:
    """Eight classes of random patterns with noise, 8 x 8: 96 to learn from, 32 to score on."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, 256, (8, 1, 8, 8), generator=generator)

    def images(count: int) -> MemoryImages:
        labels = torch.arange(count) % 8
        noise = torch.randint(-30, 31, (count, 1, 8, 8), generator=generator)
        pixels = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
        return MemoryImages(labels, tuple("abcdefgh"), Preprocess(image_size=8), pixels)

    return Splits(images(96), images(32))


@pytest.fixture
def photo() -> Callable[..., Path]:
    """Write a picture of random pixels, in the format that the file's name says."""

    def write(path: Path, *, size: tuple[int, int] = (24, 16), mode: str = "RGB", seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode="L" if mode == "L" else None).save(path)
        return path

    return write
