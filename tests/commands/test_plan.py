import json
import re
from pathlib import Path

import pytest

from synchromesh import cli
from synchromesh.testing.programs import run_program


def lines(*arguments: str) -> list[dict]:
    """Run `plan` without the checks of types that tests add: a large job is millions of calls."""
    done = run_program("-m", "synchromesh.cli", "plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_published_model_is_planned_from_one_node_to_256() -> None:
    found = lines("--model", "swinv2_moe_b", "--cluster", "a100_hdr", "--world", "8..2048", "--batch", "128")
    assert [one["world"] for one in found] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    for one in found:
        assert one["refused"] is None
        assert 0 < one["efficiency"] <= 1.05  # a little over 1: one device alone reads the weights of all experts
        assert one["samples_per_second"] == pytest.approx(one["world"] * 128 / one["seconds"])
        parts = [part for layer in one["layers"] for part in (layer["forward"], layer["backward"])]
        whole = one["dense_seconds"] + one["reduce_seconds"] + one["average_seconds"]
        whole += sum(part[name] for part in parts for name in ("route", "permute", "matmul", "exposed"))
        assert whole == pytest.approx(one["seconds"])


def test_the_table_says_plans_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--world", "16", "--experts", "8", "64", "--k", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("swinv2_moe_b E") == 4
    assert "stage 3 by g=" in out
    assert "E 64, k 2" in out


def test_no_number_of_ranks_and_experts_is_refused() -> None:
    (odd,) = lines("--experts", "32", "--world", "24", "--batch", "64")
    assert (odd["grid"], odd["copies"], odd["refused"]) == (8, 3, None)
    assert odd["average_seconds"] > 0
    (sixty,) = lines("--layer", "4096", "2048", "1408", "60", "4", "--world", "8")
    assert (sixty["grid"], sixty["copies"]) == (4, 2)
    assert "60 experts cannot be cut evenly over 8" in " ".join(sixty["remarks"])
    (twelve,) = lines("--world", "12")
    assert twelve["ranks_per_node"] == 6  # nodes of 8 cannot be filled evenly


def test_a_layer_by_numbers_and_a_smaller_capacity() -> None:
    layer = ["--layer", "16384", "2048", "2048", "64", "2", "--world", "64", "--cluster", "h100_ndr"]
    whole, half = lines(*layer, "--capacity", "1", "0.5")
    assert half["seconds"] < whole["seconds"]
    (skewed,) = lines(*layer, "--skew", "8")
    assert skewed["seconds"] > whole["seconds"]


def test_a_hugging_face_model_is_planned_from_its_config(
    mixtral: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    given = ["--model", str(tmp_path / "config.json"), "--batch", "1", "--fsdp"]
    found = lines(*given, "--world", "64..65536")
    assert found[-1]["world"] == 65536
    assert all(one["refused"] is None for one in found)
    assert cli.main(["plan", *given, "--world", "1"]) == 1
    out = capsys.readouterr().out
    assert "1 rank: does not fit" in out
    assert "nothing that was tried fits" in out
    assert cli.main(["plan", "--model", str(tmp_path), "--batch", "2", "--world", "16"]) == 1
    assert re.search(
        r"16 ranks: would fit with FSDP of the dense part.*: [\d.]+ GB a rank, [\d.]+ s a step", capsys.readouterr().out
    )


def test_curves_open_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert cli.main(["plan", "--world", "8..32", "--html", str(page)]) == 0
    capsys.readouterr()
    text = page.read_text()
    assert "efficiency" in text
    assert 'src="http' not in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--world", "0"], "wanted ranks from 1"),
        (["--world", "64..8"], "the smaller number first"),
        (["--world", "many"], "as in 8..2048"),
        (["--cluster", "none"], "there is no cluster"),
        (["--model", "none"], "there is no model"),
        (["--k", "64"], "wanted at most"),
        (["--batch", "0"], "wanted at least 1"),
        (["--cluster", "cpu_gloo", "--dtype", "float16"], "tells no speed of float16"),
    ],
)
def test_what_cannot_be_planned_says_why(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *given]) == 2
    assert says in capsys.readouterr().err
