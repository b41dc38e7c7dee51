"""Fine-tuning for detection with experts and routers frozen, with all tuned, and of the dense twin; several seeds.

The question of table 10 of the paper (arXiv 2206.03382), at the size of a laptop: pre-train by SimMIM on photographs,
fine-tune on composed scenes, score boxes on unseen ones. A line of JSON for every run.

    python benchmarks/frozen_moe.py --seeds 5
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from synchromesh import cli

# One backbone for both: grey pictures of 96 x 96 pixels, windows of 6 x 6 positions.
SIMMIM = [
    "simmim_demo", "--nproc=1", "--model.window-size=6", "--batch-size=16", "--eval-batch-size=32",
    "--data.preprocess.channels=1", "--data.preprocess.image-size=96", "--data.preprocess.mean", "0.45",
    "--data.preprocess.std", "0.25", "--data.test=64", "--twin=none",
]  # fmt: skip
DETECT = ["detect_demo", "--nproc=1", "--twin=none"]
DENSE = ["--model.experts=none"]
ROWS = {
    "MoE, frozen": ("moe", ["--start.freeze=moe"]),
    "MoE, tuned": ("moe", []),
    "dense": ("dense", DENSE),
}

KEPT = (
    "test_AP",
    "test_AP50",
    "test_AP75",
    "train_seconds",
    "parameters",
    "active_parameters",
    "steps",
    "dead_experts",
)


@dataclass(frozen=True)
class Args:
    """What to train.

    Attributes:
        seeds: how many.
        first: seed.
        pre_epochs: of SimMIM, 512 crops each.
        fine_epochs: of detection, 1,024 scenes each.
        tiny: a few steps only, for tests.
        out: file to append to.
    """

    seeds: int = 5
    first: int = 0
    pre_epochs: int = 4
    fine_epochs: int = 2
    tiny: bool = False
    out: Path = Path(__file__).parent / "results" / "frozen_moe.jsonl"


def train(folder: Path, *options: str) -> dict[str, object]:
    """Train a recipe into a folder; return its summary."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.main(["train", *options, f"--run={folder}"])
    if code:
        raise RuntimeError(f"train {' '.join(options)} ended with {code}: {said.getvalue()[-2000:]}")
    return json.loads((folder / "summary.json").read_text())


def of_seed(seed: int, pre: list[str], fine: list[str], out: Path) -> None:
    """Pre-train a mixture and its dense twin, fine-tune each row, and append what came out."""
    with tempfile.TemporaryDirectory() as temporary:
        home, number = Path(temporary), [f"--seed={seed}"]
        for name, options in (("moe", []), ("dense", DENSE)):
            train(home / name, *SIMMIM, *pre, *options, *number)
        for row, (start, options) in ROWS.items():
            weights = f"--start.weights={home / start}"
            done = train(home / f"fine-tuned {row}", *DETECT, *fine, *options, weights, *number)
            kept = {name.removeprefix("test_"): done.get(name) for name in KEPT}
            record = {"row": row, "seed": seed, "pre": pre, "fine": fine, "load": os.getloadavg()[0], **kept}
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"seed {seed}, {row}: AP {record['AP']:.3f}, AP50 {record['AP50']:.3f}", flush=True)


def table(out: Path) -> None:
    """Print the mean and spread of each row over its seeds."""
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for row in ROWS:
        scores = [record["AP"] for record in records if record["row"] == row]
        if scores:
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(f"{row:18} AP {statistics.mean(scores):.3f} +- {spread:.3f} of {len(scores)} seeds")


def main(args: Args) -> None:
    crops, scenes, test = (32, 32, 8) if args.tiny else (512, 1024, 200)
    pre = [f"--epochs={args.pre_epochs}", f"--data.train={crops}"]
    fine = [f"--epochs={args.fine_epochs}", f"--data.source.train={scenes}", f"--data.source.test={test}"]
    for seed in range(args.first, args.first + args.seeds):
        of_seed(seed, pre, fine, args.out)
    table(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args))
