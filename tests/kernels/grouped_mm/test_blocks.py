from synchromesh.kernels.grouped_mm.blocks import LEAST_ROWS, Tilings
from synchromesh.kernels.tiles import Tiling

LARGE = Tilings(*[Tiling(128, 256, 64, 8, 3)] * 4)


def test_few_rows_get_lower_tiles_and_the_weights_their_own():
    for rows_per_expert, rows in (
        (1000, 128),
        (65, 128),
        (64, 64),
        (33, 64),
        (32, 32),
        (1, LEAST_ROWS),
        (0, LEAST_ROWS),
    ):
        lowered = LARGE.lowered(rows_per_expert)
        assert {lowered.product.rows, lowered.opening.rows, lowered.closing.rows} == {rows}
        assert lowered.weights == LARGE.weights


def test_lowered_tiles_are_narrow_enough_for_their_warps():
    assert LARGE.lowered(8).product == Tiling(LEAST_ROWS, 128, 64, 4, 3)
    assert LARGE.lowered(64).product == Tiling(64, 128, 64, 8, 3)
