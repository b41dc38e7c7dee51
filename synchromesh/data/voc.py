"""Pascal VOC's folders: objects as XML files, classes and objects of pixels as PNG files with a palette."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool

from synchromesh.data.annotated import Annotated, Faults
from synchromesh.data.annotation import AnnotatedPicture, Annotation, Box
from synchromesh.data.box_checks import check_boxes
from synchromesh.data.class_folders import few
from synchromesh.data.files import SUFFIXES, header
from synchromesh.data.label_files import read_indices
from synchromesh.data.label_maps import LabelCoding, LabelMaps, by_stem, label_maps
from synchromesh.data.moves import Move, Size
from synchromesh.data.picture_files import PictureFolder
from synchromesh.errors import InputError, UnreadableError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_SIDES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocFolder:
    """Objects and their boxes: JPEGImages/, Annotations/*.xml and ImageSets/Main/*.txt in one folder.

    Attributes:
        root: the folder.
        split: name of a list in ImageSets/Main (with `masks`, in ImageSets/Segmentation).
        classes: names; those of all XML files, in order, if not given.
        one_based: the first pixel has the number 1 and a box includes its last pixel, as in VOC; else boxes are taken
            as they stand.
        masks: objects have the regions of SegmentationObject/.
    """

    root: Path
    split: str = "train"
    classes: tuple[str, ...] = ()
    one_based: bool = True
    masks: bool = False

    def load(self) -> Annotated[AnnotatedPicture]:
        """Read the XML files of the split; without `classes`, of the whole folder, so that splits agree.

        Objects with `difficult` are kept as ignored.

        Raises:
            InputError: something is missing, or nothing can be used; the message names it.
        """
        faults, stems = Faults(), read_split(self.root, "Segmentation" if self.masks else "Main", self.split)
        images = by_stem(PictureFolder.of(self.root / "JPEGImages"), SUFFIXES)
        files = by_stem(PictureFolder.of(self.root / "Annotations"), (".xml",))
        classes = self.classes or _all_classes(files.values())
        pictures = []
        for stem in stems:
            if stem not in files:
                faults.add("pictures of the list without an XML file, left out", stem)
            elif stem not in images:
                faults.add("pictures of the list whose file is missing, left out", stem)
            else:
                found = _Reading(self, classes, faults).picture(images[stem], files[stem], len(pictures) + 1)
                pictures += [] if found is None else [found]
        origin = f"{self.root}, {self.split}"
        if not pictures:
            raise InputError(f"{origin}: none of the {len(stems)} pictures of the list can be used")
        return Annotated(origin, tuple(pictures), classes, tuple(range(1, len(classes) + 1)), faults=faults.found())


@dataclass(frozen=True)
class VocSegmentation:
    """The class of every pixel: JPEGImages/, SegmentationClass/*.png and ImageSets/Segmentation/*.txt.

    Class 0 is the background; 255, the border of objects, is ignored.

    Attributes:
        root: the folder.
        split: name of a list in ImageSets/Segmentation.
        classes: names, of the background too; VOC's own 21 if not given.
    """

    root: Path
    split: str = "train"
    classes: tuple[str, ...] = ("background", *CLASSES)

    def load(self) -> LabelMaps:
        """List the files, and read some.

        Raises:
            InputError: something is missing, or nothing can be used; the message names it.
        """
        faults, stems = Faults(), read_split(self.root, "Segmentation", self.split)
        images = by_stem(PictureFolder.of(self.root / "JPEGImages"), SUFFIXES)
        labels = by_stem(PictureFolder.of(self.root / "SegmentationClass"), (".png",))
        for stem in stems:
            if stem not in images or stem not in labels:
                faults.add("pictures of the list without picture or label file, left out", stem)
        found = [(images[stem], labels[stem]) for stem in stems if stem in images and stem in labels]
        if not found:
            raise InputError(f"{self.root}, {self.split}: none of the {len(stems)} pictures of the list has both files")
        coding = LabelCoding.of({label: label for label in range(len(self.classes))}, len(self.classes))
        return label_maps(f"{self.root}, {self.split}", found, coding, self.classes, faults)


@dataclass(frozen=True)
class ObjectPixels:
    """A region: the pixels of one value in a file of objects.

    Attributes:
        path: of the file.
        value: of the object.
    """

    path: Path
    value: int

    def mask(self, height: int, width: int) -> Bool[np.ndarray, "H W"]:
        """Return the pixels. Raises UnreadableError where the file is none, ValueError where it has another size."""
        found = read_indices(self.path) == self.value
        if found.shape != (height, width):
            raise ValueError(f"{self.path} has {found.shape} pixels, wanted those of the picture, {(height, width)}")
        return found

    def moved(self, move: Move) -> Bool[np.ndarray, "H W"]:
        """Return the pixels in a crop, the nearest ones."""
        return move.labels(self.mask(*move.source), outside=0)


def read_split(root: Path, kind: str, split: str) -> list[str]:
    """Return the names of a list of pictures.

    Raises:
        InputError: there is no such list, or it is empty; the message says which there are.
    """
    folder = root / "ImageSets" / kind
    path = folder / f"{split}.txt"
    if "/" in split or "\\" in split or not path.is_file():
        there = few(sorted(each.stem for each in folder.glob("*.txt"))) or "none"
        raise InputError(f"{folder} has no list {split!r}.txt, but: {there}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    stems = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))  # a second word says "has the class"
    if not stems:
        raise InputError(f"{path} names no picture")
    return stems


class _PlainXml(ElementTree.TreeBuilder):
    """Refuses what XML files of annotations never need and hostile ones use: entities that grow without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"it declares a document type ({name}), which annotations have no use for")


def read_xml(path: Path) -> ElementTree.Element:
    """Read an XML file. Raises UnreadableError where it is missing, broken, or declares a document type."""
    try:
        parser = ElementTree.XMLParser(target=_PlainXml())
        parser.feed(path.read_bytes())
        return parser.close()
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UnreadableError(path, str(error)) from error


@dataclass(frozen=True)
class _Reading:
    """How an XML file becomes a picture."""

    settings: VocFolder
    classes: tuple[str, ...]
    faults: Faults

    def picture(self, image: Path, file: Path, number: int) -> AnnotatedPicture | None:
        try:
            root = read_xml(file)
            size = _size(root) or header(image)[0]
        except UnreadableError as error:
            self.faults.add("XML files or pictures that cannot be read, left out", f"{error.path.name}: {error.reason}")
            return None
        return AnnotatedPicture(image, number, *size, tuple(self._objects(root, size, file)))

    def _objects(self, root: ElementTree.Element, size: Size, file: Path) -> Iterator[Annotation]:
        regions, elements = self.settings.root / "SegmentationObject" / f"{file.stem}.png", root.findall("object")
        boxes = self._boxes(elements, size, file)
        for place, (one, box) in enumerate(zip(elements, boxes, strict=True)):
            name = (one.findtext("name") or "").strip()
            if box is None:
                continue
            if name not in self.classes:
                self.faults.add("annotations of unknown classes, left out", f"{_where(place, file)} ({name})")
                continue
            region = ObjectPixels(regions, place + 1) if self.settings.masks else None
            difficult = (one.findtext("difficult") or "0").strip() == "1"
            area = (box[2] - box[0]) * (box[3] - box[1])
            yield Annotation(box, self.classes.index(name), region, area, ignored=difficult, number=place + 1)

    def _boxes(self, elements: Sequence[ElementTree.Element], size: Size, file: Path) -> list[Box | None]:
        """Return the boxes of objects; None for one that cannot be used."""
        sides = [[_number(one.findtext(f"bndbox/{side}")) for side in _SIDES] for one in elements]
        boxes = np.array(sides, dtype=np.float64).reshape(-1, 4) - ([1, 1, 0, 0] if self.settings.one_based else 0)
        checked = check_boxes(boxes, np.array([size] * len(boxes), dtype=np.int64).reshape(-1, 2))
        for what, wrong in (*checked.left_out.items(), *checked.mended.items()):
            for place in np.flatnonzero(wrong).tolist():
                self.faults.add(what, _where(place, file))
        right = ~np.any([*checked.left_out.values()], axis=0)
        found = zip(checked.boxes.tolist(), right.tolist(), strict=True)
        return [(box[0], box[1], box[2], box[3]) if usable else None for box, usable in found]


def _where(place: int, file: Path) -> str:
    return f"annotation {place + 1} of {file.name}"


def _all_classes(files: Iterable[Path]) -> tuple[str, ...]:
    names: set[str] = set()
    for path in files:
        try:
            names.update((one.text or "").strip() for one in read_xml(path).iterfind("object/name"))
        except UnreadableError:  # it is counted where its split is read
            continue
    return tuple(sorted(names - {""}))


def _size(root: ElementTree.Element) -> Size | None:
    height, width = (_number(root.findtext(f"size/{side}")) for side in ("height", "width"))
    return (int(height), int(width)) if height >= 1 and width >= 1 else None


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
