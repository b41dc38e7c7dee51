"""The command line in this process: what it accepts, what it prints, how it fails."""

import fcntl
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from synchromesh import cli
from synchromesh.commands.train import read_request
from synchromesh.data.sources import ScikitDigits
from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.training import loop
from synchromesh.training.codec import encode
from synchromesh.training.step import Trainee

TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2",
    "--model.experts.blocks.1", "0", "--model.experts.num-experts=4", "--batch-size=64", "--loading.workers=1",
    "--epochs=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model on scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert cli.main(["train", "digits", *TINY, f"--run={folder}"]) == 0
    return folder


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    digits = ScikitDigits().load(RECIPES["digits"]().task.data.preprocess)
    path = tmp_path / "digit.png"
    Image.fromarray(digits.test.read(0)[0].numpy()).save(path)
    return path


def failed(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command line that must fail as the user's mistake: exit code 2, one line, no trace."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


COMMANDS = ("eval", "predict", "convert", "verify", "profile", "plan", "plans", "models", "push")


@pytest.mark.parametrize("command", [*(f"train {recipe}" for recipe in RECIPES), *COMMANDS])
def test_every_option_says_what_it_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    said = re.sub(r"[│╭╰╮╯─]", " ", capsys.readouterr().out)
    options = re.findall(r"^ +(--[a-z]\S*)(.*?)(?=^ +--[a-z]|\Z)", said, flags=re.M | re.S)
    assert options
    for name, text in options:
        if "(now: " in text:  # a switch: what it switches has a heading and options of its own
            continue
        told = re.sub(r"\((default|required)[^)]*\)|\[?[A-Z{}|.]+\S*|\{\S+", "", text)
        assert re.search(r"[a-z]{2,} [a-z]{2,}|[a-z]{4,}", told), f"{name} has no help: {text.strip()!r}"


PAGES = ["--help", "train --help", "train demo --help", *(f"{name} --help" for name in cli.COMMANDS if name != "train")]


@pytest.mark.parametrize("command", PAGES)
def test_no_page_of_help_is_wider_than_80_columns_or_has_a_word_that_is_no_ones(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.main(command.split()))
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert [line for line in said.splitlines() if len(line) > 80] == []
    assert not re.search(r"\{None\}|\[\[|default: \)|@about@|\n\n\n", said)


@pytest.mark.parametrize("command", ["train demo", "eval", "predict", "report", "plan"])
def test_help_gives_every_option_a_line_and_no_more_than_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    said = re.sub(r"[│╭╰╮╯─]", " ", capsys.readouterr().out)
    table = said[re.search(r"^ +(positional arguments|options) *$", said, flags=re.M).start() :].splitlines()
    assert len(table) > 4
    assert max(map(len, table)) <= 80
    for line in table:  # an option may stand beside what switches it off, and beside nothing else
        options = re.findall(r"(?<!\S)--[a-z][\w.-]*", re.split(r"(?<=\S) {2,}", line)[0]) if "--" in line[:6] else []
        assert len({option.replace("no-", "") for option in options}) <= 1, line
        assert "…" not in line


def test_a_setting_with_two_names_has_one_in_the_help_and_both_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "demo", "--help"])
    said = capsys.readouterr().out
    assert "--nproc" in said
    assert "--tensorboard" in said
    assert "--keep.ranks" not in said
    assert "--keep.tensorboard" not in said
    asked = read_request(["demo", "--keep.ranks=3", "--keep.tensorboard"], CATALOG)
    assert (asked.nproc, asked.configured().keep.tensorboard) == (3, True)
    assert read_request(["demo", "--keep.ranks", "2"], CATALOG).nproc == 2


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["train", "--help"]])
def test_help_teaches_by_example(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "usage: synchromesh" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train demo", "eval", "predict", "report"])
def test_every_command_has_help_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert f"usage: synchromesh {command}" in capsys.readouterr().out


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES)
    assert "MNIST" in said


def test_unknown_commands_recipes_and_options_name_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "wanted one of train, eval, predict, report" in failed(["tarin"], capsys)
    assert "wanted one of demo, digits" in failed(["train", "dmeo"], capsys)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "demo", "--optim.momentum", "0.9"])
    assert caught.value.code == 2


def test_nothing_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "digits", "--data", "/nowhere", "--run", "RUN"], "the data folder /nowhere does not exist"),
        (["train", "swinv2_moe_s_22k", "--run", "RUN"], "the data folder imagenet22k does not exist"),
        (["train", "digits", "--batch-size", "0", "--run", "RUN"], "batch_size is 0, wanted at least 1"),
        (["train", "digits", "--model.experts.blocks.1", "7", "--run", "RUN"], "the model cannot be built: experts in"),
        (["train", "digits", "--keep.device", "abacus", "--run", "RUN"], "there is no device 'abacus'"),
        (["train", "digits", "--start.weights", "/nowhere.pt", "--run", "RUN"], "/nowhere.pt do not exist"),
        (["train", "digits", "--seed", "-1", "--run", "RUN"], "seed is -1, wanted at least 0"),
        (["predict", "a.png", "--run", "/nowhere", "--top", "0"], "--top is 0, wanted at least 1"),
        (["eval", "/nowhere"], "/nowhere does not exist"),
        (["report", "/nowhere"], "/nowhere does not exist"),
        (["predict", "a.png"], "no run given"),
        (["predict", "a.png", "--run", "/nowhere"], "/nowhere"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in failed([str(tmp_path / "run") if a == "RUN" else a for a in arguments], capsys)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (["--loading.workers", "0"], "loading.workers is 0, wanted at least 1"),
        (["--keep.log-steps", "0"], "keep.log_steps is 0, wanted at least 1"),
        (["--optim.lr", "-1"], "optim.lr is -1.0, wanted at least 0.0"),
        (["--optim.betas", "0.9", "1.5"], "optim.betas are (0.9, 1.5)"),
        (["--data.shots", "-1"], "data.shots is -1, wanted at least 0"),
        (["--model.num-heads", "5", "5"], "stage 0 has width 32, which 5 heads do not divide"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_before_a_run_is_touched(
    setting: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "digits", *setting, "--run", str(tmp_path / "run")])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert text in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_overrides_reach_the_recipe_as_run(run: Path) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    assert recipe["epochs"] == 1
    assert recipe["model"]["embed_dim"] == 8
    assert recipe["optim"] == encode(RECIPES["digits"]().optim)


def test_eval_repeats_the_score_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert found["accuracy"] == summary["test_accuracy"]
    assert found["images"] == 397
    assert found["load"] == summary["test_load"]
    assert sum(c["images"] for c in found["classes"].values()) == 397
    assert cli.main(["eval", str(run)]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_eval_takes_a_folder_of_the_same_classes(
    run: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0", "7"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.png").write_bytes(digit.read_bytes())
    capsys.readouterr()
    assert cli.main(["eval", str(run), "--data", str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    (tmp_path / "data" / "cat").mkdir()
    assert "has the class 'cat', which the model has not" in failed(["eval", run, "--data", tmp_path / "data"], capsys)


def test_predict_prints_a_json_line_for_each_image(run: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["predict", str(digit), str(digit), "--run", str(run), "--json", "--top", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0]["image"] == str(digit)
    probabilities = [entry["probability"] for entry in lines[0]["top"]]
    assert len(probabilities) == 4
    assert probabilities == sorted(probabilities, reverse=True)
    assert lines[0]["class"] == lines[0]["top"][0]["class"]


@pytest.mark.parametrize("name", ["a:dog:b.png", "x[red]y.png", "bad[bold].png"])
def test_names_are_shown_as_they_are(
    name: str,
    run: Path,
    digit: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / name
    path.write_bytes(digit.read_bytes())
    capsys.readouterr()
    assert cli.main(["predict", str(path), "--run", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == str(path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", name, "--run", str(run)]) == 0
    assert name in capsys.readouterr().out


def test_the_run_may_stand_first_and_be_a_checkpoint(
    run: Path, digit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    answers = []
    for arguments in ([run, digit], [checkpoint, digit], [digit, "--run", checkpoint]):
        capsys.readouterr()
        assert cli.main(["predict", *map(str, arguments), "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert len(set(answers)) == 1


def test_predict_shows_a_table_without_json(run: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", str(digit), "--run", str(run)]) == 0
    assert "probability" in capsys.readouterr().out


def test_a_gif_of_garbage_is_named_or_skipped(
    run: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage = tmp_path / "garbage.gif"
    garbage.write_bytes(b"GIF89a" + bytes(range(200)))
    said = failed(["predict", garbage, digit, "--run", run], capsys)
    assert re.search(r"garbage.gif.*; --on-bad-image skip leaves such files out", said)
    arguments = ["predict", str(garbage), str(digit), "--run", str(run), "--on-bad-image", "skip", "--json"]
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert [json.loads(line)["image"] for line in shown.out.splitlines()] == [str(digit)]
    assert "left out: cannot read the image" in shown.err


def test_report_can_be_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()


def test_a_second_run_moves_the_first_aside_and_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "digits", *TINY, f"--run={tmp_path / 'run'}"]
    assert cli.main(arguments) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert "held a finished run; it is now" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "run.1" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_twin_is_trained_beside_and_can_be_used_as_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = [".embed-dim=8", ".patch-size=8", ".depths", "1", "4", ".num-heads", "1", "2"]
    both = [f"--{model}{a}" if a[0] == "." else a for model in ("model", "twin") for a in small]
    rest = ["--epochs=1", "--batch-size=500", "--data.source.held-out=100", "--nproc=1"]
    assert cli.main(["train", "demo", *both, *rest, f"--run={tmp_path / 'run'}"]) == 0
    assert "dense twin" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dense_parameters"] == summary["dense_active_parameters"] < summary["parameters"]
    assert cli.main(["eval", str(tmp_path / "run" / "dense"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == summary["dense_test_accuracy"]


def test_weights_that_a_twin_cannot_take_are_refused_before_the_first_model_is_trained(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin is dense, and has feed-forwards that are not in a run with experts."""
    swin = ["--twin.embed-dim=8", "--twin.depths", "1", "1", "--twin.num-heads", "1", "2", "--twin.patch-size=2"]
    arguments = ["train", "digits", *TINY, f"--start.weights={run}"]
    before = tmp_path / "run"
    before.mkdir()
    (before / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    said = failed([*arguments, *swin, "--twin.window-size=4", f"--run={before}"], capsys)
    assert re.search(r"lacks \d of the backbone's .* tensors: backbone\.stages\.1\.blocks\.0\.ffn\.", said)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # what was there was not moved aside
    assert cli.main([*arguments, f"--run={tmp_path / 'alone'}"]) == 0


def test_resuming_a_finished_run_does_nothing_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "summary.json").read_bytes()
    assert cli.main(["train", "digits", *TINY, f"--run={run}", "--resume"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert (run / "summary.json").read_bytes() == before


def test_resuming_with_other_settings_names_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = failed(["train", "digits", *TINY, f"--run={run}", "--resume", "--optim.lr=0.5", "--seed=3"], capsys)
    assert "optim.lr: 0.002 -> 0.5; seed: 0 -> 3" in said


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not empty and not the folder of a run" in failed(["train", "digits", *TINY, f"--run={tmp_path}"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_which_another_process_trains_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is training" in failed(["train", "digits", *TINY, f"--run={run}"], capsys)
    assert run.is_dir()


NO_PICTURE = "it is of no kind that Pillow knows"


def test_a_folder_of_photos_is_trained_on_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(level - 50, level + 50, (20, 26, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(
                tmp_path / "photos" / name / f"{i}.{('jpg', 'png', 'gif', 'bmp', 'tif', 'webp')[i % 6]}"
            )
    (tmp_path / "photos" / "dark" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "photos" / "light" / "phone.heic").write_bytes(b"no kind that is looked for")
    arguments = [
        "train", "digits", *TINY, "--data", tmp_path / "photos", "--run", tmp_path / "run",
        "--batch-size=4", "--epochs=4", "--data.preprocess.channels=3", "--data.preprocess.mean", "0.5", "0.5", "0.5",
        "--data.preprocess.std", "0.25", "0.25", "0.25", "--data.preprocess.image-size=16",
    ]  # fmt: skip
    assert "broken.jpg" in failed(arguments, capsys)
    skipping = [str(a) for a in [*arguments, "--on-bad-image", "skip"]]
    assert cli.main(skipping) == 0
    out = capsys.readouterr().out
    assert "left out as unreadable" in out
    assert "left_out.jsonl lists them" in out
    assert "in a class folder: light/phone.heic" in out
    (line,) = (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line) == {"path": str(tmp_path / "photos" / "dark" / "broken.jpg"), "reason": NO_PICTURE}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bad_images"] + summary["test_bad_images"] >= 1
    assert summary["test_accuracy"] == 1.0
    scoring = ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "photos"), "--on-bad-image", "skip", "--json"]
    assert cli.main(scoring) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["images"], found["bad_images"], found["left_out"]) == (24, 1, [json.loads(line)])
    assert "left out: cannot read the image" in said.err


def test_a_folder_one_level_too_high_is_refused_before_a_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dark", "light"):
        (tmp_path / "data" / "photos" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "data" / "photos" / name / "1.png")
    text = failed(["train", "digits", *TINY, "--data", tmp_path / "data", "--run", tmp_path / "run"], capsys)
    assert "has one class folder only, photos, so there is nothing to tell apart: are the classes dark, light?" in text
    assert not (tmp_path / "run").exists()


@pytest.fixture
def nan_after_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spoil the loss of the third step, as a too high learning rate would."""
    original: Callable[..., object] = loop.train_step

    def spoil(trainee: Trainee, *arguments: object, step: int, **named: object) -> object:
        if step == 2:
            nn.init.constant_(trainee.model.get_submodule("head").weight, float("inf"))
        return original(trainee, *arguments, step=step, **named)

    monkeypatch.setattr(loop, "train_step", spoil)


@pytest.mark.usefixtures("nan_after_two_steps")
def test_a_nan_stops_the_run_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "digits", *TINY, f"--run={tmp_path / 'run'}", "--keep.checkpoint-steps=1"]
    assert cli.main(arguments) == 3
    said = capsys.readouterr().out.replace("\n", " ")
    assert "at step 3" in said
    assert "head.weight" in said
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()
