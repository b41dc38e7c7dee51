"""Recipes for COCO and ADE20K as a whole, small enough for a test: from weights and files to scores and answers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from synchromesh import cli
from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.testing.squares import write_squares
from synchromesh.training.config import Freeze

SWIN: dict[str, Any] = {
    "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 1, 1), "window_size": 4,
}  # fmt: skip
SIZES = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "2", "1", "--model.num-heads", "1", "1", "1", "1",
    "--model.window-size=4", "--model.experts.num-experts=4", "--model.experts.blocks.2", "1",
    "--model.experts.blocks.3", "0", "--no-bf16", "--epochs=1", "--loading.workers=1", "--keep.log-steps=1",
    "--data.preprocess.image-size=64",
]  # fmt: skip
CASCADE = [
    *SIZES, "--model.pretrained-window-sizes", "2", "2", "2", "2", "--batch-size=4", "--optim.warmup-epochs=0",
    "--data.fit.shorter=48", "--data.fit.longer=80", "--data.moves.sizes", "48", "48", "56", "56", "64", "64",
    "--head.width=8", "--head.mask-convs=1", "--head.boxes.hidden=16", "--head.boxes.convs=1",
    "--head.boxes.sampled=16", "--head.proposals.scale=4", "--head.proposals.sampled=32",
    "--head.proposals.of-level=50", "--head.proposals.kept=20", "--head.least=0.01",
]  # fmt: skip
MASK2FORMER = [
    *SIZES, "--batch-size=2", "--data.fit.shorter=64", "--data.fit.longer=128", "--data.moves.sizes", "64", "64",
    "--head.masks.width=32", "--head.masks.heads=2", "--head.masks.queries=5", "--head.masks.ffn=16",
    "--head.masks.encoder-layers=1", "--head.masks.decoder-layers=2", "--head.masks.points=32",
]  # fmt: skip


def start_weights(name: str, folder: Path) -> Path:
    """Write what pre-training of the recipe's backbone would leave, at the size of the tests."""
    model = RECIPES[name]().model
    assert model.experts is not None
    experts = dataclasses.replace(model.experts, num_experts=4, blocks=((), (), (1,), (0,)))
    torch.manual_seed(3)
    backbone = dataclasses.replace(model, experts=experts, image_size=64, **SWIN).build()
    path = folder / "pretrained.safetensors"
    save_file({f"backbone.{key}": tensor for key, tensor in backbone.state_dict().items()}, path)
    return path


def write_ade20k(folder: Path) -> Path:
    """Write pictures whose brightness tells their classes, as ADE20K's benchmark has them, 0 not labelled."""
    rng = np.random.default_rng(0)
    for part, count in (("training", 2), ("validation", 2)):
        for number in range(count):
            labels = np.zeros((70, 90), dtype=np.uint8)
            labels[10:, : 30 + number * 9], labels[10:, 45:] = 1, 150
            pixels = labels[:, :, None] + rng.integers(0, 90, (70, 90, 3), dtype=np.uint8)
            for kind, image, suffix in (("images", pixels, "jpg"), ("annotations", labels, "png")):
                path = folder / kind / part / f"ADE_{part}_{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    return folder


def logged(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def check_run(run: Path, start: Path, losses: set[str], weights: Any) -> None:
    """Losses are numbers, all of them; experts and routers stayed as they were, and all else of the backbone moved."""
    steps = logged(run, "train")
    assert steps
    for step in steps:
        assert losses <= step.keys()
        assert all(np.isfinite(value) for value in step.values() if isinstance(value, float))
    recipe = CATALOG.config(json.loads((run / "recipe.json").read_text()))
    assert recipe.start.freeze is Freeze.MOE
    before, after = load_file(start), weights(run)
    frozen = {key for key in before if ".experts." in key or ".router." in key}
    assert frozen
    for key, tensor in before.items():
        same = after[key] == [tensor.numpy().tobytes()]
        assert same or key not in frozen, key
    learnt = [key for key in before if key.endswith("qkv.weight")]
    assert learnt
    assert not [key for key in learnt if after[key] == [before[key].numpy().tobytes()]]


@pytest.mark.parametrize("name", ["cascade_coco_s", "cascade_coco_b"])
def test_a_cascade_recipe_goes_from_weights_and_a_json_to_ap_and_cocos_results(
    name: str, tmp_path: Path, weights: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 4), ("val", 2)):
        write_squares(tmp_path, part, count)
    start, run = start_weights(name, tmp_path), tmp_path / "run"
    given = [f"--data={tmp_path}", f"--start.weights={start}", f"--run={run}"]
    assert cli.main(["train", name, *CASCADE, *given]) == 0
    losses = {f"{kind}_loss_{stage}" for kind in ("score", "box", "mask") for stage in (1, 2, 3)}
    check_run(run, start, losses | {"proposal_score_loss", "proposal_box_loss"}, weights)
    summary = json.loads((run / "summary.json").read_text())
    assert {"test_AP", "test_mask_AP"} <= summary.keys()
    val = tmp_path / "instances_val.json"
    capsys.readouterr()
    assert cli.main(["eval", str(run), f"--data={val}", f"--images={tmp_path / 'images'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["AP"] == pytest.approx(summary["test_AP"])
    asked = ["predict", str(tmp_path / "images"), f"--run={run}", "--least=0", f"--draw={tmp_path / 'drawn'}"]
    assert cli.main(asked) == 0
    records = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    assert records
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} <= one.keys() for one in records)


def test_mask2former_goes_from_weights_and_ade20ks_folders_to_miou(tmp_path: Path, weights: Any) -> None:
    data, start, run = write_ade20k(tmp_path / "ade"), start_weights("mask2former_ade20k", tmp_path), tmp_path / "run"
    given = [f"--data={data}", f"--start.weights={start}", f"--run={run}"]
    assert cli.main(["train", "mask2former_ade20k", *MASK2FORMER, *given]) == 0
    check_run(run, start, {"class_loss", "mask_loss"}, weights)
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["test_mIoU"] <= 1
    assert summary["test_pictures"] == 2
    assert cli.main(["eval", str(run), f"--data={data}", "--json"]) == 0
    assert cli.main(["predict", str(run), str(data / "images/validation/ADE_validation_0.jpg"), "--json"]) == 0
