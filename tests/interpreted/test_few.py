import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from synchromesh.kernels import REFERENCE, MLPWeights, quantize
from synchromesh.kernels.fused_mlp.few import MOST_ROWS, SHARED, is_few, taken
from synchromesh.kernels.fused_mlp.reads import bytes_read
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import NETWORKS, network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close

CROWDED = torch.tensor([[0, 7], [7, 2], [7, -1], [3, 7], [7, 0], [-1, -1], [2, 7], [7, 3], [0, 7]])  # 8 rows of one


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_without_gradients(kind, dtype):
    ids = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 7]])
    mlp = MLPWeights(**network_parts(kind, 9, dtype, width=150, hidden=37), joint="joint" in kind)
    for rowmap in (row_map_of(ids, 9), row_map_of(ids, 9, capacity=1), row_map_of(ids[:0], 9)):
        tokens = len(rowmap.rows)
        assert is_few(len(rowmap.pairs), 9)
        x, weights = torch.randn(tokens, 150).to(dtype), torch.rand(tokens, 2)
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, F.silu)
        assert_close("y", TRITON.fused_mlp(x, weights, rowmap, mlp, F.silu), wanted)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [("biased", None), ("joint", None), ("gated_biased", torch.int8), ("gated", torch.float8_e4m3fn)],
)
def test_rows_that_share_a_matrix_are_those_of_the_definition(kind, numbers):
    """One expert has eight rows, of which programs take four and four; others have one to three."""
    mlp = MLPWeights(**network_parts(kind, 9, torch.float32, width=70, hidden=37), joint="joint" in kind)
    mlp = mlp if numbers is None else quantize(mlp, numbers)
    x, weights, rowmap = torch.randn(len(CROWDED), 70), torch.rand(CROWDED.shape), row_map_of(CROWDED, 9)
    assert is_few(CROWDED.numel(), 9)
    wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, F.silu)
    assert_close("mapped", TRITON.fused_mlp(x, weights, rowmap, mlp, F.silu), wanted)
    assert_close("direct", TRITON.direct_mlp(x, weights, CROWDED, mlp, F.silu), wanted)


@pytest.mark.parametrize(("kind", "numbers"), [("plain", None), ("gated_biased", torch.int8)], ids=str)
def test_a_token_has_the_same_bits_whoever_shares_with_it(kind, numbers):
    mlp = MLPWeights(**network_parts(kind, 9, torch.float32, width=70, hidden=37))
    mlp = mlp if numbers is None else quantize(mlp, numbers)
    x, weights = torch.randn(len(CROWDED), 70), torch.rand(CROWDED.shape)
    together = TRITON.direct_mlp(x, weights, CROWDED, mlp, F.silu)
    mapped = TRITON.fused_mlp(x, weights, row_map_of(CROWDED, 9), mlp, F.silu)
    assert torch.equal(mapped, together)
    order = torch.arange(len(x)).flip(0)
    assert torch.equal(TRITON.direct_mlp(x[order], weights[order], CROWDED[order], mlp, F.silu), together[order])
    for token in (0, 2, 3, 5, 8):
        one = slice(token, token + 1)
        alone = TRITON.direct_mlp(x[one], weights[one], CROWDED[one], mlp, F.silu)
        assert torch.equal(alone, together[one])


def test_a_row_that_is_no_number_leaves_those_that_share_with_it_alone():
    mlp = MLPWeights(**network_parts("gated", 9, torch.float32, width=70, hidden=37))
    x, weights = torch.randn(len(CROWDED), 70), torch.rand(CROWDED.shape)
    wanted = TRITON.direct_mlp(x, weights, CROWDED, mlp, F.silu)
    x[3] = torch.nan
    got = TRITON.direct_mlp(x, weights, CROWDED, mlp, F.silu)
    others = torch.arange(len(x)) != 3
    assert got[3].isnan().all()
    assert torch.equal(got[others], wanted[others])


@triton.jit
def _note_taken(
    pairs, ends, number, experts, to, MAPPED: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    e, row0, row1, row2, row3 = taken(pairs, ends, number, experts, MAPPED, EXPERTS, PAIRS)
    at = to + tl.program_id(0) * 5
    tl.store(at, e)
    tl.store(at + 1, row0)
    tl.store(at + 2, row1)
    tl.store(at + 3, row2)
    tl.store(at + 4, row3)


def taken_by(pairs, ends, experts):
    """Return the expert and the different rows of each program that has any."""
    found = torch.zeros(pairs.numel(), 5, dtype=torch.int64)
    _note_taken[(pairs.numel(),)](
        pairs, pairs if ends is None else ends, pairs.numel(), experts, found,
        MAPPED=ends is not None, EXPERTS=triton.next_power_of_2(experts), PAIRS=MOST_ROWS,
    )  # fmt: skip
    return [(expert, list(dict.fromkeys(rows))) for expert, *rows in found.tolist() if expert >= 0]


@pytest.mark.parametrize("ids", [CROWDED, zipf(64, 8, 4), torch.full((40, 2), -1)], ids=["crowded", "zipf", "none"])
def test_programs_take_every_row_once_by_fours_of_one_expert(ids):
    flat, experts = ids.flatten(), 9
    own = [(flat == expert).nonzero()[:, 0].tolist() for expert in range(experts)]
    wanted = [(e, rows[at : at + SHARED]) for e, rows in enumerate(own) for at in range(0, len(rows), SHARED)]
    assert sorted(taken_by(flat, None, experts)) == sorted(wanted)
    assert len(wanted) == bytes_read(map(len, own), 1, shared=SHARED)
    rowmap = row_map_of(ids, experts)
    ends = [0, *rowmap.ends.tolist()]
    spans = [(e, list(range(*each))) for e, each in enumerate(itertools.pairwise(ends))]
    by_rows = [(e, rows[at : at + SHARED]) for e, rows in spans for at in range(0, len(rows), SHARED)]
    assert taken_by(rowmap.pairs, rowmap.ends, experts) == by_rows


def test_more_pairs_than_are_called_few_are_right_too():
    ids, mlp = zipf(257, 5, 2), MLPWeights(**network_parts("plain", 5, torch.float32, width=10, hidden=17))
    x, weights = torch.randn(257, 10), torch.rand(257, 2)
    wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
    assert_close("y", TRITON.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


def test_matrices_of_any_strides_give_the_same():
    mlp = MLPWeights(**network_parts("gated", 9, torch.float32, width=70, hidden=37))
    turned = dataclasses.replace(
        mlp, up=mlp.up.permute(2, 0, 1).contiguous().permute(1, 2, 0), down=mlp.down.mT.contiguous().mT
    )
    x, weights = torch.randn(len(CROWDED), 70), torch.rand(CROWDED.shape)
    assert torch.equal(*(TRITON.direct_mlp(x, weights, CROWDED, each, F.silu) for each in (turned, mlp)))


def test_many_rows_of_few_experts_take_tiles():
    """Past four rows an expert the cache would take longer for all reads than memory does for all matrices."""
    assert not is_few(513, 1000)
    assert not is_few(65, 16)
    assert is_few(64, 16)
