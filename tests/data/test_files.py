"""Every kind of picture that Pillow reads has one scale, in grey and in colour, whatever the picture holds."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from synchromesh.data.files import OTHER_SUFFIXES, SUFFIXES, pictures_in, read_picture
from synchromesh.errors import UnreadableError

VALUES = (0, 1, 255, 256, 257, 4095, 32768, 65535)


def level(value: float, top: float) -> int:
    return round(value / top * 255)


def mode(path: Path) -> str:
    with Image.open(path) as opened:
        return opened.mode


def read(path: Path, channels: int = 1) -> np.ndarray:
    return np.asarray(read_picture(path, channels))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_png(path: Path, rows: np.ndarray, *, colour_type: int, transparent: bytes = b"") -> Path:
    """Write 16-bit values [H, W, C] as no writer of Pillow's does."""
    height, width, _ = rows.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in rows)
    clear = chunk(b"tRNS", transparent) if transparent else b""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    body = header + clear + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def write_tiff(path: Path, content: bytes, size: tuple[int, int], **tags: int | tuple[int, ...]) -> Path:
    """Write one strip of grey in the little-endian form; tags by name."""
    width, height = size
    known = {"bits": 258, "photometric": 262, "orientation": 274, "sample_format": 339}
    entries = {256: width, 257: height, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(content)}
    entries |= {known[name]: value for name, value in tags.items()}
    listed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    directory = struct.pack("<H", len(entries)) + listed + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(content)) + content + directory)
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_has_one_scale(tmp_path, suffix, value, channels):
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / f"a{suffix}")
    got = read(tmp_path / f"a{suffix}", channels)
    assert got.shape == ((4, 4) if channels == 1 else (4, 4, 3))
    assert np.unique(got).tolist() == [level(value, 65535)]


def test_16_bit_grey_in_the_other_order_of_bytes(tmp_path):
    image = Image.frombytes("I;16B", (8, 1), np.array([VALUES], ">u2").tobytes())
    image.save(tmp_path / "a.tiff")
    assert mode(tmp_path / "a.tiff") == "I;16B"
    assert read(tmp_path / "a.tiff")[0].tolist() == [level(value, 65535) for value in VALUES]


def test_16_bit_grey_of_a_portable_map(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 8 1 65535\n" + np.array([VALUES], ">u2").tobytes())
    assert mode(tmp_path / "a.pgm") == "I"
    assert read(tmp_path / "a.pgm")[0].tolist() == [level(value, 65535) for value in VALUES]


def test_16_bit_grey_that_counts_from_white(tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.array(VALUES, "<u2").tobytes(), (8, 1), bits=16, photometric=0)
    assert read(path)[0].tolist() == [255 - level(value, 65535) for value in VALUES]
    path = write_tiff(tmp_path / "b.tif", bytes((0, 1, 254, 255)), (4, 1), bits=8, photometric=0)
    assert read(path)[0].tolist() == [255, 254, 1, 0]  # which Pillow does by itself


def test_12_bit_grey_has_its_own_white(tmp_path):
    path = write_tiff(tmp_path / "a.tif", bytes.fromhex("fff000 7ff800"), (4, 1), bits=12)
    assert read(path)[0].tolist() == [255, 0, level(0x7FF, 4095), level(0x800, 4095)]


@pytest.mark.parametrize("colour_type", [2, 6])
def test_16_bit_colour_keeps_the_upper_bits(tmp_path, colour_type):
    rows = np.array([[(*VALUES[:3], 65535), (*VALUES[3:6], 65535), (*VALUES[6:], 0, 65535)]])
    path = write_png(tmp_path / "a.png", rows[:, :, : 3 if colour_type == 2 else 4], colour_type=colour_type)
    assert read(path, 3).tolist() == [[[value >> 8 for value in pixel[:3]] for pixel in rows[0]]]


def test_16_bit_grey_with_alpha_is_flattened_on_black(tmp_path):
    path = write_png(tmp_path / "a.png", np.array([[(65535, 65535), (65535, 0), (65535, 32896)]]), colour_type=4)
    assert read(path).tolist() == [[255, 0, 128]]


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_the_transparent_value_of_a_16_bit_picture_becomes_black(tmp_path, colour_type, channels):
    rows = np.array([[(40000,) * channels, (60000,) * channels]])
    path = write_png(tmp_path / "a.png", rows, colour_type=colour_type, transparent=struct.pack(">H", 40000) * channels)
    assert read(path).tolist() == [[0, level(60000, 65535) if channels == 1 else 60000 >> 8]]


def test_integers_have_the_scale_of_16_bits_or_are_refused(tmp_path):
    Image.fromarray(np.array([VALUES], np.int32)).save(tmp_path / "a.tif")
    assert mode(tmp_path / "a.tif") == "I"
    assert read(tmp_path / "a.tif")[0].tolist() == [level(value, 65535) for value in VALUES]
    for values in ([-1, 5], [0, 65536]):
        Image.fromarray(np.array([values], np.int32)).save(tmp_path / "b.tif")
        with pytest.raises(
            UnreadableError, match=r"b\.tif: its integer values go from .* wanted 0 .* to 65535 .*scale"
        ):
            read(tmp_path / "b.tif")


@pytest.mark.parametrize("channels", [1, 3])
def test_floating_point_is_0_to_1_or_refused(tmp_path, channels):
    Image.fromarray(np.array([[0.0, 0.25, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tif")
    got = read(tmp_path / "a.tif", channels).reshape(4, -1)
    assert got[:, 0].tolist() == [0, 64, 128, 255]
    for values in ([-0.1, 1.0], [0.0, 1.5], [0.0, np.nan], [0.0, np.inf], [0.0, 255.0]):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "b.tif")
        with pytest.raises(UnreadableError, match=r"b\.tif: its floating-point values .* wanted 0 .* to 1 "):
            read(tmp_path / "b.tif", channels)


# What pictures of 8 bits have always been read as: nothing here may change.
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_8_bit_grey_and_colour_are_read_bit_for_bit(tmp_path, suffix):
    Image.fromarray(GREY).save(tmp_path / f"grey{suffix}")
    Image.fromarray(COLOUR).save(tmp_path / f"colour{suffix}")
    assert np.array_equal(read(tmp_path / f"grey{suffix}"), GREY)
    assert np.array_equal(read(tmp_path / f"colour{suffix}", 3), COLOUR)
    assert np.array_equal(read(tmp_path / f"colour{suffix}"), np.asarray(Image.fromarray(COLOUR).convert("L")))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".gif"])
def test_1_bit_is_black_and_white(tmp_path, suffix):
    Image.fromarray(GREY > 100).save(tmp_path / f"a{suffix}")
    assert np.array_equal(read(tmp_path / f"a{suffix}"), np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".gif"])
def test_a_palette_is_looked_up(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50, 255, 255, 255])
    image.save(tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}", 3).tolist() == [[[10, 20, 30], [200, 100, 50], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("suffix", "transparency"),
    [(".png", 1), (".png", b"\xff\x00\xff"), (".gif", 1)],  # a number, alpha of each; GIF has one such colour
)
def test_a_transparent_colour_of_a_palette_becomes_black(tmp_path, suffix, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50, 255, 255, 255])
    image.save(tmp_path / f"a{suffix}", transparency=transparency)
    assert read(tmp_path / f"a{suffix}", 3).tolist() == [[[10, 20, 30], [0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(("mode", "suffix"), [("LA", ".png"), ("RGBA", ".png"), ("LA", ".tif"), ("RGBA", ".tif")])
def test_alpha_is_flattened_on_black(tmp_path, mode, suffix):
    alpha = Image.fromarray(np.array([[255, 0, 128]], np.uint8))
    white = Image.fromarray(np.full((1, 3), 200, np.uint8))
    Image.merge(mode, [white] * (len(mode) - 1) + [alpha]).save(tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}").tolist() == [[200, 0, 100]]


def test_colours_multiplied_by_their_alpha_are_not_multiplied_again():
    from synchromesh.data.files import _to_mode

    for mode in ("La", "RGBa"):
        parts = [Image.fromarray(np.array([[100, 0]], np.uint8))] * (len(mode) - 1)
        image = Image.merge(mode, [*parts, Image.fromarray(np.array([[128, 0]], np.uint8))])
        assert np.abs(np.asarray(_to_mode(image, "L")).astype(int) - [[100, 0]]).max() <= 1


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_inks_become_colours(tmp_path, suffix):
    inks = np.broadcast_to(np.array([0, 255, 255, 0], np.uint8), (16, 16, 4))  # magenta and yellow: red
    Image.fromarray(np.ascontiguousarray(inks), "CMYK").save(tmp_path / f"a{suffix}")
    assert np.abs(read(tmp_path / f"a{suffix}", 3).astype(int) - [255, 0, 0]).max() <= 3
    assert np.abs(read(tmp_path / f"a{suffix}").astype(int) - 76).max() <= 3


@pytest.mark.parametrize("channels", [1, 3])
def test_lab_is_read_in_grey_as_in_colour(tmp_path, channels):
    white = [Image.new("L", (4, 4), value) for value in (255, 128, 128)]
    Image.merge("LAB", white).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif", channels).min() >= 252


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_the_orientation_is_followed_once(tmp_path, dtype):
    """By Pillow in TIFF, by us in the rest; Pillow lays out a mapped file in the turned size."""
    shown = np.arange(6).reshape(2, 3)
    values = (shown / 5 * (1 if dtype is np.float32 else np.iinfo(dtype).max)).astype(dtype)
    bits, form = values.itemsize * 8, 3 if dtype is np.float32 else 1
    path = write_tiff(tmp_path / "a.tif", values.tobytes(), (3, 2), bits=bits, sample_format=form, orientation=6)
    wanted = np.rot90((shown / 5 * 255).round(), -1)
    assert np.array_equal(read(path), wanted)
    if dtype is not np.float32:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read(tmp_path / "a.png"), wanted)


@pytest.mark.parametrize("suffix", [".gif", ".tif", ".webp", ".png"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 8), value) for value in ("white", "black"))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
    assert read(tmp_path / f"a{suffix}").min() >= 254


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:RuntimeWarning")  # Pillow's, of what is broken
@pytest.mark.parametrize("suffix", [".gif", ".bmp", ".tif", ".png", ".jpg", ".webp", ".pgm"])
def test_a_damaged_file_is_read_or_named_and_nothing_else(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    path, rng, named = tmp_path / f"a{suffix}", np.random.default_rng(0), []
    Image.fromarray(GREY).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for cut in (False, True) * 60:
        damaged = whole.copy()
        damaged[rng.integers(0, min(len(whole), 200), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(damaged[: rng.integers(len(whole)) if cut else None].tobytes())
        try:
            read_picture(path, 1)
        except UnreadableError as error:
            named.append(error)
    assert named
    for error in named:
        assert str(path) in str(error)
        assert (error.path, bool(error.reason)) == (path, True)


def test_a_header_without_sense_is_named(tmp_path):
    """Pillow takes the rational number for the width and fails at range()."""
    path = write_tiff(tmp_path / "a.tif", bytes(4), (4, 1), bits=8)
    entry = path.read_bytes().index(struct.pack("<HHII", 256, 4, 1, 4))
    content = bytearray(path.read_bytes())
    content[entry + 2 : entry + 4] = struct.pack("<H", TiffImagePlugin.TiffTags.RATIONAL)
    path.write_bytes(content)
    with pytest.raises(UnreadableError, match=r"cannot read the image .*a\.tif"):
        read(path)


def test_kinds_are_told_by_their_suffix_in_any_case(tmp_path):
    names = ["b.GIF", "a.tiff", "c.Bmp", "d.txt", "e", "f.heic", "g.AVIF", ".DS_Store"]
    taken, others = pictures_in(tmp_path / name for name in names)
    assert [path.name for path in taken] == ["a.tiff", "b.GIF", "c.Bmp"]
    assert [path.name for path in others] == ["f.heic", "g.AVIF"]
    assert not SUFFIXES & OTHER_SUFFIXES


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_suffix_is_one_that_pillow_reads(suffix):
    Image.init()
    assert Image.registered_extensions()[suffix] in Image.OPEN
