"""Which layout a folder or a json file has, from what lies in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synchromesh.data.ade20k import Ade20k
from synchromesh.data.annotated import Annotated
from synchromesh.data.cityscapes import Cityscapes, CityscapesPanoptic
from synchromesh.data.class_folders import TRAIN, VAL, few
from synchromesh.data.coco_json import CocoJson
from synchromesh.data.coco_panoptic import CocoPanoptic
from synchromesh.data.depth_maps import DepthFolders
from synchromesh.data.files import SUFFIXES
from synchromesh.data.json_arrays import read_object
from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.parts import words
from synchromesh.data.stereo_pair import StereoPair
from synchromesh.data.voc import VocFolder, VocSegmentation
from synchromesh.errors import InputError

Reader = (
    CocoJson
    | CocoPanoptic
    | VocFolder
    | VocSegmentation
    | LabelFolders
    | Ade20k
    | Cityscapes
    | CityscapesPanoptic
    | DepthFolders
    | StereoPair
)
"""Settings whose `load` gives annotated pictures."""

_LABELS, _DEPTHS = ("labels", "masks", "annotations"), ("depth", "depths")
_OTHER_JSON = ("captions", "person_keypoints", "image_info", "stuff")  # of COCO
_BEGIN = 1 << 16  # bytes of a json file, among which the first of COCO's members stands
_LOOKED_FOR = (
    "a COCO json in it or in annotations/; JPEGImages/ with Annotations/ or SegmentationClass/ (VOC); leftImg8bit/ "
    "with gtFine/ (Cityscapes); images/training/ with annotations/training/ (ADE20K); images/ with labels/, masks/ or "
    "depth/; or a folder of pictures for each class"
)


def found_in(path: Path, *, images: Path | None = None, split: str = "train") -> Reader | None:
    """Return what reads a json file or a folder.

    Args:
        path: the file or folder.
        images: the folder of pictures, where the json file does not lie beside it.
        split: train or val, where the layout has such parts.

    Returns:
        None for a folder of class folders, which have no annotations.

    Raises:
        InputError: it is missing or of no known layout, or has no such part; the message says what was looked for.
    """
    if not path.exists():
        raise InputError(f"the data {path} does not exist")
    parts = {TRAIN[0]: TRAIN, VAL[0]: VAL}.get(split, (split,))
    if path.is_file():
        return _of_json(path, images)
    if images is not None:
        raise InputError(f"{path} is a folder, so {images} cannot be the pictures of it: give a json file")
    for matches, reader in _LAYOUTS:
        if matches(path):
            found = reader(path, parts)
            if found is None:
                raise InputError(f"{path} has no part named {' or '.join(parts)}")
            return found
    _check_class_folders(path)
    return None


def is_annotated(path: Path) -> bool:
    """Tell whether a path leads to a json file, or to a folder with annotations of some known layout."""
    return path.is_file() or any(matches(path) for matches, _ in _LAYOUTS)


def train_and_test(
    path: Path, *, images: Path | None = None, test_share: float = 0.1, seed: int = 0
) -> tuple[Annotated[Any], Annotated[Any]] | None:
    """Load what to learn from and what to score on: its own part where there is one, else a share of all pictures.

    Args:
        path: a json file or a folder.
        images: the folder of pictures, where the json file does not lie beside it.
        test_share: of the pictures, where nothing else is there to be scored on.
        seed: chooses these.

    Returns:
        None for a folder of class folders.

    Raises:
        InputError: as `found_in` and the readers say; or the two parts have different classes.
    """
    reader = found_in(path, images=images)
    if reader is None:
        return None
    train = reader.load()
    other = _second(path, reader, images)
    if other is None:
        return train.divided(test_share, seed=seed)
    if isinstance(other, LabelFolders) and not other.classes:
        other = dataclasses.replace(other, classes=train.classes)
    test = other.load()
    if test.classes != train.classes:
        differ = few(sorted(set(test.classes) ^ set(train.classes))) or "their order"
        raise InputError(f"{train.origin} and {test.origin} have different classes: {differ}")
    return train, test


def _second(path: Path, train: Reader, images: Path | None) -> Reader | None:
    """Return what reads the pictures to score on; None where the layout has none of its own."""
    if path.is_file():
        twins = [path.with_name(path.name.replace(TRAIN[0], name)) for name in VAL]
        twin = next((twin for twin in twins if TRAIN[0] in path.name and twin.is_file()), None)
        return None if twin is None else _of_json(twin, _folder_of_both(twin, images))
    reader = next(reader for matches, reader in _LAYOUTS if matches(path))
    second = reader(path, VAL)
    return None if second == train else second


def _of_json(path: Path, images: Path | None) -> CocoJson | CocoPanoptic:
    if path.suffix.lower() != ".json":
        raise InputError(f"the data {path} is no json file: give one of COCO's, or a folder")
    first = _first_entries(path)
    pictures = images or _folder_with(path, first.picture, "", "the pictures")
    if isinstance(first.annotation.get("segments_info"), list):
        return CocoPanoptic(path, _folder_with(path, first.annotation, path.stem, "the files of ids"), pictures)
    return CocoJson(path, pictures)


def _folder_of_both(twin: Path, images: Path | None) -> Path | None:
    """Return the folder that was given for the pictures to learn from, where those to score on lie in it too."""
    if images is None:
        return None
    name = str(_first_entries(twin).picture.get("file_name", ""))
    return images if name and ".." not in name and (images / name.lstrip("/")).is_file() else None


@dataclass
class _First:
    """The first picture and the first annotation of a json file."""

    picture: dict[str, Any] = field(default_factory=dict)
    annotation: dict[str, Any] = field(default_factory=dict)


class _SeenError(Exception):
    """Enough was read."""


def _first_entries(path: Path) -> _First:
    first = _First()

    def take(name: str, one: Any) -> None:
        if isinstance(one, dict) and not getattr(first, name):
            setattr(first, name, one)
        if first.picture and first.annotation:
            raise _SeenError

    try:
        found = read_object(
            path,
            {"images": lambda _, one: take("picture", one), "annotations": lambda _, one: take("annotation", one)},
        )
    except _SeenError:
        return first
    if not first.picture:
        raise InputError(
            f"{path} is no json file of COCO's: wanted pictures in 'images', got {few(list(found)) or 'nothing'}"
        )
    return first


def _folder_with(path: Path, entry: dict[str, Any], own: str, what: str) -> Path:
    """Return the folder near a json file that has the file of an entry."""
    part = path.stem.rpartition("_")[2]  # of instances_train2017
    beside, above = path.parent, path.parent.parent
    folders = [beside / own] if own else [beside / "images"]
    folders += [
        beside / part,
        above / part,
        beside / "images" / part,
        above / "images" / part,
        above / "images",
        beside,
    ]
    name = str(entry.get("file_name", "")).replace("\\", "/")
    for folder in folders:
        if name and ".." not in name and (folder / name.lstrip("/")).is_file():
            return folder
    raise InputError(
        f"{path} names {name or 'no file'}, which is in none of {', '.join(map(str, folders))}: say where {what} are"
    )


def _jsons(root: Path) -> list[Path]:
    """Return the json files that may be COCO's, those of objects first."""
    found = [*root.glob("*.json"), *root.glob("annotations/*.json"), *root.glob("*/*.coco.json")]
    usable = [path for path in found if not path.name.startswith(_OTHER_JSON) and _looks_like_coco(path)]
    return sorted(usable, key=lambda path: (path.name.startswith("panoptic"), str(path)))


def _looks_like_coco(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(_BEGIN)
    return any(name in begin for name in (b'"images"', b'"annotations"', b'"categories"'))


def _is_coco(root: Path) -> bool:
    return bool(_jsons(root))


def _coco(root: Path, parts: Sequence[str]) -> Reader | None:
    files = _jsons(root)
    named = [path for path in files if any(part in (path.parent.name, *words(path.stem)) for part in parts)]
    if not named and TRAIN[0] in parts and not any(set(words(path.stem)) & {*TRAIN, *VAL} for path in files):
        named = files
    kinds = [[path for path in named if path.name.startswith("panoptic") == panoptic] for panoptic in (False, True)]
    chosen = kinds[0] or kinds[1]
    if len(chosen) > 1:
        raise InputError(f"{root} has several json files: {few([path.name for path in chosen])}: give one of them")
    return _of_json(chosen[0], None) if chosen else None


def _is_voc(root: Path) -> bool:
    return (root / "JPEGImages").is_dir() and any((root / own).is_dir() for own in ("Annotations", "SegmentationClass"))


def _voc(root: Path, parts: Sequence[str]) -> Reader | None:
    for kind, make in (("Main", VocFolder), ("Segmentation", VocSegmentation)):
        needs = "Annotations" if kind == "Main" else "SegmentationClass"
        for part in parts:
            if (root / needs).is_dir() and (root / "ImageSets" / kind / f"{part}.txt").is_file():
                return make(root, part)
    return None


def _is_cityscapes(root: Path) -> bool:
    return (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir()


def _cityscapes(root: Path, parts: Sequence[str]) -> Reader | None:
    return next((Cityscapes(root, part) for part in parts if (root / "gtFine" / part).is_dir()), None)


def _is_ade20k(root: Path) -> bool:
    return (root / "annotations" / "training").is_dir() and (root / "images" / "training").is_dir()


def _ade20k(root: Path, parts: Sequence[str]) -> Reader | None:
    return next((Ade20k(root, part) for part in parts if (root / "annotations" / part).is_dir()), None)


def _partner(root: Path) -> Path | None:
    """Return the folder of label or depth files beside images/."""
    own = [root / name for name in (*_LABELS, *_DEPTHS)] if (root / "images").is_dir() else []
    return next((folder for folder in own if folder.is_dir()), None)


def _is_pair(root: Path) -> bool:
    return _partner(root) is not None


def _pair(root: Path, parts: Sequence[str]) -> Reader | None:
    folder, images = _partner(root), root / "images"
    assert folder is not None
    if any((folder / part).is_dir() for part in (*TRAIN, *VAL)):
        part = next((part for part in parts if (folder / part).is_dir() and (images / part).is_dir()), None)
        if part is None:
            return None
        folder, images = folder / part, images / part
    elif TRAIN[0] not in parts:
        return None
    if not any(path.suffix != ".txt" for path in folder.rglob("*") if path.is_file()):
        raise InputError(f"{folder} has no label pictures; text files, as of YOLO, are not read: give a COCO json")
    return DepthFolders(images, folder) if _is_depth(root) else LabelFolders(images, folder)


def _is_depth(root: Path) -> bool:
    partner = _partner(root)
    return partner is not None and partner.name in _DEPTHS


_LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path, Sequence[str]], Reader | None]], ...] = (
    (_is_voc, _voc),
    (_is_cityscapes, _cityscapes),
    (_is_ade20k, _ade20k),
    (_is_coco, _coco),
    (_is_pair, _pair),
)


def _check_class_folders(path: Path) -> None:
    """Raise InputError where not one inner folder has a picture."""
    inner = [each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")]
    if not any(one.suffix.lower() in SUFFIXES for folder in inner for one in folder.rglob("*")):
        there = few(sorted(each.name for each in path.iterdir())) or "nothing"
        pictures = sum(each.suffix.lower() in SUFFIXES for each in path.iterdir())
        why = ""
        if pictures:
            why = f", {pictures} pictures without a class: give each class a folder of its own"
        elif inner:
            why = ", folders without one picture"
        raise InputError(f"{path} is of no layout that is known; it has {there}{why}. Looked for: {_LOOKED_FOR}")
