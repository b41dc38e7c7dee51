import pytest
import torch

from synchromesh.models.heads.pixels import PixelDecoder, hidden_positions, masked_l1, shuffled
from synchromesh.models.swin_v2 import SwinV2Config

TINY = SwinV2Config(
    image_size=16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=2, window_size=4, mask_token=True
)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_position_is_hidden_where_it_sees_one_hidden_pixel(height, width, stride) -> None:
    hidden = torch.rand(3, height, width) < 0.1
    found = hidden_positions(hidden, stride)
    rows, columns = -(-height // stride), -(-width // stride)
    expected = [
        [
            bool(own[r * stride : (r + 1) * stride, c * stride : (c + 1) * stride].any())
            for r in range(rows)
            for c in range(columns)
        ]
        for own in hidden
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("size", [(16, 16), (13, 19)])
def test_a_picture_of_any_size_is_drawn_at_its_own_size(size) -> None:
    model = PixelDecoder(TINY.build(), 3)
    images, hidden = torch.randn(2, 3, *size), torch.rand(2, *size) < 0.3
    assert model(images, hidden).shape == images.shape
    assert model(images[:0], hidden[:0]).shape == (0, 3, *size)


def test_what_is_hidden_is_not_seen() -> None:
    model = PixelDecoder(TINY.build(), 3).eval()
    images, hidden = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    hidden[:, 4:8, 6:12] = True
    other = torch.where(hidden[:, None], torch.randn_like(images), images)
    assert torch.equal(model(images, hidden), model(other, hidden))
    assert not torch.equal(model(images, hidden), model(images))


def test_only_hidden_pixels_are_compared() -> None:
    drawn, images = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    hidden[1, 2, 3] = True
    assert masked_l1(drawn, images, hidden).item() == pytest.approx(
        float((drawn - images)[1, :, 2, 3].abs().sum()), rel=1e-6
    )
    assert masked_l1(drawn, images, hidden & False) == 0
    half = masked_l1(drawn.bfloat16(), images.bfloat16(), hidden)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("side", [1, 2, 4])
def test_channels_become_pixels_as_in_torch_and_a_batch_without_images_learns_too(side) -> None:
    x = torch.randn(2, 3 * side**2, 5, 4, requires_grad=True)
    assert torch.equal(shuffled(x, side), torch.nn.functional.pixel_shuffle(x, side))
    none = x[:0]
    shuffled(none, side).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
