"""The command lines: four ranks' files to one, and on to two."""

import re
import subprocess
import sys

import pytest
import torch

from synchromesh.compat.tutel.checkpoint import gather, scatter


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    module.main()


def files_of_ranks(folder, ranks):
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(4, 8, 6, generator=generator)
    for rank, part in enumerate(weight.chunk(ranks)):
        state = {
            "moe._num_global_experts": torch.tensor(4),
            "moe.experts.batched_fc1_w": part,
            "own": torch.tensor(rank),
        }
        torch.save({"epoch": 7, "all": {"model": state}}, folder / f"{rank}-of-{ranks}.ckpt")
    return weight


def test_four_files_become_one_and_then_two(tmp_path, monkeypatch, capsys):
    weight = files_of_ranks(tmp_path, 4)
    many, one = tmp_path / "{rank}-of-{size}.ckpt", tmp_path / "one.ckpt"
    run(monkeypatch, gather, "--inputs", many, "--input_size", 4, "--output", one, "--namespace", "all/model")
    assert capsys.readouterr().out == f"wrote {one}\n"
    whole = torch.load(one, weights_only=True)
    assert whole["epoch"] == 7
    assert torch.equal(whole["all"]["model"]["moe.experts.batched_fc1_w"], weight)
    assert whole["all"]["model"]["own"] == 0
    run(monkeypatch, scatter, "--input", one, "--output_size", 2, "--outputs", many, "--namespace", "all/model")
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}-of-2.ckpt", weights_only=True)["all"]["model"]
        assert torch.equal(part["moe.experts.batched_fc1_w"], weight[2 * rank : 2 * rank + 2])


def test_the_module_is_a_program():
    command = [sys.executable, "-m", "synchromesh.compat.tutel.checkpoint.gather", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--default_num_global_experts" in said
    assert "--default_model_dim" in said


def test_a_width_that_no_gate_says_is_an_argument(tmp_path, monkeypatch):
    numbers = torch.arange(15.0)  # of 3 x 5, and one of filling
    for rank, part in enumerate(torch.cat([numbers, torch.zeros(1)]).chunk(2)):
        state = {"_num_global_experts": torch.tensor(1), "experts.W_fc1": part}
        torch.save(state, tmp_path / f"{rank}.ckpt")
    inputs, one = ["--inputs", tmp_path / "{rank}.ckpt", "--input_size", 2], tmp_path / "one.ckpt"
    run(monkeypatch, gather, *inputs, "--output", one, "--default_model_dim", 3)
    assert torch.equal(torch.load(one, weights_only=True)["experts.W_fc1"], numbers)


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (gather, ["--inputs", "{rank}-of-4.ckpt", "--input_size", "5"], "No such file .*4-of-4"),
        (gather, ["--inputs", "{rank}-of-4.ckpt", "--input_size", "2"], "2-of-4.ckpt too: were there more ranks"),
        (gather, ["--inputs", "one", "--input_size", "2"], "{rank} in it"),
        (gather, ["--inputs", "{rank}-of-4.ckpt", "--input_size", "0"], "got --input_size 0"),
        (gather, ["--inputs", "{rank}-of-4.ckpt", "--input_size", "4", "--namespace", ""], "in a --namespace"),
        (scatter, ["--input", "absent", "--output_size", "2", "--outputs", "x{rank}"], "No such file .*absent"),
        (scatter, ["--input", "0-of-4.ckpt", "--output_size", "0", "--outputs", "x{rank}"], "got --output_size 0"),
    ],
)
def test_an_error_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch, capsys, module, arguments, says):
    files_of_ranks(tmp_path, 4)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    output = ["--output", "one"] if module is gather else []
    nested = [] if "--namespace" in arguments else ["--namespace", "all/model"]
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, module, *arguments, *output, *nested)
    assert sorted(tmp_path.iterdir()) == before
    error = capsys.readouterr().err
    assert "Traceback" not in error

    assert re.search(says, error), error
