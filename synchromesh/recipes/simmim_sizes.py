"""simmim_b to simmim_g: SimMIM of SwinV2 in the sizes of its paper; give the pictures with --data.

Settings are those that SimMIM published for Swin-B and 100 epochs (arXiv 2111.09886): 192 pixels, cells of 32, 60 %
hidden, a rate of 2e-4 for 512 pictures, ten epochs of warm-up, no stochastic depth. Sizes are SwinV2's (arXiv
2111.09883). How huge and giant were pre-trained is not known here: their normalised targets, of 47 pixels, are an
option of Microsoft's code, and the rest is Swin-B's.
"""

from __future__ import annotations

from pathlib import Path

from synchromesh.data.images import Preprocess
from synchromesh.data.photographs import PhotographFolder
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.tasks.simmim import CropData, SimMIM
from synchromesh.training.config import TrainConfig
from synchromesh.training.optim import Optim

IMAGENET = Preprocess(image_size=192, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PICTURES = 1_281_167  # of an epoch, as ImageNet-1K has


def _of_size(name: str, width: int, deep: int, heads: int, last: int = 2, window: int = 0) -> TrainConfig:
    data = CropData(
        source=PhotographFolder(Path("imagenet")), preprocess=IMAGENET, train=PICTURES, scale=(0.8, 1.0), colors=None
    )
    model = SwinV2Config(
        image_size=192,
        embed_dim=width,
        depths=(2, 2, deep, last),
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        window_size=12,
        drop_path=0.0,
    )
    return TrainConfig(
        name=name,
        task=SimMIM(data=data, cell=32, ratio=0.6, window=window),
        model=model,
        optim=Optim(lr=2e-4, warmup_lr=1e-6, final_lr=1e-5, lr_batch=512, warmup_epochs=10.0, weight_decay=0.05),
        epochs=100,
        batch_size=2048,
        eval_batch_size=256,
        accumulate=16,
    )


def simmim_b() -> TrainConfig:
    """Return the base size: 128 channels, 18 blocks in the third stage."""
    return _of_size("simmim_b", 128, 18, 4)


def simmim_l() -> TrainConfig:
    """Return the large size: 192 channels."""
    return _of_size("simmim_l", 192, 18, 6)


def simmim_h() -> TrainConfig:
    """Return the huge size: 352 channels, normalised targets."""
    return _of_size("simmim_h", 352, 18, 11, window=47)


def simmim_g() -> TrainConfig:
    """Return the giant size: 512 channels, 42 and 4 blocks in the last stages, normalised targets."""
    return _of_size("simmim_g", 512, 42, 16, last=4, window=47)
