"""Targets and sources of `push` and `pull`: a folder, or a repository of a hub as hf://OWNER/NAME."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synchromesh.errors import InputError

HUB = "hf://"


@dataclass(frozen=True)
class Repository:
    """A model on a hub.

    Attributes:
        name: OWNER/NAME.
        revision: branch, tag or commit; None for the main branch.
        endpoint: address of the hub; None for huggingface_hub's own choice.
    """

    name: str
    revision: str | None = None
    endpoint: str | None = None

    def upload(self, folder: Path, *, private: bool = False) -> str:
        """Make the repository where it is missing, and upload a folder; return its address.

        Raises:
            InputError: huggingface_hub is not installed, the hub is not reached, or refuses.
        """
        hub = _huggingface_hub()
        with _explained(self, hub):
            api = hub.HfApi(endpoint=self.endpoint)
            api.create_repo(self.name, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=self.name, folder_path=folder, revision=self.revision)
        return str(getattr(done, "commit_url", done))

    def download(self, folder: Path, names: Sequence[str]) -> None:
        """Download the files of these names, and no others, into a folder.

        Raises:
            InputError: as `upload`.
        """
        hub = _huggingface_hub()
        with _explained(self, hub):
            api = hub.HfApi(endpoint=self.endpoint)
            api.snapshot_download(self.name, revision=self.revision, allow_patterns=list(names), local_dir=folder)


def repository(text: str) -> Repository | None:
    """Return the repository that hf://OWNER/NAME or hf://OWNER/NAME@REVISION names; None for a path.

    Raises:
        InputError: it names none.

    >>> repository("hf://owner/name@v1")
    Repository(name='owner/name', revision='v1', endpoint=None)
    """
    if not text.startswith(HUB):
        return None
    name, _, revision = text.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"got {text!r}, wanted {HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION")
    return Repository(name, revision or None)


@contextmanager
def local(source: str, names: Sequence[str]) -> Iterator[Path]:
    """Hold a folder with what a source has: the folder itself, or a download that is removed afterwards.

    Raises:
        InputError: there is none.
    """
    found = repository(source)
    if found is None:
        if not Path(source).is_dir():
            raise InputError(f"there is no folder {source}: wanted one that `push` wrote, or {HUB}OWNER/NAME")
        yield Path(source)
        return
    with tempfile.TemporaryDirectory() as folder:
        found.download(Path(folder), names)
        yield Path(folder)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise InputError(f"{HUB} needs huggingface_hub: pip install 'synchromesh[hf]', or name a folder") from error
    return huggingface_hub


@contextmanager
def _explained(repository: Repository, hub: Any) -> Iterator[None]:
    """Raise what a hub and the way to it can do as one sentence."""
    # Releases of huggingface_hub stand on different clients, each with an HTTPError that not all are OSErrors.
    client = sys.modules[type(hub.get_session()).__module__.partition(".")[0]]
    try:
        yield
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, client.HTTPError, OSError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot reach {HUB}{repository.name}: {said}; log in with `hf auth login`, or push to a folder and upload "
            "it where there is a network"
        ) from error
    except (hub.errors.HFValidationError, ValueError) as error:
        raise InputError(f"{HUB}{repository.name}: {error}") from error
