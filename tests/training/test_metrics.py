from pathlib import Path

import pytest
import torch

from synchromesh.errors import InputError
from synchromesh.training.evaluate import dead_experts
from synchromesh.training.metrics import MetricsWriter, drop_rate, load_shares, read_metrics
from synchromesh.types import LoadStats, Plan


def load(*tokens: int, dropped: int = 0) -> LoadStats:
    return LoadStats(torch.tensor(tokens), torch.tensor(dropped), Plan())


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"kind": "train", "step": 1})
    size = writer.sync()
    writer.write({"kind": "train", "step": 2})
    writer.close()
    again = MetricsWriter(tmp_path / "m.jsonl", size=size)
    again.write({"kind": "train", "step": 3})
    again.close()
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == [1, 3]


def test_a_last_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]


def test_a_file_shorter_than_its_checkpoint_says_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="shorter than its checkpoint says"):
        MetricsWriter(tmp_path / "m.jsonl", size=100)


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"kind": "test", "step": 1, "loss": float("nan"), "load": {"a": [0.5]}})
    writer.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"kind": "test", "step": 1, "loss": None, "load": {"a": [0.5]}}]


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the folder of a run"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_shares_and_drop_rate_are_those_of_the_counts() -> None:
    loads = {"a": load(3, 1, dropped=1), "b": load(0, 4, dropped=3)}
    assert load_shares(loads) == {"a": [0.75, 0.25], "b": [0.0, 1.0]}
    assert drop_rate(loads) == 0.5
    assert drop_rate({}) == 0.0
    assert load_shares({"none": load(0, 0)}) == {"none": [0.0, 0.0]}


def test_a_dead_expert_has_under_a_tenth_of_its_fair_part() -> None:
    fair = 1000 // 4
    loads = {"edge": load(1000 - 2 * fair - 25, fair, fair, 25), "dead": load(1000 - 24, 0, 0, 24)}
    assert dead_experts(loads) == {"dead": [1, 2, 3]}
