"""mask2former_ade20k: Mask2Former on a pre-trained SwinV2-MoE-B names the pixels of ADE20K. Never run at full size.

Settings are those of Mask2Former with Swin-B on ADE20K (arXiv 2112.01527, section 4.1 and appendix): crops of 640 x 640
pixels, pictures scaled by 0.5 to 2, batches of 16, AdamW at 1e-4 with decay 0.05, gradients clipped at 0.01, 160,000
steps. Two things differ, as the optimizer here has no such setting: the rate falls by half a cosine instead of a
polynomial of power 0.9, and falls from layer to layer of the backbone instead of being a tenth in all of it. Blocks are
recomputed in the backward.

Neither the data nor a machine for it was at hand: only its model was built.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synchromesh.compat.huggingface import heads as hf
from synchromesh.data.ade20k import Ade20k
from synchromesh.data.colors import RandomColors
from synchromesh.data.moves import Fit, RandomMoves
from synchromesh.data.pixel_sources import ReaderPair
from synchromesh.models.swin_v2_moe import config_b
from synchromesh.recipes.cascade_coco_s import finetuned
from synchromesh.recipes.swinv2_moe_s_22k import IMAGENET
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.training.config import Freeze, Start, TrainConfig
from synchromesh.training.optim import Optim

ADE20K = Path("ADEChallengeData2016")
EPOCHS = 127  # of 20,210 pictures in batches of 16: 160,000 steps


def mask2former_ade20k() -> TrainConfig:
    """Return the recipe; give --start.weights. MoE layers stay as they were, as is best in the MoE paper's table 10.

    Pictures are scored one at a time: inside of a batch the capacity would let one change another's score.
    """
    data = PixelData(
        ReaderPair(Ade20k(ADE20K, "training"), Ade20k(ADE20K, "validation")),
        dataclasses.replace(IMAGENET, image_size=640),
        fit=Fit(shorter=640, longer=2560),
        # The shorter side of a picture of 4 : 3 then has 320 to 1,280 pixels.
        moves=RandomMoves(sizes=((640, 640),), scale=(2 / 3, 8 / 3)),
        colors=RandomColors(contrast=(0.5, 1.5), brightness=32 / 255, invert=0.0, permute=0.0),
    )
    return TrainConfig(
        name="mask2former_ade20k",
        task=Segmentation(data, hf.SemanticMasks(hf.Mask2Former())),
        model=finetuned(config_b(), drop_path=0.3),
        optim=Optim(
            lr=1e-4,
            warmup_lr=0.0,
            final_lr=0.0,
            lr_batch=16,
            warmup_epochs=0.0,
            weight_decay=0.05,
            clip_norm=0.01,
            layer_decay=0.9,
        ),
        start=Start(weights=Path("runs/swinv2_moe_b_22k"), freeze=Freeze.MOE),
        epochs=EPOCHS,
        batch_size=16,
        eval_batch_size=1,
    )
