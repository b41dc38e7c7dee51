import math

import pytest
import torch

from synchromesh.kernels.fused_mlp import few
from synchromesh.kernels.fused_mlp.reads import CACHE_TO_MEMORY, bytes_read, expected_reads, most_rows_per_expert

# Numbers of 8 bits: one instruction in twice the time to widen each, four to add it to four rows; 128 lanes of 132
# multiprocessors at 1.755 GHz, and 3.35 terabytes a second.
WIDENED = 128 * 132 * 1.755e9 / 6 / 3.35e12


@pytest.mark.parametrize(
    ("rows", "shared", "reads"), [([], 4, 0), ([0, 0], 4, 0), ([1, 4, 5, 8], 4, 6), ([3, 0], 1, 3)]
)
def test_an_experts_matrices_are_read_once_for_as_many_rows_as_share_them(rows, shared, reads):
    assert bytes_read(rows, 7, shared=shared) == 7 * reads


def test_512_pairs_on_128_experts_of_a_large_model_read_less_than_half_of_what_they_did():
    """Qwen3-235B: 37.7 MB an expert; 4.83 GB of them all."""
    torch.manual_seed(0)
    rows = torch.bincount(torch.randint(128, (512,)), minlength=128).tolist()
    expert = 3 * 4096 * 1536 * 2
    assert bytes_read(rows, expert, shared=1) == 512 * expert
    assert bytes_read(rows, expert, shared=few.SHARED) < 0.4 * 512 * expert


@pytest.mark.parametrize("shared", [1, 2, 4, 16])
@pytest.mark.parametrize("mean", [0.1, 1.5, 4.0, 12.0])
def test_expected_reads_are_those_of_random_choices(mean, shared):
    torch.manual_seed(0)
    rows = torch.poisson(torch.full((40_000,), mean)).int().tolist()
    assert bytes_read(rows, 1, shared=shared) / len(rows) == pytest.approx(
        expected_reads(mean, shared=shared), rel=0.03
    )


def test_every_row_reads_alone_where_nothing_is_shared():
    assert expected_reads(3.25, shared=1) == pytest.approx(3.25)


def test_the_bound_is_where_the_cache_takes_as_long_as_memory():
    for shared in (1, 2, 4):
        bound = most_rows_per_expert(shared=shared)
        below, above = ((expected_reads(mean, shared=shared), -math.expm1(-mean)) for mean in (bound, bound + 0.5))
        assert below[0] <= CACHE_TO_MEMORY * below[1]
        assert above[0] > CACHE_TO_MEMORY * above[1]


def test_few_tokens_are_taken_as_long_as_they_lose_nothing_in_8_bits_too():
    own = min(most_rows_per_expert(shared=few.SHARED, instructions_to_memory=ratio) for ratio in (math.inf, WIDENED))
    assert own == few.MOST_ROWS_PER_EXPERT
    assert most_rows_per_expert(shared=1) < few.MOST_ROWS_PER_EXPERT
