import numpy as np
import pytest
import torch

from synchromesh.data.crop_views import CropView, places_in, shared
from synchromesh.data.images import Preprocess
from synchromesh.data.photographs import Photographs
from synchromesh.data.view_pairs import ViewData, ViewPairs
from synchromesh.errors import UnreadableError

SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def pairs(folder, photo, **changes):
    paths = tuple(photo(folder / f"{number}.png", size=(60, 80), seed=number) for number in range(3))
    return ViewPairs(ViewData(preprocess=SIZE, colors=None, **changes), Photographs(paths, 3), 5)


def test_a_number_is_the_same_pair_and_a_draw_another(tmp_path, photo):
    own = pairs(tmp_path, photo)
    assert len(own) == 5
    assert torch.equal(own.read(2).first, own.read(2).first)
    assert own.read(2).first_view == own.read(2).first_view
    drawn = own.read(2, lambda: np.random.default_rng(7))
    assert drawn.first_view != own.read(2).first_view
    assert drawn.first_view != drawn.second_view


def test_crops_to_score_on_overlap_and_others_need_not(tmp_path, photo):
    own = pairs(tmp_path, photo, area=(0.02, 0.1))
    fixed = [own.read(number) for number in range(20)]
    assert min(shared(pair.first_view, pair.second_view) for pair in fixed) >= 0.1
    rng = np.random.default_rng(0)
    drawn = [own.read(0, lambda: rng) for _ in range(20)]
    assert min(shared(pair.first_view, pair.second_view) for pair in drawn) == 0


def test_places_of_a_pixel_are_where_both_views_show_the_same_point(tmp_path, photo):
    pair = pairs(tmp_path, photo).read(1)
    row, column = 3, 11
    x, y = pair.places[:, row, column].tolist()

    def point(view, x, y):
        x = 16 - x if view.flipped else x
        return view.left + view.width * x / 16, view.top + view.height * y / 16

    assert point(pair.first_view, column + 0.5, row + 0.5) == pytest.approx(point(pair.second_view, x, y), abs=1e-3)


def test_places_in_itself_are_the_own_pixels():
    view = CropView(3.0, 5.0, 40.0, 30.0, flipped=True)
    y, x = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    torch.testing.assert_close(places_in(view, view, 8), torch.stack([x, y]))


def test_colours_are_drawn_for_each_view(tmp_path, photo):
    plain, coloured = pairs(tmp_path, photo), pairs(tmp_path, photo)
    coloured = ViewPairs(ViewData(preprocess=SIZE), coloured.photographs, 5)
    one, other = plain.read(0), coloured.read(0)
    assert one.first_view == other.first_view
    assert not torch.equal(one.first, other.first)


def test_a_broken_photograph_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UnreadableError, match=r"broken\.png"):
        ViewPairs(ViewData(preprocess=SIZE), Photographs((path,), 3), 1).read(0)


@pytest.mark.parametrize("area", [(0.0, 0.5), (0.6, 0.5), (0.5, 1.2)])
def test_shares_that_make_no_sense_are_refused(area):
    with pytest.raises(ValueError, match="wanted 0 < least"):
        ViewData(area=area)
