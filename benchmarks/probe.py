"""A linear probe: digits told apart by one linear layer on what the backbones of runs say of them, frozen.

    python benchmarks/probe.py runs/mixed_ae_demo runs/naive    # and the same backbone with random weights

1,797 digits of scikit-learn, scaled to the pictures of each run; some of each class to learn from, 897 to score on.
Features are the mean of the last map, standardised; the layer is scikit-learn's logistic regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from synchromesh.models.features import Backbone
from synchromesh.recipes.catalog import CATALOG
from synchromesh.training.run_folder import load_trained

SCORED = 897  # digits, the last ones


@dataclass(frozen=True)
class Args:
    """What is probed.

    Attributes:
        runs: folders of runs.
        of_each: digits of each class to learn from.
        seeds: draws of them, and random backbones.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    of_each: Annotated[int, tyro.conf.arg(name="of-each")] = 10
    seeds: int = 5


@torch.no_grad()
def features(backbone: Backbone, side: int, channels: int) -> np.ndarray:
    """Return what a backbone says of all digits, [N, D]."""
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    pixels = torch.nn.functional.interpolate(digits, size=(side, side), mode="bilinear", align_corners=False)
    shown: Tensor = pixels.expand(-1, channels, -1, -1)
    backbone.eval()
    return torch.cat([backbone(part).last.flatten(1, 2).mean(1) for part in shown.split(128)]).double().numpy()


def share_right(x: np.ndarray, of_each: int, seed: int) -> float:
    """Return the share of the digits to score on that a layer gets right which learnt from a few of each class."""
    y, rng = load_digits().target, np.random.default_rng(seed)
    learnt = [rng.permutation(np.flatnonzero(y[:-SCORED] == digit))[:of_each] for digit in range(10)]
    chosen = np.concatenate(learnt)
    layer = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x[chosen], y[chosen])
    return float(layer.score(x[-SCORED:], y[-SCORED:]))


def plain(backbone: Backbone) -> Backbone:
    """Return the backbone as its settings say, with plain attention where a pretext had another one."""
    found = backbone.config.build()
    found.load_state_dict(backbone.state_dict())
    return found


def said(name: str, shares: list[float]) -> str:
    return f"{name}: {np.mean(shares):.3f} +- {np.std(shares):.3f} over {len(shares)} draws"


def main(args: Args) -> None:
    for run in args.runs:
        trained = load_trained(run, CATALOG)
        size, backbone = trained.task.data.preprocess, plain(trained.model.backbone)
        learnt = features(backbone, size.image_size, size.channels)
        print(said(str(run), [share_right(learnt, args.of_each, seed) for seed in range(args.seeds)]), flush=True)
        random = []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            backbone.reset_parameters()
            found = features(backbone, size.image_size, size.channels)
            random.append(share_right(found, args.of_each, seed))
        print(said(f"{run}, random weights", random), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
