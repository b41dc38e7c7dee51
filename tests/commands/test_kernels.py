"""`synchromesh kernels`: for people and for programs."""

import json

import pytest
import torch

from synchromesh import cli
from synchromesh.commands.kernels import as_json
from synchromesh.kernels.families import Running
from synchromesh.kernels.grouped_mm.choice import Cell, Kind, Measurement
from synchromesh.kernels.grouped_mm.favoured import Measured

LARGE = ["--tokens=32768", "--width=2048", "--hidden=1024", "--experts=64", "--k=8"]


def objects(capsys, *arguments):
    assert cli.main(["kernels", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_architecture_by_name_with_what_arithmetic_says(capsys):
    found = objects(capsys, "--architecture", "sm_90", *LARGE)
    closing = next(one for one in found if (one["family"], one["step"]) == ("fused_mlp", "closing"))
    assert closing["runs"] in ("triton", "torch")
    assert closing["because"] == "arithmetic"
    assert set(closing["fractions"]) == {"triton", "torch", "gluon"}
    assert all(0 < fraction <= 1 for fraction in closing["fractions"].values())
    assert closing["held_back"] == ["gluon"]
    assert closing["torch"] == torch.__version__
    assert (closing["tokens"], closing["k"], closing["architecture"]) == (32768, 8, "sm_90")


def test_this_machine_without_a_name(capsys):
    found = objects(capsys)
    wanted = "triton" if torch.cuda.is_available() else "cpu"
    assert wanted in {one["runs"] for one in found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs its own kernels")
def test_a_cpu_says_how_it_multiplies_and_by_whose_costs(capsys):
    closing = next(one for one in objects(capsys, *LARGE) if (one["family"], one["step"]) == ("fused_mlp", "closing"))
    assert closing["because"] == "costs"
    assert closing["way"] in closing["seconds"]
    assert set(closing["measured_on"]) == {"cpu", "threads", "torch"}
    assert closing["reason"].startswith(f"{closing['way']}: one by one ")


def test_a_table_for_people_names_way_reason_and_versions(capsys):
    assert cli.main(["kernels", "--architecture", "sm_90", *LARGE]) == 0
    said = capsys.readouterr().out
    assert f"torch {torch.__version__}" in said
    assert "gluon waits for a card to run it" in said
    assert "only way: no other has it on a GPU" in said


def test_measured_times_are_in_the_json():
    about = Measurement("sm_90", "NVIDIA H100", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z", ())
    reason = Measured(Cell(Kind.PRODUCT, "bfloat16", 8, 64, 64, 64, 3e-3, 2e-3, 1e-3), about)
    found = as_json(Running("grouped_mm", "product", "gluon", reason))
    assert found["because"] == "measured"
    assert found["seconds"] == {"triton": 3e-3, "torch": 2e-3, "gluon": 1e-3}
    assert found["measured_on"] == {"device": "NVIDIA H100", "torch": "2.13.0", "triton": "3.6.0"}


@pytest.mark.parametrize(("arguments", "said"), [(["--architecture", "hopper"], "'hopper'"), (["--k", "0"], "from 1")])
def test_what_cannot_be_is_said(capsys, arguments, said):
    assert cli.main(["kernels", *arguments]) == 2
    assert said in capsys.readouterr().err
