"""Name the class of each pixel, from a folder of pictures and label files: a SwinV2-MoE with a semantic head.

python examples/segment.py 400     # steps; 30 if not given, which show the loss fall
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from synchromesh import aux_loss
from synchromesh.data.images import Preprocess
from synchromesh.data.moves import RandomMoves
from synchromesh.data.scene_maps import SceneLabels
from synchromesh.data.scenes import ComposedScenes
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.recipes.detect_demo import detect_demo
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.training.task import Run

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 30
SIZE, CPU = Preprocess(image_size=64, channels=1, mean=(0.2,), std=(0.2,)), torch.device("cpu")


def write(folder: Path, count: int) -> None:
    """Write pictures and their label files, as users have them; here digits on photographs."""
    scenes = SceneLabels(ComposedScenes(fewest=2, smallest=24).load(SIZE)[0])
    [(folder / name).mkdir() for name in ("images", "labels")]
    (folder / "classes.txt").write_text("\n".join(scenes.classes))
    for number, scene in enumerate(map(scenes.read, range(count))):
        Image.fromarray(scene.image[0].numpy()).save(folder / "images" / f"{number}.png")
        Image.fromarray(scene.truth.values).save(folder / "labels" / f"{number}.png")


with tempfile.TemporaryDirectory() as place:
    torch.manual_seed(0)
    write(Path(place), 64)
    data = PixelData(preprocess=SIZE, moves=RandomMoves(sizes=((64, 64),), scale=(0.8, 1.2), flip=0.0))
    task = Segmentation(data, SemanticFPN(width=32)).reading(Path(place))
    splits, rng = task.splits(seed=0), np.random.default_rng(0)
    model = task.build(task.sized(detect_demo().model), splits.facts)
    optimizer, run = torch.optim.AdamW(model.parameters(), lr=2e-3), Run(model, model)
    for step in range(STEPS):
        numbers = rng.integers(len(splits.train), size=8)
        batch = task.prepare([splits.train.read(n, lambda: rng) for n in numbers], splits.facts, CPU, rng)
        counts, terms = task.counts(batch), task.loss(run, batch)
        loss = sum(terms[name].weight * terms[name].total / counts[name] for name in terms) + aux_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.2f}")
    scorer, model = task.scorer(splits.facts), model.eval()
    with torch.inference_mode():
        scorer.add(run, task.prepare([splits.test.read(n) for n in range(len(splits.test))], splits.facts, CPU, None))
    print({name: round(value, 3) for name, value in scorer.scores([scorer.state()]).numbers.items()})
