import json
import os
from pathlib import Path

import pytest
import torch

from synchromesh import cli
from synchromesh.commands.profile import keep_products
from synchromesh.commands.profiling import fitted
from synchromesh.kernels import product_meter
from synchromesh.kernels.product_costs import Cost, Machine, ProductCosts, known, own_file
from synchromesh.planning.cluster import Matmul, load_profile
from synchromesh.testing.programs import run_job


def test_ranks_measure_themselves_and_plan_reads_what_they_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-m", "synchromesh.cli", "profile", "here.json", "--ranks-per-node=2"]
    for done in run_job(4, *command, cwd=tmp_path):
        assert done.returncode == 0, done.stderr
        assert ("messages between nodes" in done.stdout) == bool(done.stdout)
    profile = load_profile(tmp_path / "here.json")
    assert (profile.name, profile.per_node, profile.backend) == ("here", 2, "gloo")
    assert all("measured on" in source for source in profile.sources.values())
    assert profile.network.node_rate is not None
    assert profile.cores == len(os.sched_getaffinity(0)) / 4  # the nodes are pretended, the machine is one
    assert 0 < profile.node.busy <= 1
    assert 0 < profile.network.busy <= 1
    for law in profile.matmul.values():
        assert law.peak > 0
    layer = ["--layer", "256", "64", "128", "4", "2", "--dtype=float32", "--json"]
    assert cli.main(["plan", f"--cluster={tmp_path / 'here.json'}", "--world=4", *layer]) == 0
    assert json.loads(capsys.readouterr().out)["world"] == 4


def test_one_process_measures_all_but_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", str(tmp_path / "one.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sources"]["network"] == "not measured: one node"
    assert found["network"] is None
    assert found["memory_rate"] > 0


def test_the_law_of_products_is_found_again() -> None:
    law = Matmul(peak=5e11, half=32.0)
    shapes = [(16, 256, 256), (256, 256, 512), (1024, 1024, 1024), (64, 512, 256)]
    found = fitted([(shape, law.seconds(*shape)) for shape in shapes])
    assert found.half == pytest.approx(32.0)
    assert found.peak == pytest.approx(5e11)


def test_senseless_numbers_of_ranks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", str(tmp_path / "x.json"), "--world=0"]) == 2
    assert "got 0 for the number of ranks" in capsys.readouterr().err


def test_costs_of_products_are_kept_for_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = ProductCosts(Cost(1.0, 2.0, 3.0), Cost(4.0, 5.0, 6.0))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(product_meter, "measure", lambda: Machine("this", 1, "2.13", {"float32": cost}))
    own_file().parent.mkdir(parents=True)
    own_file().write_text("of no use")
    assert cli.main(["profile", str(tmp_path / "one.json"), "--products"]) == 0
    assert known(own_file()).costs("this", 1, torch.float32) == cost
    keep_products(own_file(), Machine("other", 1, "2.13", {"float32": cost}))
    assert [machine.cpu for machine in known(own_file()).measured[-2:]] == ["this", "other"]
