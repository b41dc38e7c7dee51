"""Which implementation runs each step of a layer, by its shape alone."""

import dataclasses

import pytest
import torch

from synchromesh.kernels.families import LayerShape, running
from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement
from synchromesh.kernels.grouped_mm.favoured import Measured, OnlyWay, Predicted
from synchromesh.kernels.weighed import Weighed

LAYER = LayerShape(32768, 2048, 1024, 64, 8)
FAMILIES = {"select", "positions", "permute", "scaled_mm", "quantized_mlp", "direct_mlp", "fused_mlp", "grouped_mm"}
ABOUT = ("sm_90", "NVIDIA H100", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z")


def implementations(architecture, layer=LAYER, **options):
    return {(one.family, one.step): one.implementation for one in running(layer, architecture, **options)}


@pytest.mark.parametrize(
    ("architecture", "wanted"), [("cpu", "cpu"), ("sm_75", "reference"), ("sm_80", "triton"), ("gfx942", "triton")]
)
def test_where_there_is_one_way_every_family_takes_it(architecture, wanted):
    found = running(LAYER, architecture)
    assert {one.family for one in found} == FAMILIES
    assert {one.implementation for one in found} == {wanted}
    products = [one.reason for one in found if one.family in ("fused_mlp", "grouped_mm")]
    assert all(isinstance(reason, Weighed if wanted == "cpu" else OnlyWay) for reason in products)
    assert all(isinstance(one.reason, OnlyWay) for one in found if one.reason not in products)


def test_an_unmeasured_gpu_runs_no_kernel_that_never_ran():
    found = running(LAYER, "sm_90", choices=Choices())
    assert {one.implementation for one in found} <= {"triton", "torch"}
    products = [one for one in found if one.family in ("fused_mlp", "grouped_mm")]
    assert all(isinstance(one.reason, Predicted) for one in products)


def test_steps_that_gather_or_add_two_products_are_never_torchs():
    cells = tuple(Cell(kind, "bfloat16", 64, 4096, 1024, 2048, 3e-3, 1e-3) for kind in Kind)
    found = implementations("sm_90", choices=Choices((Measurement(*ABOUT, cells),)))
    assert {step for (family, step), way in found.items() if (family, way) == ("fused_mlp", "torch")} == {"closing"}
    plain = implementations("sm_90", dataclasses.replace(LAYER, gated=False), choices=Choices())
    assert plain["fused_mlp", "gradient of rows"] == plain["fused_mlp", "closing"]


def test_a_measured_table_lets_gluon_in():
    cells = tuple(Cell(kind, "bfloat16", 64, 4096, 2048, 2048, 3e-3, None, 1e-3) for kind in Kind)
    found = running(LAYER, "sm_90", choices=Choices((Measurement(*ABOUT, cells),)))
    products = [one for one in found if one.family in ("fused_mlp", "grouped_mm")]
    assert {one.implementation for one in products} == {"gluon"}
    assert all(isinstance(one.reason, Measured) for one in products)


def test_float64_is_the_references():
    assert set(implementations("sm_90", dataclasses.replace(LAYER, dtype=torch.float64)).values()) == {"reference"}


@pytest.mark.parametrize("architecture", ["", "sm_", "sm_9x", "gfx", "hopper"])
def test_an_unknown_architecture_is_named(architecture):
    with pytest.raises(ValueError, match="wanted cpu, or one such as sm_90 or gfx942"):
        running(LAYER, architecture)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="wanted numbers from 1"):
        dataclasses.replace(LAYER, experts=0)
