"""Checkpoint files of ranks: read without running what is in them, written aside and then renamed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from synchromesh.compat.tutel.system import apply_rank_size_from_pattern
from synchromesh.compat.unpickle import BROKEN, load_plain


def of_rank(pattern: str, rank: int, ranks: int) -> Path:
    """Return the file of a rank, from a name with {rank} and {size}.

    Raises:
        ValueError: the name has no {rank} though there are several.
    """
    if ranks > 1 and "{rank}" not in pattern:
        raise ValueError(f"got the name {pattern!r} for the files of {ranks} ranks, wanted {{rank}} in it")
    return Path(apply_rank_size_from_pattern(pattern, rank, ranks, create_dir=False))


def read(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain containers.

    Raises:
        ValueError: it holds other objects, or is no such file. FileNotFoundError: there is none.
    """
    try:
        content = load_plain(path)
    except FileNotFoundError:
        raise
    except BROKEN as error:
        raise ValueError(  # without torch's own words, which recommend to run what is in the file
            f"cannot read {path}: it is damaged, or not a file of tensors and plain containers alone; "
            "the released Swin-MoE files go through `synchromesh convert --from-swin`"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a dict of tensors")
    return content


def write_all(files: Iterable[tuple[Path, dict[str, Any]]]) -> list[Path]:
    """Write files aside, and give them their names once all are written; return the names."""
    aside: list[tuple[Path, Path]] = []
    try:
        for path, content in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.append((path.with_name(path.name + ".tmp"), path))
            with aside[-1][0].open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        return [temporary.replace(path) for temporary, path in aside]
    finally:
        for temporary, _ in aside:
            temporary.unlink(missing_ok=True)


def inside(content: dict[str, Any], namespace: str, path: Path) -> dict[str, Any]:
    """Return the dict at "a/b" of a nested one.

    Raises:
        ValueError: there is none.
    """
    for name in filter(None, namespace.split("/")):
        if not isinstance(content, dict) or not isinstance(content.get(name), dict):
            has = ", ".join(sorted(map(str, content))[:8])
            raise ValueError(f"{path} has no dict {name!r} of the namespace {namespace!r}; it has {has}")
        content = content[name]
    return content


def with_inside(content: dict[str, Any], namespace: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the nested dict with another dict at "a/b"."""
    name, _, rest = namespace.strip("/").partition("/")
    return {**content, name: with_inside(content[name], rest, state)} if name else state


def run(parser: argparse.ArgumentParser, convert: Callable[[argparse.Namespace], list[Path]]) -> None:
    """Run a conversion on the arguments of the command line; an error ends it with one sentence and code 2."""
    parser.add_argument("--namespace", default="", metavar="A/B", help="where in nested dicts the state dict is")
    parser.add_argument(
        "--default_num_global_experts", type=int, metavar="N", help="experts in all, for files that do not say it"
    )
    options = parser.parse_args()
    try:
        written = convert(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write("".join(f"wrote {path}\n" for path in written))
