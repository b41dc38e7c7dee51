from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synchromesh.data import files, images
from synchromesh.data.images import MemoryImages, Preprocess, RandomCrop, decode_image
from synchromesh.errors import InputError

GREY = Preprocess(image_size=8)
COLOUR = Preprocess(image_size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("preprocess", [GREY, COLOUR])
def test_every_format_and_mode_gives_the_wanted_channels(
    tmp_path: Path, photo: Callable[..., Path], suffix: str, mode: str, preprocess: Preprocess
) -> None:
    pixels = decode_image(photo(tmp_path / f"a{suffix}", mode=mode), preprocess)
    assert pixels.shape == (preprocess.channels, 8, 8)
    assert pixels.dtype == torch.uint8


def test_a_picture_of_the_wanted_size_is_left_as_it_is(tmp_path: Path, photo: Callable[..., Path]) -> None:
    path = photo(tmp_path / "a.png", size=(8, 8), mode="L")
    assert torch.equal(decode_image(path, GREY)[0], torch.from_numpy(np.array(Image.open(path))))


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    wanted = torch.from_numpy(np.rot90(np.array(image), -1).copy())
    assert torch.equal(decode_image(tmp_path / "turned.png", GREY)[0], wanted)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    got = decode_image(tmp_path / "deep.png", GREY)[0]
    assert np.abs(got.numpy().astype(int) - np.round(pixels / 257.0)).max() <= 1


def test_transparent_pixels_become_black(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 4), 255, dtype=np.uint8)
    pixels[:4, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    got = decode_image(tmp_path / "clear.png", GREY)[0]
    assert got[:4].max() == 0
    assert got[4:].min() == 255


@pytest.mark.parametrize("content", [b"", b"not a picture", b"GIF89a" + bytes(40), b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_a_corrupt_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the image .*broken\.png"):
        decode_image(path, GREY)


def test_a_truncated_jpeg_is_named(tmp_path: Path, photo: Callable[..., Path]) -> None:
    path = photo(tmp_path / "cut.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.jpg"):
        decode_image(path, COLOUR)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.png"):
        decode_image(tmp_path / "nowhere.png", GREY)


def test_a_wide_picture_is_cropped_in_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert decode_image(tmp_path / "wide.png", GREY).min() == 200


def test_memory_and_file_agree_on_a_resized_picture(tmp_path: Path, photo: Callable[..., Path]) -> None:
    path = photo(tmp_path / "a.png", size=(20, 20), mode="L")
    pixels = torch.from_numpy(np.array(Image.open(path)))[None, None]
    memory = MemoryImages(torch.tensor([0]), ("a",), GREY, pixels).read(0)
    assert (memory.int() - decode_image(path, GREY).int()).abs().max() <= 2


def test_a_random_crop_stays_inside_and_has_the_wanted_area() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = RandomCrop(scale=(0.2, 0.9)).box(40, 60, rng)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        assert 0.15 < (right - left) * (bottom - top) / 2400 < 0.95


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"channels": 2}, "channels is 2"),
        ({"mean": (0.5, 0.5)}, "mean has 2 numbers"),
        ({"image_size": 0}, "image_size 0"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Preprocess(**fields)  # pyright: ignore[reportArgumentType]


def test_prepared_images_are_what_reading_gives() -> None:
    pixels = torch.randint(0, 256, (5, 1, 12, 16), dtype=torch.uint8)
    preprocess = Preprocess(image_size=8, crop_ratio=0.75)
    images = MemoryImages(torch.arange(5), tuple("abcde"), preprocess, pixels)
    prepared = images.prepared()
    assert prepared.images.shape == (5, 1, 8, 8)
    assert all(torch.equal(prepared.read(i), images.read(i)) for i in range(5))
    assert prepared.prepared() is prepared


def smooth_photo(path: Path, height: int, width: int) -> Path:
    y, x = np.mgrid[0:height, 0:width] / 200
    pixels = np.stack([np.sin(x + y), np.cos(x - y), np.sin(x * y / 3)], axis=2) * 110 + 128
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    return path


@pytest.mark.parametrize(("height", "width", "times"), [(1600, 1200, 8), (1000, 700, 4), (300, 260, 1), (90, 120, 1)])
def test_a_large_part_of_a_jpeg_is_decoded_smaller_and_hardly_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, width: int, times: int
) -> None:
    path = smooth_photo(tmp_path / "a.jpg", height, width)
    preprocess = Preprocess(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    decoded: list[tuple[int, int]] = []
    original = files.read_picture

    def watched(*given: object, **named: object) -> Image.Image:
        image = original(*given, **named)  # pyright: ignore[reportArgumentType]
        decoded.append((image.height, image.width))
        return image

    monkeypatch.setattr(images, "read_picture", watched)
    for seed in range(6):
        crop = RandomCrop(scale=(0.8, 1.0))
        found = decode_image(path, preprocess, (crop, np.random.default_rng(seed)))
        # By the definition: the whole picture, cut and scaled.
        box = crop.box(height, width, np.random.default_rng(seed))
        whole = Image.open(path).resize((64, 64), Image.Resampling.BICUBIC, box=box)
        wanted = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
        assert (found.float() - wanted.float()).abs().mean() < (1.5 if times > 1 else 0.6)
    assert all(height / (2 * times) - 1 <= size[0] <= height for size in decoded)
    assert (decoded[0][0] < height) == (times > 1)


def test_a_small_part_of_a_jpeg_is_decoded_whole(tmp_path: Path) -> None:
    path = smooth_photo(tmp_path / "a.jpg", 800, 800)
    preprocess = Preprocess(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    crop = RandomCrop(scale=(0.02, 0.05), ratio=(1.0, 1.0))
    found = decode_image(path, preprocess, (crop, np.random.default_rng(0)))
    box = crop.box(800, 800, np.random.default_rng(0))
    whole = Image.open(path).resize((64, 64), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    assert torch.equal(found, torch.from_numpy(np.array(whole)).permute(2, 0, 1))


def test_a_random_part_of_a_turned_picture_is_a_part_of_it_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.open(smooth_photo(tmp_path / "a.jpg", 600, 900))
    lying.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    Image.open(tmp_path / "turned.jpg").transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    preprocess = Preprocess(image_size=32, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    for seed in range(4):
        turned, upright = (
            decode_image(tmp_path / name, preprocess, (RandomCrop(), np.random.default_rng(seed))).float()
            for name in ("turned.jpg", "upright.png")
        )
        assert (turned - upright).abs().mean() < 3
