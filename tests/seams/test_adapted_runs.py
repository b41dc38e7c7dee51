"""Runs whose model was adapted: trained, broken off and resumed, read again, by the command line's own words."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from synchromesh import cli
from synchromesh.adapt.adapting import Adapting
from synchromesh.adapt.split import SplitFeedForward
from synchromesh.recipes.catalog import CATALOG
from synchromesh.training.codec import encode
from synchromesh.training.run_folder import load_trained

TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--model.experts", "none",
    "--batch-size=256", "--eval-batch-size=400", "--loading.workers=1", "--keep.evaluate-epochs=2",
]  # fmt: skip
WAYS = {
    "split": ["--start.adapt.into.num-experts=4", "--start.adapt.into.k=2"],
    "upcycled": ["--start.adapt.into=upcycle", "--start.adapt.into.num-experts=4", "--start.adapt.into.noise=0.01"],
    "sparse": [
        "--start.adapt.into=static-sparsity", "--start.adapt.into.sparsity=0.5", "--start.adapt.select",
        "*.attention.qkv", "*.attention.proj", "*.ffn.*",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "run"
    assert cli.main(["train", "digits", "--run", str(folder), "--epochs=2", *TINY]) == 0
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_dense_run_goes_on_adapted_and_is_read_as_what_it_became(
    dense: Path, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["train", "digits", "--run", str(folder), "--epochs=2", *TINY, f"--start.weights={dense}", *WAYS[way]]
    assert cli.main(options) == 0
    state = json.loads(next(folder.glob("checkpoints/step-*/state.json")).read_text())
    found = CATALOG.decode(Adapting, state["adapt"])
    assert encode(found) == state["adapt"]
    model = load_trained(folder, CATALOG).model
    if way == "sparse":
        masked = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and hasattr(m, "parametrizations")]
        assert masked
        assert all(int((m.weight == 0).sum()) == round(0.5 * m.weight.numel()) for m in masked)
    else:
        assert [type(block.ffn).__name__ for stage in model.backbone.stages for block in stage.blocks] == [
            "SplitFeedForward" if way == "split" else "UpcycledFeedForward"
        ] * 2
    for module in model.modules():
        if isinstance(module, SplitFeedForward):
            torch.testing.assert_close(module.moe.router.weight, module.moe.experts.up.detach().mean(1))
    with open(folder / "summary.json") as file:
        scored = json.load(file)["test_accuracy"]
    capsys.readouterr()
    assert cli.main(["eval", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(scored, abs=1e-6)


def test_what_cannot_be_adapted_is_said_before_an_older_run_is_touched(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = ["train", "digits", "--run", str(folder), *TINY, "--start.adapt.into.num-experts=5"]
    assert cli.main([*options, "--start.adapt.into.k=2"]) != 0
    assert "start.adapt: backbone.stages.0.blocks.0.ffn has 32 hidden units to split into 5 experts" in "".join(
        capsys.readouterr()
    ).replace("\n", " ")
    assert not folder.exists()


def test_a_broken_off_run_resumes_to_the_same_weights(dense: Path, tmp_path: Path) -> None:
    """As if killed: the newest checkpoint of a whole run is taken away, and the run resumed from the one before."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = ["--epochs=2", *TINY, "--keep.checkpoint-steps=5", f"--start.weights={dense}", *WAYS["split"]]
    assert cli.main(["train", "digits", "--run", str(whole), *options]) == 0
    shutil.copytree(whole, again)
    shutil.rmtree(max(again.glob("checkpoints/step-*")))
    (again / "summary.json").unlink()
    assert cli.main(["train", "digits", "--run", str(again), *options, "--resume"]) == 0
    wanted, got = (load_trained(folder, CATALOG).model.state_dict() for folder in (whole, again))
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_a_run_goes_on_plain_from_an_adapted_one_and_an_adapted_one_is_not_pushed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sparse pre-training, dense tuning, by two commands."""
    sparse, tuned = tmp_path / "sparse", tmp_path / "tuned"
    options = ["--epochs=2", *TINY]
    assert cli.main(["train", "digits", "--run", str(sparse), *options, *WAYS["sparse"]]) == 0
    assert cli.main(["train", "digits", "--run", str(tuned), *options, f"--start.weights={sparse}"]) == 0
    said = capsys.readouterr().out
    assert f"{sparse}: 45 tensors taken" in said.replace("\n", "")
    before, after = (load_trained(folder, CATALOG).model for folder in (sparse, tuned))
    name = "backbone.stages.1.blocks.0.ffn.up"
    assert (before.get_submodule(name).weight == 0).double().mean() == 0.5
    assert not (after.get_submodule(name).weight == 0).any()
    assert cli.main(["push", str(sparse), str(tmp_path / "hub")]) != 0
    assert "start.adapt had changed" in "".join(capsys.readouterr()).replace("\n", " ")
