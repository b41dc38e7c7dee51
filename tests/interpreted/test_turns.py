"""What a launch relies on that launches beside it could break: turns that are taken, parts of tiles, direct stores."""

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.fused_mlp import triton as fused
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.grouped_mm import triton as grouped
from synchromesh.kernels.grouped_mm.tilings import INTERPRETED, Tilings
from synchromesh.kernels.tiles import Tiling, tiles_of
from synchromesh.testing.cases import network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close

D, F_, E = 20, 37, 3


def gradients(run, rowmap, parts, weights, x):
    """Return y and every gradient of a network."""
    inputs = [x, weights, *parts.values()]
    inputs = [one.detach().clone().requires_grad_() for one in inputs]
    y = run(inputs[0], inputs[1], rowmap, MLPWeights(**dict(zip(parts, inputs[2:], strict=True))), F.silu)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return {"y": y.detach(), **{str(place): one.grad for place, one in enumerate(inputs)}}


def compared(rowmap, kind, dtype=torch.float32):
    tokens, choices = rowmap.rows.shape
    parts = {name: part for name, part in network_parts(kind, E, dtype, width=D, hidden=F_).items() if part is not None}
    x, weights = torch.randn(tokens, D).to(dtype), torch.rand(tokens, choices)
    weights = torch.where(rowmap.rows >= 0, weights, torch.nan)  # what is not kept is not read
    wanted = gradients(REFERENCE.fused_mlp, rowmap, parts, weights, x)
    once = gradients(TRITON.fused_mlp, rowmap, parts, weights, x)
    twice = gradients(TRITON.fused_mlp, rowmap, parts, weights, x)
    for name, value in once.items():
        assert_close(name, value, wanted[name])
        assert torch.equal(value, twice[name]), name


KINDS = ["plain", "gated_biased"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 9], ids=["all kept", "some dropped"])
def test_rows_of_tokens_with_one_choice_are_stored_as_tokens(kind, capacity):
    ids = zipf(35, E, 1)
    ids[7] = -1
    compared(row_map_of(ids, E, capacity=capacity), kind)


@pytest.mark.parametrize(("kind", "part"), [("plain", 16), ("gated_biased", 8)])
def test_tiles_are_closed_in_parts_as_they_are_whole(kind, part, monkeypatch):
    monkeypatch.setattr(fused, "PART_COLUMNS", 2 * part)  # tiles of 32 rows take half
    compared(row_map_of(zipf(40, E, 2), E), kind)


@pytest.mark.parametrize("programs", [1, 5])
def test_what_a_kernel_leaves_is_the_turn_of_the_next(programs, monkeypatch):
    monkeypatch.setattr(grouped, "programs_of", lambda device, bound: programs)
    ends = torch.tensor([30, 30, 71], dtype=torch.int32)
    rows, weight, tiling = torch.randn(80, D), torch.randn(E, D, F_), INTERPRETED.product
    tiles = tiles_of(ends, 80, tiling.rows)
    for _ in range(2):  # the second finds its items only where the first has set the turn back
        out = grouped.product(rows, weight, tiles, tiling, out=torch.full((80, F_), torch.nan))
        assert_close("product", out[:71], REFERENCE.grouped_mm(rows, weight, ends)[:71])
        assert tiles.turn.tolist() == [0, 0]
        made = grouped.weight_gradient(rows, out, ends, tiling, out=torch.full((E, D, F_), torch.nan), turn=tiles.turn)
        assert_close("weights", made[1], torch.zeros(D, F_))
        assert_close("weights", made[2], rows[30:71].T @ out[30:71])
        assert tiles.turn.tolist() == [0, 0]


def test_nothing_flows_into_the_tail():
    rows, weight = torch.randn(70, D, requires_grad=True), torch.randn(E, D, F_)
    ends = torch.tensor([10, 10, 33], dtype=torch.int32)
    grad = torch.where(torch.arange(70)[:, None] < 33, 1.0, torch.nan).expand(70, F_)
    TRITON.grouped_mm(rows, weight, ends).backward(grad)
    assert rows.grad is not None
    assert torch.equal(rows.grad[33:], torch.zeros(37, D))
    assert rows.grad[:33].isfinite().all()


def test_a_sum_over_few_rows_loads_them_all_at_once():
    tile = Tiling(128, 256, 64, 8, 3)
    tilings = Tilings(tile, tile, tile, tile, few_stages=5)
    assert tilings.lowered(512).weights.stages == 5
    assert tilings.lowered(513).weights.stages == 3
    assert tilings.lowered(20).product.rows == 32
