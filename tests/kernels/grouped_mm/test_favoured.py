"""Which implementation of a product runs, and the reason it gives."""

import dataclasses

import pytest
import torch

from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement, Way
from synchromesh.kernels.grouped_mm.favoured import (
    RUN_ON_A_CARD,
    Measured,
    OnlyWay,
    Predicted,
    ProductShape,
    Unmeasured,
    favoured,
    predicted,
    runs,
)

LARGE = ProductShape(Kind.PRODUCT, 64, 4096, 1024, 2048)
ABOUT = ("NVIDIA H100", "2.13.0+cu130", "3.6.0", "abc1234", "2026-01-01T00:00:00Z")
NOTHING = Choices()


def measured(architecture="sm_90", **seconds):
    cell = Cell(LARGE.kind, "bfloat16", LARGE.experts, *LARGE.sizes.values(), **{"torch": None, **seconds})
    return Choices((Measurement(architecture, *ABOUT, (cell,)),))


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"triton": 1e-3, "torch": 2e-3, "gluon": 3e-3}, Way.TRITON),
        ({"triton": 2e-3, "torch": 1e-3, "gluon": 3e-3}, Way.TORCH),
        ({"triton": 2e-3, "torch": 3e-3, "gluon": 1e-3}, Way.GLUON),
        ({"triton": 2e-3, "gluon": 1e-3}, Way.GLUON),
        ({"triton": 1e-3, "torch": 1e-3, "gluon": 1e-3}, Way.TRITON),
    ],
)
def test_a_measured_cell_decides_and_shows_every_time(seconds, way):
    got = favoured(LARGE, "sm_90", choices=measured(**seconds))
    assert got.way == way
    assert isinstance(got.reason, Measured)
    assert all(f"{name} {1e6 * taken:,.0f} us" in str(got.reason) for name, taken in seconds.items())
    assert "NVIDIA H100" in str(got.reason)


def test_a_way_that_cannot_run_here_is_passed_over():
    table = measured(triton=2e-3, torch=3e-3, gluon=1e-3)
    assert favoured(LARGE, "sm_90", choices=table, able=(Way.TRITON, Way.TORCH)).way == Way.TRITON
    odd = dataclasses.replace(LARGE, width=2044)
    assert favoured(odd, "sm_90", choices=table).way == Way.TRITON


def test_a_cell_of_another_architecture_says_nothing():
    got = favoured(LARGE, "sm_90", choices=measured("sm_100", triton=2e-3, torch=1e-3, gluon=1e-4))
    assert isinstance(got.reason, Predicted)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("rows", [1, 200, 8192])
@pytest.mark.parametrize("side", [512, 4096])
def test_no_kernel_that_never_ran_on_a_card_runs_unmeasured(kind, rows, side):
    assert not RUN_ON_A_CARD
    got = favoured(ProductShape(kind, 64, rows, side, 2 * side), "sm_90", choices=NOTHING)
    assert got.way != Way.GLUON
    assert isinstance(got.reason, Predicted)
    assert got.reason.held_back == (Way.GLUON,)
    assert "gluon waits for a card to run it" in str(got.reason)


def test_torchs_kernel_runs_where_arithmetic_leaves_no_doubt():
    assert favoured(LARGE, "sm_90", choices=NOTHING).way == Way.TORCH
    deep = dataclasses.replace(LARGE, depth=8192)  # a tile so deep hides how long Triton's takes to begin
    assert favoured(deep, "sm_90", choices=NOTHING).way == Way.TRITON
    few = dataclasses.replace(LARGE, rows_per_expert=64)
    assert favoured(few, "sm_90", choices=NOTHING).way == Way.TRITON
    narrow = dataclasses.replace(LARGE, depth=512)
    assert favoured(narrow, "sm_90", choices=NOTHING).way == Way.TRITON


@pytest.mark.parametrize(
    ("shape", "architecture", "said"),
    [
        (LARGE, "sm_80", "sm_80"),
        (LARGE, "gfx942", "gfx942"),
        (dataclasses.replace(LARGE, dtype=torch.float32), "sm_90", "float32"),
        (dataclasses.replace(LARGE, depth=1020), "sm_90", "1020"),
    ],
    ids=["sm_80", "gfx942", "float32", "depth_1020"],
)
def test_where_there_is_no_choice_the_reason_says_so(shape, architecture, said):
    got = favoured(shape, architecture, choices=NOTHING)
    assert got.way == Way.TRITON
    assert isinstance(got.reason, OnlyWay)
    assert said in str(got.reason)


def test_the_arithmetic_of_one_card_decides_nothing_on_another():
    got = favoured(LARGE, "sm_100", choices=NOTHING)
    assert (got.way, type(got.reason)) == (Way.TRITON, Unmeasured)
    assert "of torch or gluon on sm_100" in str(got.reason)
    opening = favoured(dataclasses.replace(LARGE, kind=Kind.OPENING), "sm_100", choices=NOTHING)
    assert "of gluon on sm_100" in str(opening.reason)
    assert favoured(LARGE, "sm_100", choices=measured("sm_100", triton=2e-3, gluon=1e-3)).way == Way.GLUON


def test_what_is_predicted_follows_the_tiles():
    assert predicted(LARGE, Way.TRITON) < predicted(LARGE, Way.GLUON) < predicted(LARGE, Way.TORCH) <= 1
    one_row_over = dataclasses.replace(LARGE, experts=132, rows_per_expert=129)
    whole = dataclasses.replace(one_row_over, rows_per_expert=256)
    assert predicted(one_row_over, Way.GLUON) == pytest.approx(predicted(whole, Way.GLUON) * 129 / 256)
    turned = ProductShape(Kind.WEIGHTS, 64, 1024, 4096, 2048)
    assert predicted(turned, Way.GLUON) == pytest.approx(predicted(LARGE, Way.GLUON))
    assert predicted(dataclasses.replace(LARGE, kind=Kind.OPENING), Way.TRITON) < predicted(LARGE, Way.TRITON)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="wanted sizes of 1 and more"):
        ProductShape(Kind.PRODUCT, 0, 1, 8, 8)


def test_a_question_asked_twice_is_answered_once():
    table = measured(triton=2e-3, torch=1e-3)
    before = runs.cache_info().hits
    assert {runs(LARGE, "sm_90", table, (Way.TRITON, Way.TORCH)) for _ in range(2)} == {Way.TORCH}
    assert runs.cache_info().hits == before + 1
