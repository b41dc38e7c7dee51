import json

import pytest
import torch

from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement, Way, architecture_of, shipped

ABOUT = ("NVIDIA H100", "2.13.0+cu130", "3.6.0", "abc1234", "2026-01-01T00:00:00Z")


def cell(rows, depth, width, *, torch_wins, kind=Kind.PRODUCT, dtype="bfloat16"):
    return Cell(kind, dtype, 8, rows, depth, width, 2e-3, 1e-3 if torch_wins else 3e-3)


TABLE = Choices(
    (
        Measurement(
            "sm_90",
            *ABOUT,
            cells=(
                cell(64, 2048, 1024, torch_wins=False),
                cell(1024, 2048, 1024, torch_wins=True),
                cell(1024, 1024, 8192, torch_wins=False),
                cell(64, 2048, 1024, torch_wins=True, kind=Kind.WEIGHTS),
            ),
        ),
    )
)


def asked(rows=1024, depth=2048, width=1024, *, table=TABLE, kind=Kind.PRODUCT, architecture="sm_90", dtype=None):
    dtype = torch.bfloat16 if dtype is None else dtype
    return table.faster(kind, architecture, dtype=dtype, rows_per_expert=rows, depth=depth, width=width)


def test_the_nearest_cell_decides_both_ways():
    assert asked(64) == Way.TRITON
    assert asked(1024) == Way.TORCH
    assert asked(128) == Way.TRITON
    assert asked(600, 2000, 900) == Way.TORCH
    assert asked(1024, 1024, 6000) == Way.TRITON
    assert asked(64, kind=Kind.WEIGHTS) == Way.TORCH
    assert asked(64) == Way.TRITON  # asked again


def test_where_nothing_near_was_measured_triton_runs():
    assert asked(1024 * 5) == Way.TRITON
    assert asked(1024, 2048, 200) == Way.TRITON
    assert asked(0) == Way.TRITON
    assert asked(architecture="sm_100") == Way.TRITON
    assert asked(dtype=torch.float16) == Way.TRITON
    assert asked(table=Choices()) == Way.TRITON


def test_equal_times_leave_triton():
    even = Choices((Measurement("sm_90", *ABOUT, (Cell(Kind.PRODUCT, "bfloat16", 8, 64, 64, 64, 1e-3, 1e-3),)),))
    assert asked(64, 64, 64, table=even) == Way.TRITON


def test_a_table_survives_a_file():
    again = Choices.from_json(TABLE.to_json())
    assert again == TABLE
    assert asked(table=again) == Way.TORCH


def test_a_new_measurement_replaces_those_of_its_architecture_only():
    other = Measurement("sm_100", *ABOUT, cells=())
    newer = Measurement("sm_90", *ABOUT, cells=(cell(1024, 2048, 1024, torch_wins=False),))
    table = TABLE.with_measurement(other).with_measurement(newer)
    assert {one.architecture: one for one in table.measurements} == {"sm_90": newer, "sm_100": other}
    assert asked(table=table) == Way.TRITON


def test_the_shipped_table_says_where_it_is_from():
    for measurement in shipped().measurements:
        assert measurement.device
        assert measurement.commit
        assert measurement.cells


def test_a_cpu_has_a_name_of_its_own():
    assert architecture_of(torch.device("cpu")) == "cpu"


def broken(change):
    table = json.loads(TABLE.to_json())
    change(table)
    return json.dumps(table)


def first(table):
    return table["measurements"][0]["cells"][0]


MALFORMED = {
    "no JSON": "{",
    "no table": "[]",
    "no list": '{"measurements": {}}',
    "another field": broken(lambda table: table.update(more=1)),
    "a measurement of numbers": '{"measurements": [3]}',
    "no architecture": broken(lambda table: table["measurements"][0].pop("architecture")),
    "an architecture of numbers": broken(lambda table: table["measurements"][0].update(architecture=90)),
    "no cells": broken(lambda table: table["measurements"][0].update(cells=None)),
    "no seconds": broken(lambda table: first(table).pop("torch")),
    "negative seconds": broken(lambda table: first(table).update(torch=-1.0)),
    "infinite seconds": broken(lambda table: first(table).update(triton=float("inf"))),
    "seconds of words": broken(lambda table: first(table).update(triton="fast")),
    "half a row": broken(lambda table: first(table).update(rows_per_expert=0.5)),
    "true rows": broken(lambda table: first(table).update(rows_per_expert=True)),
    "no rows": broken(lambda table: first(table).update(rows_per_expert=0)),
    "an unknown kind": broken(lambda table: first(table).update(kind="convolution")),
    "a kind that is a list": broken(lambda table: first(table).update(kind=[])),
    "an unknown dtype": broken(lambda table: first(table).update(dtype="bfloat17")),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_table_is_refused(name):
    with pytest.raises(ValueError, match=r"got|is"):
        Choices.from_json(MALFORMED[name])


def test_a_way_that_was_not_asked_has_no_time():
    one = Cell(Kind.OPENING, "bfloat16", 8, 64, 64, 64, 2e-3, None, 1e-3)
    assert one.faster == Way.GLUON
    assert Way.TORCH not in one.seconds
    table = Choices((Measurement("sm_90", *ABOUT, (one,)),))
    assert Choices.from_json(table.to_json()) == table
    with pytest.raises(ValueError, match=r"Cell\.gluon is 0"):
        Cell(Kind.PRODUCT, "bfloat16", 8, 64, 64, 64, 2e-3, 1e-3, 0.0)


def test_a_table_from_before_gluon_is_read():
    older = json.loads(TABLE.to_json())
    for found in older["measurements"][0]["cells"]:
        del found["gluon"]
    assert Choices.from_json(json.dumps(older)) == TABLE
