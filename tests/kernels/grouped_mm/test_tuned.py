import dataclasses
import json

import pytest
import torch

from synchromesh.kernels.grouped_mm import tilings
from synchromesh.kernels.grouped_mm.blocks import Tilings
from synchromesh.kernels.grouped_mm.tuned import Tuned, Tuning, shipped
from synchromesh.kernels.tiles import Tiling

FAST = Tilings(
    Tiling(64, 256, 64, 8, 3), Tiling(64, 128, 64, 8, 4), Tiling(64, 64, 64, 8, 3), Tiling(256, 128, 64, 8, 3)
)
ABOUT = ("NVIDIA H100", "2.11.0+cu130", "3.6.0", "abc1234", "2026-01-01T00:00:00Z")
TABLE = Tuned((Tuning("sm_90", "bfloat16", *ABOUT, tilings=FAST),))


def test_a_table_survives_a_file():
    assert Tuned.from_json(TABLE.to_json()) == TABLE
    assert Tuned.from_json(Tuned().to_json()) == Tuned()


def test_a_later_run_takes_the_place_of_its_architecture_alone():
    slower = dataclasses.replace(FAST, product=Tiling(64, 64, 64, 4, 2))
    other = Tuning("sm_100", "bfloat16", *ABOUT, tilings=slower)
    again = dataclasses.replace(TABLE.tunings[0], tilings=slower)
    assert TABLE.with_tuning(other).with_tuning(again).tunings == (other, again)


def test_what_was_measured_runs_on_its_architecture_and_size_of_numbers_alone(monkeypatch):
    monkeypatch.setattr(tilings, "shipped", lambda: TABLE)
    monkeypatch.setattr(tilings, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(tilings, "_architecture", lambda device: "sm_90")
    gpu = torch.device("cuda")
    assert tilings.tilings_of(torch.bfloat16, gpu, rows_per_expert=1000) == FAST
    assert tilings.tilings_of(torch.float16, gpu, rows_per_expert=8) == FAST.lowered(8)
    assert tilings.tilings_of(torch.float32, gpu, rows_per_expert=1000) == tilings.OF_32_BITS
    monkeypatch.setattr(tilings, "architecture_of", lambda device: "sm_103")
    assert tilings.tilings_of(torch.bfloat16, gpu, rows_per_expert=1000) == tilings.OF_16_BITS["sm_90"]


def test_what_is_shipped_can_be_read():
    assert isinstance(shipped(), Tuned)


def changed(**fields):
    table = json.loads(TABLE.to_json())
    table["tunings"][0] |= fields
    return json.dumps(table)


def with_size(name, size):
    kinds = dataclasses.asdict(FAST)
    kinds["weights"][name] = size
    return changed(tilings=kinds)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is JSON"),
        ("[]", "holds the fields"),
        ('{"tunings": 3}', "list of tunings"),
        ('{"tunings": [{}]}', "holds the fields"),
        (changed(device=3), "device"),
        (changed(dtype="float17"), "dtype"),
        (changed(dtype="nn"), "dtype"),
        (changed(tilings={}), "holds the fields"),
        (with_size("rows", 48), "power of two"),
        (with_size("rows", True), "power of two"),
        (with_size("stages", 0), "power of two"),
        (with_size("cols", 2048), "power of two"),
        (changed(tilings=dataclasses.asdict(dataclasses.replace(FAST, product=Tiling(128, 64, 64, 8, 3)))), "alike"),
    ],
)
def test_a_broken_table_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Tuned.from_json(text)
