"""demo: a SwinV2-MoE with 8 experts, and its dense twin, learn 4,000 MNIST digits in minutes on a laptop's CPU."""

from __future__ import annotations

from synchromesh.losses import LoadBalance
from synchromesh.training.architecture import DenseSwin, ExpertLayers, Swin, SwinMoE
from synchromesh.training.augment import Affine, Augment
from synchromesh.training.config import Data, Keep, TrainConfig
from synchromesh.training.images import Preprocess
from synchromesh.training.optim import Optim
from synchromesh.training.sources import MnistDigits

SWIN = Swin(embed_dim=48, depths=(2, 4), num_heads=(3, 6), patch_size=4, window_size=7, drop_path=0.1)


def demo() -> TrainConfig:
    """Return the recipe of `make demo`: the last epoch counts, nothing is chosen on the test images."""
    return TrainConfig(
        name="demo",
        model=SwinMoE(
            SWIN, ExpertLayers(count=8, blocks=((), (1, 3)), capacity_factor=0.0, noise=0.0, loss=LoadBalance(0.01))
        ),
        twin=DenseSwin(SWIN),
        data=Data(MnistDigits(), Preprocess(image_size=28, channels=1, mean=(0.1307,), std=(0.3081,))),
        augment=Augment(affine=Affine()),
        optim=Optim(lr=2e-3, warmup_lr=0.0, final_lr=1e-5, lr_batch=128, warmup_epochs=2.0, weight_decay=0.05),
        epochs=20,
        batch_size=128,
        label_smoothing=0.1,
        keep=Keep(best=False),
    )
