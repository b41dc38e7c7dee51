"""demo: a SwinV2-MoE with 8 experts, and its dense twin, learn 4,000 MNIST digits in minutes on a laptop's CPU."""

from __future__ import annotations

from synchromesh.data.augment import Affine, Augment
from synchromesh.data.images import Preprocess
from synchromesh.data.sources import MnistDigits
from synchromesh.moe.losses import LoadBalance
from synchromesh.training.architecture import DenseSwin, ExpertLayers, Swin, SwinMoE
from synchromesh.training.config import Data, Keep, TrainConfig
from synchromesh.training.optim import Optim

# The released block style, pre-norm, learns faster from few images than post-norm. At such small widths SwinV2's first
# weights (standard deviation 0.02) are so small that the branches hardly speak at first, and every step is a large one.
SWIN = Swin(
    embed_dim=48,
    depths=(2, 4),
    num_heads=(3, 6),
    patch_size=4,
    window_size=8,
    drop_path=0.0,
    released_style=True,
    init_std=0.1,
)
EXPERTS = ExpertLayers(
    count=8,
    blocks=((), (1, 3)),
    capacity_factor=0.0,
    noise=0.0,
    loss=LoadBalance(0.01),
)
# 28 x 28 pixels are shown as 32 x 32: maps of 8 x 8 and 4 x 4 positions then need no padding to fill their windows.
PREPROCESS = Preprocess(image_size=32, channels=1, mean=(0.1307,), std=(0.3081,))


def demo() -> TrainConfig:
    """Return the recipe of `make demo`: the last epoch counts, nothing is chosen on the test images."""
    return TrainConfig(
        name="demo",
        model=SwinMoE(SWIN, EXPERTS),
        twin=DenseSwin(SWIN),
        data=Data(MnistDigits(), PREPROCESS),
        augment=Augment(affine=Affine(rotate=12.0, shear=8.0, zoom=0.15, shift=0.08)),
        optim=Optim(
            lr=2e-3,
            warmup_lr=0.0,
            final_lr=1e-5,
            lr_batch=64,
            warmup_epochs=2.0,
            weight_decay=0.05,
            betas=(0.9, 0.99),
        ),
        epochs=30,
        batch_size=128,
        label_smoothing=0.05,
        bf16=False,  # at these widths the casts cost more than the products gain
        keep=Keep(evaluate_epochs=5, best=False, ranks=2),
    )
