import math
import statistics
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synchromesh.data.scores.depth import DepthErrors, DisparityErrors, PixelErrors

DEPTH = ("abs_rel", "sq_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3")


def random_picture(seed: int, *, height: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    """Depths of 0.5 to 20 of which some are unknown, as 0 or as infinite, and what was found, of any sign."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(height, width, generator=generator) * 19.5 + 0.5
    found = truth * torch.exp(torch.randn(height, width, generator=generator) * 0.4)
    lots = torch.rand(height, width, generator=generator)
    truth[lots < 0.1], truth[(lots >= 0.1) & (lots < 0.2)] = 0, math.inf
    found[lots > 0.95] *= -1
    return truth, found


def by_loops(truth: Tensor, found: Tensor, *, least: float, most: float, scaled: bool) -> dict[str, float]:
    pairs = zip(truth.flatten().tolist(), found.flatten().tolist(), strict=True)
    pairs = [(d, other) for d, other in pairs if least <= d <= most and d != math.inf]
    factor = statistics.median([d for d, _ in pairs]) / statistics.median([o for _, o in pairs]) if scaled else 1
    pairs = [(d, min(max(factor * other, least), most)) for d, other in pairs]
    count = len(pairs)
    share = [sum(max(d / o, o / d) < 1.25**power for d, o in pairs) / count for power in (1, 2, 3)]
    numbers = (
        sum(abs(d - o) / d for d, o in pairs) / count,
        sum((d - o) ** 2 / d for d, o in pairs) / count,
        math.sqrt(sum((d - o) ** 2 for d, o in pairs) / count),
        math.sqrt(sum((math.log(d) - math.log(o)) ** 2 for d, o in pairs) / count),
        *share,
    )
    return dict(zip(DEPTH, numbers, strict=True))


def added(errors: PixelErrors, pictures: Sequence[tuple[Tensor, Tensor]]) -> Mapping[str, float | None]:
    for truth, found in pictures:
        errors.add(truth, found)
    return errors.numbers([errors.state()])


@given(st.integers(0, 10_000), st.sampled_from([math.inf, 12.0]), st.booleans())
@settings(max_examples=30)
def test_errors_of_depth_are_their_definitions_and_means_over_pictures(seed: int, most: float, scaled: bool) -> None:
    pictures = [random_picture(seed), random_picture(seed + 1, height=3, width=12)]
    each = [by_loops(*one, least=0.01, most=most, scaled=scaled) for one in pictures]
    got = added(DepthErrors(least=0.01, most=most, median_scaling=scaled), pictures)
    assert got == pytest.approx({name: (each[0][name] + each[1][name]) / 2 for name in DEPTH})


@given(st.integers(0, 10_000))
@settings(max_examples=10)
def test_errors_of_disparity_are_their_definitions_and_means_over_pictures(seed: int) -> None:
    pictures = [random_picture(seed), random_picture(seed + 1, height=3, width=12)]
    wanted = dict.fromkeys(("epe", "bad1", "bad2", "bad3"), 0.0)
    for truth, found in pictures:
        pairs = zip(truth.flatten().tolist(), found.flatten().tolist(), strict=True)
        off = [abs(d - o) for d, o in pairs if d != math.inf]
        wanted["epe"] += sum(off) / len(off) / 2
        for limit in (1, 2, 3):
            wanted[f"bad{limit}"] += 100 * sum(one > limit for one in off) / len(off) / 2
    assert added(DisparityErrors(), pictures) == pytest.approx(wanted)


def test_a_picture_that_is_right_but_for_its_scale_is_right_after_scaling() -> None:
    truth, _ = random_picture(4)
    errors = DepthErrors(median_scaling=True)
    own = errors.add(truth, 7 * truth.nan_to_num(posinf=3.0))
    assert own == pytest.approx(dict(zip(DEPTH, (0, 0, 0, 0, 1, 1, 1), strict=True)), abs=1e-6)
    assert DepthErrors().add(truth, 7 * truth)["abs_rel"] == pytest.approx(6)


def test_pixels_that_are_hidden_change_nothing() -> None:
    truth, found = random_picture(1)
    valid = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    other = torch.where(valid, found, 99.0)
    for errors in (DepthErrors(), DisparityErrors()):
        assert errors.add(truth, found, valid) == errors.add(truth, other, valid)
        assert errors.add(truth, found, valid) != errors.add(truth, found)


@pytest.mark.parametrize("kind", [DepthErrors, DisparityErrors])
def test_the_numbers_of_ranks_are_those_of_all_pictures(kind: type[DepthErrors | DisparityErrors]) -> None:
    pictures = [random_picture(seed, height=3 + seed) for seed in range(5)]
    wanted = added(kind(), pictures)
    for parts in ((pictures[:2], pictures[2:]), ([], pictures[3:], pictures[:3])):
        ranks = [kind() for _ in parts]
        for rank, own in zip(ranks, parts, strict=True):
            added(rank, own)
        assert ranks[0].numbers([rank.state() for rank in ranks]) == pytest.approx(wanted)


def test_a_picture_without_a_known_pixel_does_not_count_and_no_picture_is_no_number() -> None:
    truth, found = random_picture(2)
    errors, nothing = DepthErrors(), torch.zeros(5, 7)
    assert set(errors.numbers([errors.state()]).values()) == {None}
    own = errors.add(truth, found)
    assert errors.add(nothing, found) == errors.add(truth, found, nothing > 0) == {}
    assert errors.numbers([errors.state()]) == own


def test_what_is_not_a_number_makes_no_good_score() -> None:
    truth, found = torch.ones(2, 2), torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    depth, disparity = DepthErrors().add(truth, found), DisparityErrors().add(truth, found)
    assert all(math.isnan(depth[name]) for name in ("abs_rel", "sq_rel", "rmse", "rmse_log"))
    assert (depth["delta3"], disparity["bad3"]) == (0.75, 25)
    assert math.isnan(disparity["epe"])


def test_other_sizes_and_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[1, 4\] pixels, wanted the picture's \[2, 2\]"):
        DepthErrors().add(torch.ones(2, 2), torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"got \[1, 2\] pixels, wanted the picture's \[2, 2\]"):
        DisparityErrors().add(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 2, dtype=torch.bool))
    for least, most in ((0.0, 1.0), (2.0, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="wanted 0 < least < most"):
            DepthErrors(least=least, most=most)
