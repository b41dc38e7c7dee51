"""swinv2_moe_s_22k: SwinV2-MoE-S with 32 experts from scratch on ImageNet-22K, with the paper's settings."""

from __future__ import annotations

from pathlib import Path

from synchromesh.data.augment import Augment
from synchromesh.data.images import Preprocess, RandomCrop
from synchromesh.data.mixing import Mixing
from synchromesh.data.rand_augment import RandAugment
from synchromesh.data.sources import ImageFolder
from synchromesh.models.swin_v2_moe import PUBLISHED_BLOCKS
from synchromesh.training.architecture import ExpertLayers, Swin, SwinMoE
from synchromesh.training.config import Data, TrainConfig
from synchromesh.training.optim import Optim

# ImageNet's statistics; 192 pixels from the middle of 219, as with 224 from 256.
IMAGENET = Preprocess(
    image_size=192, channels=3, crop_ratio=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
AUGMENT = Augment(crop=RandomCrop(), flip=0.5, rand_augment=RandAugment(), erase=0.25, mixing=Mixing())


def swinv2_moe_s_22k() -> TrainConfig:
    """Return the pre-training recipe of the small model; give the images with --data."""
    return TrainConfig(
        name="swinv2_moe_s_22k",
        model=SwinMoE(swin(96, drop_path=0.2), EXPERTS),
        data=Data(ImageFolder(Path("imagenet22k")), IMAGENET),
        augment=AUGMENT,
        optim=Optim(),
        epochs=90,
        batch_size=4096,
        eval_batch_size=256,
        accumulate=32,
        label_smoothing=0.1,
    )


def swin(embed_dim: int, *, drop_path: float) -> Swin:
    """Return the published sizes of one width: 12 x 12 windows, 18 blocks in stage 3, released block style."""
    return Swin(
        embed_dim=embed_dim,
        depths=(2, 2, 18, 2),
        num_heads=tuple(embed_dim * 2**stage // 32 for stage in range(4)),
        patch_size=4,
        window_size=12,
        drop_path=drop_path,
        released_style=True,
        init_std=0.005,
        branch_norm_init=0.0,
    )


EXPERTS = ExpertLayers(
    count=32,
    k=1,
    blocks=PUBLISHED_BLOCKS,
    capacity_factor=1.25,
    prioritized=True,
    noise=1.0,
    dropout=0.1,
    down_bias=False,
)
