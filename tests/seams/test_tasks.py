"""Every task as a whole, by the commands: one process, two ranks, killed, looked at, gone on from."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from synchromesh import cli
from synchromesh.testing.programs import run_job, run_program
from synchromesh.testing.squares import write_squares

DIES = Path(__file__).parent.parent / "commands" / "dies.py"
DENSE = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--no-bf16", "--optim.eps=1e-3",
    "--epochs=3", "--twin=none", "--loading.workers=1", "--keep.log-steps=1", "--keep.checkpoint-steps=2",
]  # fmt: skip
MODEL = [*DENSE, "--model.experts.blocks.1", "0", "--model.experts.num-experts=4"]

VIT = [
    "--model.width=8", "--model.depth=2", "--model.num-heads=2", "--model.patch-size=16", "--model.experts.blocks.0",
    "1", "--model.experts.num-experts=4", "--no-bf16", "--optim.eps=1e-3", "--epochs=3", "--twin=none",
    "--loading.workers=1", "--keep.log-steps=1", "--keep.checkpoint-steps=2", "--decoder.width=8", "--decoder.depth=1",
    "--decoder.num-heads=2", "--data.train=24", "--data.test=7", "--batch-size=6", "--eval-batch-size=4",
]  # fmt: skip

# Frozen MoE layers between layers that learn, in the blocks that the recipe has; each step draws one of two sizes.
CASCADE = [
    "--start.weights=None", "--model.embed-dim=8", "--model.depths", "1", "1", "2", "1", "--model.num-heads", "1", "1",
    "1", "1", "--model.window-size=4", "--model.pretrained-window-sizes", "2", "2", "2", "2", "--model.drop-path=0",
    "--model.experts.num-experts=4", "--model.experts.blocks.2", "1", "--model.experts.blocks.3", "0",
    "--model.experts.router.noise=0", "--model.experts.capacity", "dropless", "--model.experts.losses.0.loss.weight=0",
    "--no-bf16", "--optim.eps=1e-3", "--optim.lr=3e-3", "--epochs=3", "--loading.workers=1", "--keep.log-steps=1",
    "--keep.checkpoint-steps=2", "--data.preprocess.image-size=64", "--data.fit.shorter=64", "--data.fit.longer=80",
    "--data.moves.sizes", "64", "64", "48", "48", "--head.width=8", "--head.mask-convs=1", "--head.boxes.hidden=16",
    "--head.boxes.convs=1", "--head.boxes.sampled=200", "--head.boxes.positive-share=1", "--head.proposals.scale=4",
    "--head.proposals.sampled=5000", "--head.proposals.of-level=100", "--head.proposals.kept=30", "--head.least=0.01",
]  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A small run of a task.

    Attributes:
        options: of `train`; "{files}" stands for a folder with annotated pictures.
        unit: of its samples.
        headline: what it is scored by, in files.
        title: some of what it is scored by, for people.
        says: a member of its predictions.
        scored: samples that it is scored on.
    """

    options: tuple[str, ...]
    unit: str
    headline: str
    title: str
    says: str
    scored: int = 7


# In many of the scenes, and so on many of the ranks' parts of a batch, there is no object at all.
TRIALS = {
    "detection": Trial(
        ("detect_demo", *MODEL, "--data.source.train=24", "--data.source.test=7", "--data.preprocess.image-size=64",
         "--data.source.fewest=0", "--data.source.most=1", "--batch-size=6", "--eval-batch-size=4", "--accumulate=2",
         "--model.experts.losses.0.loss.weight=0"),  # which is a mean over each part of the batch
        "scenes", "AP", "AP50", "objects",
    ),
    # Pictures of several sizes, annotated in files, with masks; each step draws one of two sizes.
    "instances": Trial(
        ("--data={files}/instances_train.json", "--images={files}/images", *MODEL, "--data.moves.sizes", "64", "64",
         "32", "32", "--batch-size=6", "--eval-batch-size=4", "--accumulate=2",
         "--model.experts.losses.0.loss.weight=0"),
        "scenes", "mask_AP", "AP50 of masks", "objects",
    ),
    # The paper's head by its own recipe, small: no regions are drawn at random, since there are fewer than are sampled.
    "cascade": Trial(
        ("cascade_coco_s", "--data={files}/instances_train.json", "--images={files}/images", *CASCADE,
         "--batch-size=6", "--accumulate=2"),
        "scenes", "mask_AP", "AP50 of masks", "objects",
    ),
    "simmim": Trial(
        ("simmim_demo", *MODEL, "--data.train=24", "--data.test=7", "--batch-size=6", "--eval-batch-size=4"),
        "crops", "masked_l1", "L1 of hidden pixels", "masked_l1",
    ),
    "pixpro": Trial(
        ("pixpro_demo", *MODEL, "--data.train=24", "--data.test=7", "--batch-size=6", "--eval-batch-size=4",
         "--siamese.width=8", "--siamese.hidden=16", "--siamese.momentum.steps=9"),
        "pairs of crops", "found_again", "cells found again", "found_again",
    ),
    # The encoder runs twice in a step: on some patches of the first view, and on all of the second.
    "croco": Trial(("croco_demo", *VIT, "--patch=16"), "pairs", "hidden_mse", "error of hidden patches", "hidden_mse"),
    "disparity": Trial(("disparity_demo", *VIT), "pairs", "epe", "end-point error", "median"),
    "mixed_ae": Trial(
        ("mixed_ae_demo", *VIT, "--patch=16", "--mixtures=2", "--accumulate=2",
         "--model.experts.losses.0.loss.weight=0"),
        "groups", "restored_mse", "error of restored patches", "homologous",
    ),
    # A dense model whose feed-forwards are split into experts, which a token does not all see.
    "turned": Trial(
        ("emoe_demo", "--start.weights=None", *DENSE, "--data.shots=3", "--batch-size=6", "--eval-batch-size=200",
         "--start.adapt.into.num-experts=4", "--start.adapt.into.k=2", "--model.init-std=0.1",
         "--model.drop-path=0"),
        "pictures", "seen", "right at unseen angles", "class", scored=397,
    ),
    "segmentation": Trial(
        ("segment_demo", *MODEL, "--data.source.train=24", "--data.source.test=7", "--data.preprocess.image-size=64",
         "--batch-size=6", "--eval-batch-size=4", "--head.width=8"),
        "pictures", "mIoU", "mIoU", "classes",
    ),
    # No regions are drawn at random, which ranks would draw differently: masks are found by queries.
    "panoptic": Trial(
        ("panoptic_demo", *MODEL, "--data.source.train=24", "--data.source.test=7", "--data.preprocess.image-size=64",
         "--data.source.fewest=0", "--data.source.most=1", "--batch-size=6", "--eval-batch-size=4",
         "--head", "panoptic-masks", "--head.masks", "mask-former", "--head.masks.levels=2", "--head.masks.width=32",
         "--head.masks.heads=2", "--head.masks.queries=5", "--head.masks.ffn=16", "--head.masks.decoder-layers=1",
         "--head.masks.dropout=0"),
        "pictures", "PQ", "PQ of things", "segments",
    ),
    "depth": Trial(
        ("depth_demo", *MODEL, "--data.source.train.crops=24", "--data.source.test.side=100", "--batch-size=6",
         "--eval-batch-size=4", "--head.width=8"),
        "pictures", "abs_rel", "AbsRel", "median", scored=10,
    ),
    # A frozen backbone with experts, updates of low rank that all tasks and experts share, and a stream of each task;
    # its features are large enough that no pixel is nearly of two classes.
    "multi_task": Trial(
        ("mtlora_demo", "--start.weights=None", *MODEL,
         "--data.source.train=24", "--data.source.test=7", "--batch-size=6", "--eval-batch-size=4", "--width=8",
         "--start.adapt.into.rank=2", "--start.adapt.into.task-rank=2", "--model.init-std=0.1"),
        "pictures", "mIoU", "IoU of saliency", "saliency",
    ),
}  # fmt: skip

VALUES = {"Segmentation": "predicted_labels", "Panoptic": "panoptic_predictions", "Depth": "predicted_depth"}


@dataclass(frozen=True)
class Done:
    """A run that nothing disturbed, and how it was started."""

    trial: Trial
    folder: Path


@pytest.fixture(scope="module", params=TRIALS)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    trial, root = TRIALS[request.param], tmp_path_factory.mktemp(request.param)
    for part, count in (("train", 24), ("val", 7)):
        write_squares(root, part, count)
    trial = dataclasses.replace(trial, options=tuple(option.format(files=root) for option in trial.options))
    folder = root / "run"
    assert cli.main(["train", *trial.options, "--nproc=1", f"--run={folder}"]) == 0
    return Done(trial, folder)


def metrics(run: Path, unit: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", f"{unit}_per_second")} for line in lines]


@pytest.mark.parametrize("adaptive", ["--parallelism.adaptive", "--parallelism.no-adaptive"])
def test_two_ranks_learn_and_score_what_one_process_does(done: Done, tmp_path: Path, adaptive: str) -> None:
    command = ["train", *done.trial.options, adaptive, f"--run={tmp_path / 'run'}"]
    for rank in run_job(2, "-m", "synchromesh", *command):
        assert rank.returncode == 0, rank.stderr
        assert "Warning" not in rank.stderr
    got, wanted = (metrics(run, done.trial.unit) for run in (tmp_path / "run", done.folder))
    assert [(line["kind"], line["step"]) for line in got] == [(line["kind"], line["step"]) for line in wanted]
    assert len(got) > 12
    for one, other in zip(got, wanted, strict=True):
        for name, value in other.items():
            if isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, one["step"])


def test_a_run_killed_by_kill_9_goes_on_bit_for_bit(done: Done, tmp_path: Path, weights) -> None:
    options = [*done.trial.options, "--nproc=1", f"--run={tmp_path / 'cut'}"]
    killed = run_program(DIES, "backward", 9, "train", *options)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert cli.main(["train", *options, "--resume"]) == 0
    assert metrics(tmp_path / "cut", done.trial.unit) == metrics(done.folder, done.trial.unit)
    assert weights(tmp_path / "cut") == weights(done.folder)


def test_a_run_whose_cells_become_alike_ends_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = ["--siamese.limits.spread=0.999", "--siamese.limits.steps=2"]  # more than features of images ever have
    command = ["train", *TRIALS["pixpro"].options, *alike, "--nproc=1", f"--run={tmp_path / 'run'}"]
    assert cli.main(command) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"spread is 0\.\d+, and was below 0\.999 for 2 steps", said), said
    assert not (tmp_path / "run" / "summary.json").exists()


def test_report_and_summary_name_the_numbers_of_the_task_and_show_its_samples(done: Done) -> None:
    summary = json.loads((done.folder / "summary.json").read_text())
    assert isinstance(summary[f"test_{done.trial.headline}"], float)
    assert summary[f"test_{done.trial.unit}"] == done.trial.scored
    assert not [name for name in summary if name == "test_accuracy" or "images" in name]
    page = (done.folder / "report.html").read_text()
    said = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL).lower()
    assert "accuracy" not in said or done.trial.headline == "mIoU"
    assert done.trial.title.lower() in said
    assert ("spread of cells" in said) == ("pixpro_demo" in done.trial.options)
    assert {name.partition("-")[0] for name in summary["pictures"]} == {"worst", "best"}
    for name, caption in summary["pictures"].items():
        assert (done.folder / "pictures" / name).read_bytes().startswith(b"\x89PNG")
        assert all(line in page for line in caption.splitlines())
    (done.folder / "report.html").unlink()
    assert cli.main(["report", str(done.folder)]) == 0
    assert (done.folder / "report.html").read_text() == page


def test_eval_says_what_the_summary_says(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["eval", str(done.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((done.folder / "summary.json").read_text())
    assert found[done.trial.headline] == pytest.approx(summary[f"test_{done.trial.headline}"])
    assert found[done.trial.unit] == done.trial.scored


@pytest.mark.parametrize("done", ["detection"], indirect=True)
def test_eval_prints_the_tables_of_the_task_and_its_json_has_their_numbers(
    done: Done, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for options in ([], ["--json"]):
        capsys.readouterr()
        assert cli.main(["eval", str(done.folder), *options]) == 0
        said.append(capsys.readouterr().out)
    boxes = json.loads(said[1])["boxes"]
    assert len(boxes) == 12
    for name, value in boxes.items():
        cell = "-" if value is None else f"{value:.3f}"
        assert re.search(rf"^\W*{name}\W.*\s{cell}\W*$", said[0], flags=re.MULTILINE), name


def test_predict_writes_json_and_a_picture_of_every_file(
    done: Done, photo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [photo(tmp_path / f"{n}.png", size=(80, 50), seed=n) for n in range(2)]
    capsys.readouterr()
    command = ["predict", *map(str, files), f"--run={done.folder}", "--json", f"--draw={tmp_path / 'drawn'}"]
    assert cli.main(command) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["image"] for one in said] == [str(file) for file in files]
    assert all(done.trial.says in one for one in said)
    drawn = tmp_path / "drawn"
    assert all((drawn / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in range(2))
    assert [json.loads((drawn / f"{n}.json").read_text()) for n in range(2)] == said
    recipe = json.loads((done.folder / "recipe.json").read_text())
    folder = VALUES.get(recipe["task"]["kind"])
    assert {path.parent.name for path in drawn.glob("*/*.png")} == ({folder} if folder else set())
    for values in drawn.glob("*/*.png"):
        with Image.open(values) as opened:
            assert (values.stem in ("0", "1"), opened.size) == (True, (80, 50))


@pytest.mark.parametrize("done", ["simmim"], indirect=True)
@pytest.mark.parametrize("recipe", ["digits", "detect_demo", "mtlora_demo"])
def test_what_simmim_learnt_goes_on_into_other_tasks_and_nowhere_it_does_not_fit(
    done: Done, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    swin = ["--model.patch-size=4", "--model.window-size=8", "--model.style=swin_moe", "--data.preprocess.channels=3"]
    swin += ["--data.preprocess.mean", *["0.5"] * 3, "--data.preprocess.std", *["0.25"] * 3]
    scenes = ["--data.source.train=8", "--data.source.test=4"] if recipe != "digits" else []
    start = ["train", recipe, *MODEL, *swin, *scenes, "--epochs=1", "--nproc=1", f"--start.weights={done.folder}"]
    capsys.readouterr()
    assert cli.main([*start, f"--run={tmp_path / 'next'}"]) == 0
    assert "tensors taken" in capsys.readouterr().out
    assert cli.main([*start, "--model.embed-dim=16", f"--run={tmp_path / 'wider'}"]) == 2
    said = capsys.readouterr().err
    assert "backbone.embed.proj.weight" in said
    assert not (tmp_path / "wider" / "checkpoints").exists()
