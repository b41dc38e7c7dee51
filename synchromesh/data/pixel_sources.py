"""Where pictures with a value for every pixel come from: files of any layout, or two readers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synchromesh.data.annotated import Annotated
from synchromesh.data.class_folders import VAL
from synchromesh.data.label_folders import LabelFolders
from synchromesh.data.layouts import Reader, found_in, train_and_test
from synchromesh.errors import InputError

TwoParts = tuple[Annotated[Any], Annotated[Any]]
"""What to learn from, and what to score on."""


@dataclass(frozen=True)
class AnnotatedFiles:
    """A folder or a json file of any layout that `data.layouts` knows.

    Attributes:
        path: of it.
        images: the folder of pictures, where a json file does not lie beside it.
        test_share: of the pictures, to score on, where the layout has no part for that.
        split_seed: chooses these.
    """

    path: Path
    images: Path | None = None
    test_share: float = 0.1
    split_seed: int = 0

    def load(self) -> TwoParts:
        """Read what is annotated. Raises InputError as `layouts.train_and_test` does."""
        found = train_and_test(self.path, images=self.images, test_share=self.test_share, seed=self.split_seed)
        if found is None:
            raise InputError(f"{self.path} has a folder for each class, wanted a second file for each picture")
        return found

    def all_to_score(self, classes: tuple[str, ...]) -> Annotated[Any]:
        """Return the pictures of the part to score on; all pictures of a layout without parts.

        Args:
            classes: of the model, for folders that do not name theirs.

        Raises:
            InputError: as `layouts.found_in` says, or the classes differ.
        """
        try:
            reader = found_in(self.path, images=self.images, split=VAL[0])
        except InputError:
            reader = found_in(self.path, images=self.images)
        if reader is None:
            raise InputError(f"{self.path} has a folder for each class, wanted a second file for each picture")
        if isinstance(reader, LabelFolders) and not reader.classes:
            named = reader.load().classes
            unnamed = all(name.isdecimal() for name in named) and set(named) <= set(classes)
            reader = dataclasses.replace(reader, classes=classes) if unnamed else reader
        found = reader.load()
        if found.classes != classes:
            raise InputError(
                f"{found.origin} has the classes {list(found.classes)}, and the model was trained on {list(classes)}"
            )
        return found


@dataclass(frozen=True)
class ReaderPair:
    """Two readers, for settings that no layout tells, such as `reduce_zero`.

    Attributes:
        train: of what to learn from.
        test: of what to score on.
    """

    train: Reader
    test: Reader

    def load(self) -> TwoParts:
        """Read what is annotated. Raises InputError as the readers do, or where the two have different classes."""
        train, test = self.train.load(), self.test.load()
        if train.classes != test.classes or train.things != test.things:
            raise InputError(
                f"{train.origin} has the classes {list(train.classes)}, and {test.origin} has {list(test.classes)}: "
                "wanted the same ones, in one order"
            )
        return train, test
