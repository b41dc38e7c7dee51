import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data.depth_maps import DepthMap
from synchromesh.data.images import Preprocess
from synchromesh.data.map_scenes import DepthScene
from synchromesh.data.moves import Fit, RandomMoves
from synchromesh.data.pixel_sources import ReaderPair
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.stereo_pair import StereoPair
from synchromesh.errors import InputError
from synchromesh.models.heads.depth import DepthFPN
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.tasks.depth import Depth, DepthBatch
from synchromesh.tasks.pixels import PixelData
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
PAIR = ReaderPair(StereoPair("train", crops=4), StereoPair("test"))
TASK = Depth(PixelData(PAIR, Preprocess(image_size=32, channels=1)), DepthFPN(width=8, nearest=0.5, farthest=20.0))
TINY = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4, drop_path=0.0)


def scene(size: tuple[int, int] = (32, 32), *, whole: tuple[int, int] | None = None, seed: int = 0) -> DepthScene:
    """A picture of size `whole` with a slope of distances, some unknown, scaled to `size`."""
    rng, whole = np.random.default_rng(seed), whole or size
    metres = np.linspace(1, 9, whole[0] * whole[1], dtype=np.float32).reshape(whole) + seed
    metres[: whole[0] // 4, : whole[1] // 4] = 0
    move, depth = Fit(size=size).move(*whole), DepthMap(metres)
    image = torch.from_numpy(rng.integers(0, 256, (1, *size), dtype=np.uint8))
    return DepthScene(image, depth.moved(move), depth, move=move)


def batch_of(*scenes: DepthScene) -> DepthBatch:
    return TASK.prepare(scenes, {}, CPU, None)


def built() -> Run:
    model = TASK.build(TASK.sized(TINY), {}).eval()
    return Run(model, model)


def saying(*scenes: DepthScene, factor: float = 1.0) -> Run:
    """A run whose model says what is true in the image, times a factor."""
    return Run(torch.nn.Identity(), lambda images, sizes: batch_of(*scenes).depth[: len(images)] * factor)


def test_padding_and_what_is_unknown_counts_in_no_loss() -> None:
    scenes = scene((32, 24)), scene((20, 32), seed=1)
    batch = batch_of(*scenes)
    assert batch.images.shape == (2, 1, 32, 32)
    assert TASK.counts(batch) == {"silog": 32 * 24 - 8 * 6 + 20 * 32 - 5 * 8}
    assert not batch.depth[0, :, 24:].any()
    assert not batch.depth[1, 20:].any()


@torch.no_grad()
def test_counts_and_losses_of_the_parts_of_a_batch_add_up_to_those_of_all() -> None:
    run, batch = built(), batch_of(*(scene(seed=seed) for seed in range(4)))
    parts = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)]
    (term,) = TASK.loss(run, batch).values()
    assert sum(TASK.counts(one)["silog"] for one in parts) == TASK.counts(batch)["silog"] > 0
    assert sum(float(TASK.loss(run, one)["silog"].total) for one in parts) == pytest.approx(float(term.total), rel=1e-4)


def test_a_batch_without_pictures_has_a_loss_that_reaches_every_parameter() -> None:
    run = built()
    sum(term.total for term in TASK.loss(run, batch_of()).values()).backward()
    assert all(one.grad is not None and not one.grad.any() for one in run.model.parameters())
    assert TASK.scorer({}).add(run, batch_of()) == []
    assert TASK.predict(run, batch_of(), {}, Ask()) == []


def test_what_is_true_is_off_by_nothing_and_a_tenth_more_by_a_tenth() -> None:
    scenes = [scene(seed=seed) for seed in range(3)]
    right, more = TASK.scorer({}), TASK.scorer({})
    assert right.add(saying(*scenes), batch_of(*scenes)) == [0, 0, 0]
    assert right.scores([right.state()]).numbers == {"abs_rel": 0, "rmse": 0, "delta1": 1}
    assert more.add(saying(*scenes, factor=1.1), batch_of(*scenes)) == pytest.approx([-0.1] * 3, rel=1e-5)
    found = more.scores([more.state()])
    assert found.numbers["abs_rel"] == pytest.approx(0.1, rel=1e-5)
    assert found.details["errors"].keys() == {"abs_rel", "sq_rel", "rmse", "rmse_log", "delta1", "delta2", "delta3"}
    assert not TASK.numbers[0].more_is_better
    (sheet,) = TASK.panels(found)
    assert len(sheet.rows) == 7


def test_pictures_are_scored_at_their_own_size_without_padding() -> None:
    one, other = scene((16, 32), whole=(40, 80)), scene((32, 16), whole=(64, 32), seed=1)
    one, other = (
        dataclasses.replace(each, truth=DepthMap(np.full_like(each.truth.metres, 3.0))) for each in (one, other)
    )
    found = TASK.found(saying(one, other), batch_of(one, other))
    assert [tuple(each.shape) for each in found] == [(40, 80), (64, 32)]
    assert all(torch.allclose(each, torch.tensor(3.0)) for each in found)  # padding, which says 0, has no part in it
    scorer = TASK.scorer({})
    scorer.add(saying(one, other), batch_of(one, other))
    wanted = [np.mean(np.abs(3 - d) / d) for d in (each.whole.metres[each.whole.metres > 0] for each in (one, other))]
    assert scorer.scores([scorer.state()]).numbers["abs_rel"] == pytest.approx(np.mean(wanted), rel=1e-5)


@torch.no_grad()
def test_the_scores_of_ranks_are_those_of_all_pictures() -> None:
    batch, run = batch_of(*(scene(whole=(40, 48), seed=seed) for seed in range(5))), built()
    whole, ranks = TASK.scorer({}), [TASK.scorer({}) for _ in range(3)]
    whole.add(run, batch)
    for rank, (start, stop) in zip(ranks, [(0, 2), (2, 5), (5, 5)], strict=True):
        rank.add(run, batch.part(start, stop))
    got, wanted = ranks[0].scores([one.state() for one in ranks]), whole.scores([whole.state()])
    assert got.numbers == pytest.approx(wanted.numbers, rel=1e-5)
    assert wanted.numbers["abs_rel"] > 0


def test_distances_out_of_range_are_not_scored_and_none_at_all_is_an_error_that_says_so() -> None:
    near = dataclasses.replace(TASK, nearest=2.0, farthest=3.0)
    one = scene()
    scorer = near.scorer({})
    scorer.add(saying(one, factor=50.0), batch_of(one))
    metres = one.whole.metres[(one.whole.metres >= 2) & (one.whole.metres <= 3)]
    assert scorer.scores([scorer.state()]).numbers["abs_rel"] == pytest.approx(np.mean(3 / metres - 1), rel=1e-4)
    far = dataclasses.replace(TASK, nearest=100.0).scorer({})
    assert far.add(saying(one), batch_of(one)) == [0]
    with pytest.raises(InputError, match="no picture to score on"):
        far.scores([far.state()])
    with pytest.raises(ValueError, match="wanted 0 < least < most"):
        dataclasses.replace(TASK, nearest=5.0, farthest=4.0)


def test_composed_scenes_are_refused_since_they_have_no_distances() -> None:
    with pytest.raises(ValueError, match="have no distances"):
        Depth(PixelData(ComposedScenes()))


@torch.no_grad()
def test_a_file_of_any_size_is_answered_in_its_own_pixels(photo, tmp_path) -> None:
    sample = TASK.open(photo(tmp_path / "wide.png", size=(128, 64)))
    assert sample.image.shape == (1, 16, 32)
    (answer,) = TASK.predict(built(), batch_of(sample), {}, Ask())
    assert answer.seen.shape == (64, 128)
    assert answer.said["height"] == 64
    assert 0.5 <= answer.said["nearest"] <= answer.said["median"] <= answer.said["farthest"] <= 20
    assert answer.said["farthest"] == pytest.approx(float(answer.seen.max()), abs=1e-4)
    assert list(TASK.cells(answer)) == ["nearest, m", "median, m", "farthest, m"]
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(sample, answer))))
    assert drawn.shape == (128 + 22, 2 * 256 + 6, 3)


def test_the_picture_shows_what_was_found_beside_what_is_true_near_ones_brighter() -> None:
    one = scene((96, 192))
    (answer,) = TASK.predict(saying(one), batch_of(one), {}, Ask())
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(one, answer)))).astype(int)[:96]
    found, true = drawn[:, 198:390], drawn[:, 396:]
    known = one.whole.metres > 0
    assert (found == true)[known].all()
    assert (true[~known] == 128).all()
    rows = true.sum(2)[:, -1]
    assert (np.diff(rows) <= 0).all()
    assert rows[0] - rows[-1] > 400


def test_the_stereo_pair_is_learnt_left_and_scored_right() -> None:
    moves = RandomMoves(sizes=((32, 32),), scale=(3.0, 4.0))
    task = dataclasses.replace(TASK, data=dataclasses.replace(TASK.data, moves=moves))
    splits = task.splits(seed=0)
    assert (len(splits.train), len(splits.test)) == (4, 8)
    batch = task.prepare([splits.train.read(0, lambda: np.random.default_rng(0))], {}, CPU, np.random.default_rng(0))
    assert batch.images.shape == (1, 1, 32, 32)
    assert batch.wholes == (None,)
    assert task.counts(batch)["silog"] > 500
    test = splits.test.read(0)
    assert (test.image.shape, test.whole.metres.shape) == ((1, 32, 32), (120, 120))


def test_a_folder_of_16_bit_files_is_learnt_from_and_scored_on(photo, tmp_path) -> None:
    (tmp_path / "depth").mkdir()
    for number in range(3):
        photo(tmp_path / "images" / f"{number}.png", size=(48, 40), seed=number)
        Image.fromarray(np.full((40, 48), 2500, dtype=np.uint16)).save(tmp_path / "depth" / f"{number}.png")
    task = TASK.reading(tmp_path)
    splits = task.splits(seed=0)
    assert (len(splits.train), len(splits.test)) == (2, 1)
    batch = task.prepare([splits.test.read(0)], {}, CPU, None)
    assert batch.depth[0, :27, :32].unique().tolist() == [2.5]
    assert len(task.scored_on(tmp_path, {})) == 3
