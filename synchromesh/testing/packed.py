"""Pictures packed into parquet and tar files, as other programs write them, for tests and benchmarks."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

KINDS = ("PNG", "JPEG", "WEBP")
CLASSES = ("dark", "light")


def encoded(count: int, *, size: tuple[int, int] = (40, 52), seed: int = 0) -> list[tuple[str, bytes, int]]:
    """Return pictures of two classes in turn: the ending of a file, its bytes, and the number of its class."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        label, kind = number % 2, KINDS[number % 3]
        level = (60, 190)[label]
        pixels = rng.integers(level - 50, level + 50, (*size, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, kind)
        found.append((kind.lower(), content.getvalue(), label))
    return found


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]], *, rows: int = 5, metadata: bytes = b"") -> Path:
    """Write columns in groups of some rows, perhaps with what Hugging Face's `datasets` would say of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    if metadata:
        table = table.replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, path, row_group_size=rows)
    return path


def parquet_of(path: Path, pictures: Sequence[tuple[str, bytes, int]], *, rows: int = 5) -> Path:
    """Write pictures and the names of their classes."""
    images = [{"bytes": content, "path": None} for _, content, _ in pictures]
    labels = [CLASSES[label] for *_, label in pictures]
    return write_parquet(path, {"image": images, "label": labels}, rows=rows)


def write_tar(
    path: Path, members: Sequence[tuple[str, bytes]], *, mode: str = "w", kind: int = tarfile.PAX_FORMAT
) -> Path:
    """Write a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_of(path: Path, pictures: Sequence[tuple[str, bytes, int]]) -> Path:
    """Write pictures and their classes as WebDataset has them."""
    members = []
    for number, (ending, content, label) in enumerate(pictures):
        members += [(f"{number:06d}.{ending}", content), (f"{number:06d}.cls", CLASSES[label].encode())]
    return write_tar(path, members)


def index_of(path: Path, pictures: Sequence[tuple[str, bytes, int]]) -> Path:
    """Write pictures into a folder beside an index of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (ending, content, label) in enumerate(pictures):
        (path.parent / f"{number}.{ending}").write_bytes(content)
        lines.append(f"{number}.{ending}\t{CLASSES[label]}\n")
    path.write_text("".join(lines))
    return path
