import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from synchromesh.data.moves import MOST_SIZES, Fit, Move, RandomMoves
from synchromesh.data.regions import RunLengths


@st.composite
def moves(draw: st.DrawFn, scales: tuple[float, float] = (0.05, 8.0)) -> Move:
    """Any scale, offset and mirror image, of a picture to a crop that may show all of it, a part, or little."""
    sides = st.integers(1, 60)
    source, size = (draw(sides), draw(sides)), (draw(sides), draw(sides))
    scale = draw(st.floats(*scales)), draw(st.floats(*scales))
    offset = draw(st.floats(-50, 50)), draw(st.floats(-50, 50))
    return Move(source, size, scale, offset, draw(st.booleans()))


coordinates = st.floats(-100, 100)


@given(moves(), st.lists(st.tuples(coordinates, coordinates), max_size=5))
def test_a_move_and_its_inverse_give_back_points_and_boxes(move: Move, corners: list[tuple[float, float]]) -> None:
    points = np.array(corners, dtype=np.float64).reshape(-1, 2)
    back = move.inverse()
    assert np.allclose(back.points(move.points(points)), points, atol=1e-6)
    assert (back.inverse().source, back.inverse().size) == (move.source, move.size)
    assert np.allclose(back.inverse().points(points), move.points(points), atol=1e-6)
    boxes = torch.from_numpy(np.concatenate([points, points + 3], axis=1))
    assert torch.allclose(back.boxes(move.boxes(boxes)), boxes, atol=1e-6)


@given(moves(), st.tuples(coordinates, coordinates), st.floats(0.1, 50), st.floats(0.1, 50))
def test_a_box_is_moved_as_its_corners_are(
    move: Move, corner: tuple[float, float], width: float, height: float
) -> None:
    x, y = corner
    corners = move.points(np.array([[x, y], [x + width, y + height]]))
    wanted = [*corners.min(axis=0), *corners.max(axis=0)]
    box = move.boxes(torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64))
    assert np.allclose(box[0].numpy(), wanted, atol=1e-6)


@given(moves(), moves())
def test_two_moves_in_a_row_are_one(first: Move, second: Move) -> None:
    second = dataclasses.replace(second, source=first.size)
    points = np.array([[0.0, 0.0], [3.0, 7.0], [-5.0, 20.0]])
    assert np.allclose(first.then(second).points(points), second.points(first.points(points)), atol=1e-4)


def labels_by_loops(move: Move, values: np.ndarray, outside: int) -> np.ndarray:
    """The definition: each pixel of the crop has the value that lies under its middle."""
    found, back = np.full(move.size, outside, dtype=values.dtype), move.inverse()
    for row, column in np.ndindex(move.size):
        x, y = np.floor(back.points(np.array([column + 0.5, row + 0.5]))).astype(int)
        if 0 <= y < move.source[0] and 0 <= x < move.source[1]:
            found[row, column] = values[y, x]
    return found


@given(moves())
def test_a_pixel_of_a_moved_map_has_the_value_under_its_middle(move: Move) -> None:
    values = np.random.default_rng(0).integers(0, 200, move.source).astype(np.uint8)
    differ = move.labels(values, outside=255) != labels_by_loops(move, values, 255)
    assert differ.mean() < 0.05  # a middle may lie on an edge, to the last digit
    metres = values.astype(np.float32)
    assert np.array_equal(move.depth(metres), move.labels(metres, outside=0))


def test_values_lie_where_they_belong_in_a_cut_mirrored_and_enlarged_map() -> None:
    values = np.array([[1, 2, 3], [4, 5, 6]])
    move = Move((2, 3), (4, 5), scale=(2.0, 2.0), offset=(-2.0, 0.0), flip=True)
    assert move.labels(values, outside=9).tolist() == [
        [9, 3, 3, 2, 2],
        [9, 3, 3, 2, 2],
        [9, 6, 6, 5, 5],
        [9, 6, 6, 5, 5],
    ]
    seen = move.pixels(Image.fromarray(values.astype(np.uint8) * 40))
    assert seen[0, 0].tolist()[0] == 0  # black where there is no picture


@given(moves(), st.data())
def test_the_box_of_a_moved_mask_is_the_moved_box_to_a_pixel(move: Move, data: st.DataObject) -> None:
    height, width = move.source
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    mask = np.zeros(move.source, dtype=bool)
    mask[top:bottom, left:right] = True
    moved = RunLengths.of(mask).moved(move)
    assert np.array_equal(moved, move.labels(mask, outside=0))
    box = move.boxes(torch.tensor([[left, top, right, bottom]], dtype=torch.float64))[0].numpy()
    wanted = box.clip(0, [move.size[1], move.size[0]] * 2)
    rows, columns = moved.any(1).nonzero()[0], moved.any(0).nonzero()[0]
    if len(rows):
        hull = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(hull - wanted).max() <= 1
    else:
        assert min(wanted[2] - wanted[0], wanted[3] - wanted[1]) <= 1


def bright_box(pixels: torch.Tensor) -> tuple[float, float, float, float]:
    """The sides of what is bright, to parts of a pixel: the middle of each profile, and half of its sum around."""
    shown = pixels[0].double() / 255
    sides = []
    for profile in (shown.max(0).values, shown.max(1).values):
        profile = profile / profile.max()
        middle = float((profile * (torch.arange(len(profile)) + 0.5)).sum() / profile.sum())
        sides.append((middle - float(profile.sum()) / 2, middle + float(profile.sum()) / 2))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


@given(
    st.floats(0.05, 8.0),
    st.floats(0.05, 8.0),
    st.booleans(),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(8, 60),
)
def test_bright_pixels_lie_in_their_moved_box(x: float, y: float, flip: bool, left: int, top: int, side: int) -> None:
    picture = np.zeros((100, 120), dtype=np.uint8)
    box = (20 + left, 8 + top, 20 + left + side, min(92, 8 + top + side))
    picture[box[1] : box[3], box[0] : box[2]] = 255
    # A part of the picture that has the whole square, cut somewhere inside of a pixel.
    move = Move((100, 120), (max(1, round(90 * y)), max(1, round(110 * x))), (x, y), (-5.3 * x, -3.6 * y), flip)
    seen = move.pixels(Image.fromarray(picture))
    wanted = move.boxes(torch.tensor([box], dtype=torch.float64))[0]
    assert tuple(seen.shape[1:]) == move.size
    if bool(((wanted[2:] - wanted[:2]) >= 1).all()):
        assert np.abs(np.array(bright_box(seen)) - wanted.numpy()).max() <= 0.5


def test_pixels_that_are_not_scaled_are_those_of_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    cut = Move((9, 7), (4, 5), offset=(-2.0, -3.0)).pixels(Image.fromarray(picture))
    assert np.array_equal(cut.permute(1, 2, 0).numpy(), picture[3:7, 2:7])
    mirrored = Move((9, 7), (9, 7), flip=True).pixels(Image.fromarray(picture))
    assert np.array_equal(mirrored.permute(1, 2, 0).numpy(), picture[:, ::-1])
    around = Move((9, 7), (12, 12), offset=(3.0, 2.0)).pixels(Image.fromarray(picture))
    assert np.array_equal(around[:, 2:11, 3:10].permute(1, 2, 0).numpy(), picture)
    assert int(around.sum()) == int(picture.sum())
    gone = Move((9, 7), (4, 4), offset=(50.0, 0.0)).pixels(Image.fromarray(picture))
    assert not gone.any()


def test_shrunk_pixels_are_means_of_what_they_cover() -> None:
    picture = np.tile(np.array([[0, 255], [255, 0]], dtype=np.uint8), (32, 32))
    seen = Move((64, 64), (8, 8), scale=(0.125, 0.125)).pixels(Image.fromarray(picture))
    assert (seen.float() - 127.5).abs().max() < 8  # one pixel of each square would be black or white


def test_a_map_or_an_image_of_another_size_is_refused() -> None:
    move = Move.none(4, 6)
    with pytest.raises(ValueError, match=r"the map has \(6, 4\) pixels"):
        move.labels(np.zeros((6, 4)), outside=0)
    with pytest.raises(ValueError, match=r"the image has \(6, 4\) pixels"):
        move.pixels(Image.new("L", (4, 6)))
    with pytest.raises(ValueError, match="the second move"):
        move.then(Move.none(6, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": (0, 4)},
        {"scale": (0.0, 1.0)},
        {"scale": (float("nan"), 1.0)},
        {"scale": (float("inf"), 1.0)},
        {"offset": (0.0, float("inf"))},
    ],
)
def test_a_move_that_cannot_be_undone_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="wanted"):
        Move(**{"source": (4, 4), "size": (4, 4), **wrong})


@given(
    st.integers(1, 500), st.integers(1, 500), st.integers(0, 1000), st.tuples(st.integers(1, 99), st.integers(1, 99))
)
def test_a_drawn_crop_lies_in_the_picture_and_fills_as_much_as_it_can(
    height: int, width: int, seed: int, size: tuple[int, int]
) -> None:
    moves = RandomMoves(sizes=(size,), scale=(0.1, 3.0))
    move = moves.draw(height, width, np.random.default_rng(seed))
    assert move.source == (height, width)
    whole = move.boxes(torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64))[0].round(decimals=6).tolist()
    for shown, most, (first, last) in zip(move.size, size, ((whole[1], whole[3]), (whole[0], whole[2])), strict=True):
        assert first <= 0 < shown <= last  # no black around
        assert shown == min(most, round(last - first))
        assert first == round(first)  # so that its edges are those of pixels
    assert moves.draw(height, width, np.random.default_rng(seed)) == move


def test_every_part_of_a_picture_every_scale_and_both_sides_are_drawn() -> None:
    rng = np.random.default_rng(0)
    drawn = [RandomMoves(sizes=((10, 10),), scale=(1.0, 4.0)).draw(100, 100, rng) for _ in range(300)]
    assert {move.flip for move in drawn} == {True, False}
    factors = [10 * move.scale[0] for move in drawn]
    assert 0.9 <= min(factors) < 1.2
    assert 3.8 < max(factors) <= 4.1
    largest = [move for move in drawn if move.scale[0] > 0.35]
    assert {0.0, -float(round(largest[0].scale[0] * 100) - 10)} & {move.offset[0] for move in largest}


def test_a_batch_may_ask_for_another_size() -> None:
    moves = RandomMoves(sizes=((8, 8), (16, 16), (12, 12)), scale=(1.0, 1.0))
    assert moves.draw(40, 40, np.random.default_rng(0)).size == (16, 16)
    assert moves.draw(40, 40, np.random.default_rng(0), (12, 12)).size == (12, 12)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"sizes": ((8, 8),) * (MOST_SIZES + 1)}, "6 sizes"),
        ({"sizes": ()}, "0 sizes"),
        ({"sizes": ((8, 0),)}, "sizes"),
        ({"scale": (2.0, 1.0)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"flip": 1.5}, "flip"),
        ({"least_visible": -0.1}, "least_visible"),
    ],
)
def test_random_moves_that_make_no_sense_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RandomMoves(**wrong)


@pytest.mark.parametrize(
    ("fit", "size"),
    [
        (Fit(longer=50), (25, 50)),
        (Fit(shorter=50), (50, 100)),
        (Fit(shorter=800, longer=1333), (666, 1333)),
        (Fit(shorter=30, longer=1333), (30, 60)),
        (Fit(size=(7, 9)), (7, 9)),
    ],
)
def test_a_picture_is_scaled_to_what_is_asked(fit: Fit, size: tuple[int, int]) -> None:
    move = fit.move(100, 200)
    assert move.size == size
    whole = move.boxes(torch.tensor([[0.0, 0.0, 200.0, 100.0]], dtype=torch.float64))[0]
    assert torch.allclose(whole, torch.tensor([0.0, 0.0, size[1], size[0]], dtype=torch.float64))


@pytest.mark.parametrize("wrong", [{}, {"longer": 0}, {"size": (4, 4), "longer": 8}])
def test_a_fit_without_one_meaning_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="give"):
        Fit(**wrong)
