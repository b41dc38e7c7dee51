import math

import pytest
import torch

from synchromesh.models.box_coder import MOST_GROWTH, BoxCoder

STD = (0.1, 0.1, 0.2, 0.2)


def random_boxes(count: int) -> torch.Tensor:
    corners = torch.rand(count, 2) * 100
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * 60], dim=1)


def test_deltas_are_those_of_the_formula() -> None:
    boxes, wanted = random_boxes(5), random_boxes(5)
    for got, a, b in zip(BoxCoder(STD).encode(boxes, wanted), boxes.tolist(), wanted.tolist(), strict=True):
        width, height = a[2] - a[0], a[3] - a[1]
        expected = [
            ((b[0] + b[2]) / 2 - (a[0] + a[2]) / 2) / width / 0.1,
            ((b[1] + b[3]) / 2 - (a[1] + a[3]) / 2) / height / 0.1,
            math.log((b[2] - b[0]) / width) / 0.2,
            math.log((b[3] - b[1]) / height) / 0.2,
        ]
        assert got.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("std", [STD, (1.0, 1.0, 1.0, 1.0), (0.033, 0.033, 0.067, 0.067)])
def test_decoding_undoes_encoding(std: tuple[float, float, float, float]) -> None:
    boxes, wanted = random_boxes(20), random_boxes(20)
    coder = BoxCoder(std)
    torch.testing.assert_close(coder.decode(boxes, coder.encode(boxes, wanted)), wanted, atol=1e-3, rtol=1e-5)


def test_a_wild_output_grows_a_box_by_a_thousand_sixteenths_and_no_more() -> None:
    box, deltas = torch.tensor([[0.0, 0, 16, 32]]), torch.tensor([[0.0, 0, 1e4, -1e4]])
    grown = BoxCoder().decode(box, deltas)[0]
    assert float(grown[2] - grown[0]) == pytest.approx(1000, rel=1e-5)
    assert float(grown[3] - grown[1]) == pytest.approx(32 * 16 / 1000, rel=1e-4)
    assert pytest.approx(62.5) == math.exp(MOST_GROWTH)


def test_half_precision_outputs_give_boxes_in_float32() -> None:
    boxes = torch.tensor([[1200.0, 700, 1333, 800]])
    got = BoxCoder().decode(boxes, torch.zeros(1, 4, dtype=torch.bfloat16))
    assert got.dtype == torch.float32
    assert torch.equal(got, boxes)


def test_the_gradient_of_decoding_is_that_of_differences() -> None:
    boxes = random_boxes(3).double()
    deltas = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: BoxCoder(STD).decode(boxes, x), (deltas,))
