import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from synchromesh.data.images import Preprocess, decode_image
from synchromesh.data.tar_shards import TarShards
from synchromesh.errors import InputError, UnreadableError
from synchromesh.testing.packed import CLASSES, encoded, tar_of, write_tar

SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
PICTURES = encoded(8)
PNG = PICTURES[0][1]


class Evil:
    """What a pickle of this would do."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("pickle_was_decoded"),)


def test_pickles_and_arrays_are_left_alone_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members = []
    for number in range(4):
        members += [
            (f"{number}.png", PNG),
            (f"{number}.pyd", pickle.dumps(Evil())),
            (f"{number}.npy", pickle.dumps(Evil())),
        ]
        members += [(f"{number}.cls", str(number % 2).encode())]
    found = TarShards(write_tar(tmp_path / "x.tar", members)).load(SIZE)
    found.train.read(0)
    assert "left alone in the tar files: 4 .npy, 4 .pyd" in found.notes
    assert not (tmp_path / "pickle_was_decoded").exists()


def test_a_class_may_stand_in_cls_in_json_or_be_the_folder(tmp_path: Path) -> None:
    members = [
        ("a.png", PNG), ("a.cls", b" dark\n"),
        ("b.png", PNG), ("b.json", json.dumps({"width": 3, "label": "light"}).encode()),
        ("./train/dark/c.png", PNG),
        ("light/d.e.png", PNG),
    ]  # fmt: skip
    found = TarShards(write_tar(tmp_path / "x.tar", members)).load_all(SIZE, CLASSES)
    assert found.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("content", [b"{", b"[1]", b'{"label": [1]}', b'{"label": true}', b"[" * 100_000, b"\xff\xfe"])
def test_a_json_without_a_label_gives_no_class(tmp_path: Path, content: bytes) -> None:
    members = [(f"{n}.png", PNG) for n in "a"] + [("a.json", content)]
    members += [pair for n in "bcde" for pair in ((f"{n}.png", PNG), (f"{n}.cls", n.encode()))]
    members += [pair for n in "bcde" for pair in ((f"2{n}.png", PNG), (f"2{n}.cls", n.encode()))]
    assert (
        "left out, as they have no class: 1 pictures"
        in TarShards(write_tar(tmp_path / "x.tar", members)).load(SIZE).notes
    )


def test_the_plain_picture_of_a_sample_is_taken_and_endings_have_any_case(tmp_path: Path) -> None:
    red = io.BytesIO()
    Image.new("RGB", (20, 20), (255, 0, 0)).save(red, "PNG")
    members = [("a.mask.png", PNG), ("a.PNG", red.getvalue()), ("a.cls", b"dark")]
    found = TarShards(write_tar(tmp_path / "x.tar", members)).load_all(SIZE, CLASSES)
    assert len(found) == 1
    assert found.read(0)[:, 3, 3].tolist() == [255, 0, 0]


def test_links_and_folders_are_passed_over_and_names_that_lead_out_stay_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "in" / "x.tar"
    path.parent.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        for name in ("../../dark/a.png", "/light/b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            archive.addfile(info, io.BytesIO(PNG))
    before = sorted(tmp_path.rglob("*"))
    found = TarShards(path).load_all(SIZE, CLASSES)
    assert found.labels.tolist() == [0, 1]
    (tmp_path / "plain.png").write_bytes(PNG)
    assert torch.equal(found.read(0), decode_image(tmp_path / "plain.png", SIZE))
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "plain.png"])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "cut off|no whole, plain tar file"),
        (lambda path: path.write_bytes(b"no tar file" * 100), "no whole, plain tar file"),
        (lambda path: path.write_bytes(b""), "no whole, plain tar file"),
        (lambda path: tar_gz(path), "compressed ones are not read"),
        (lambda path: write_tar(path, [("a.txt", b"x"), ("b.heic", b"y")]), r"hold no pictures, only \.heic, \.txt"),
        (lambda path: write_tar(path, []), "hold no pictures, only nothing"),
    ],
)
def test_what_is_no_tar_file_of_pictures_is_named(tmp_path: Path, spoil: object, says: str) -> None:
    path = tar_of(tmp_path / "x.tar", PICTURES)
    spoil(path)  # pyright: ignore[reportCallIssue]
    with pytest.raises(InputError, match=says) as caught:
        TarShards(path).load(SIZE)
    assert "x.tar" in str(caught.value)


def tar_gz(path: Path) -> None:
    write_tar(path, [("a.png", PNG)], mode="w:gz")


def test_a_file_that_shrinks_later_is_named(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", PICTURES)
    found = TarShards(path).load_all(SIZE, CLASSES)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UnreadableError, match=r"x\.tar/000007\.jpeg: the tar file is shorter than it was"):
        found.read(7)


def test_long_names_are_whole(tmp_path: Path) -> None:
    name = f"dark/{'ü' * 180}.png"
    found = TarShards(write_tar(tmp_path / "x.tar", [(name, PNG)])).load_all(SIZE, CLASSES)
    assert found.store.name(0) == f"x.tar/{name}"
