"""A sample of `benchmarks/fuzz.py`: some hundred broken files, each read or refused in a sentence; it does find faults.

The thousands are in benchmarks/results/fuzz.jsonl, which docs/security.md counts.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synchromesh.compat.hf_config import read_hf_config
from synchromesh.data.images import Preprocess
from synchromesh.data.index_file import IndexFile
from synchromesh.data.parquet import ParquetFiles
from synchromesh.data.stored import in_order
from synchromesh.data.tar_shards import TarShards
from synchromesh.errors import InputError
from synchromesh.models.swin_v2_moe import swin_v2_demo
from synchromesh.recipes.catalog import CATALOG
from synchromesh.testing.packed import write_parquet, write_tar
from synchromesh.training.checkpoint import read_checkpoint
from synchromesh.training.metrics import read_metrics
from synchromesh.training.start import load_weights

ROOT = Path(__file__).parents[1]
SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
QUICK = (
    *("images", "coco_json", "rle", "voc", "labels", "unpickle", "cluster", "plans", "hf_config", "recipe"),
    *("parquet", "tar_shards", "index_file"),
)


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    """The program as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["fuzz"] = module
        spec.loader.exec_module(module)
        yield module
        del sys.modules["fuzz"]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow mentions what it mends
@pytest.mark.parametrize("name", QUICK)
def test_broken_files_are_read_or_refused_in_a_sentence(
    fuzz: ModuleType, name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(fuzz, "_limit_memory", lambda: None)  # this process goes on
    args = fuzz.Args(inputs=25, seed=1, keep=tmp_path / "kept")
    (tmp_path / "files").mkdir()
    found = fuzz.work(fuzz.READERS[name](), tmp_path / "files", args)
    assert found.faults == {}
    assert found.code_run == []
    assert found.read + found.refused == found.inputs == 25


def test_faults_of_a_reader_are_found(fuzz: ModuleType, tmp_path: Path, monkeypatch) -> None:
    """A reader that fails on long files, runs code, or passes on errors of others is caught."""
    monkeypatch.setattr(fuzz, "_limit_memory", lambda: None)

    def read(path: Path) -> None:
        content = path.read_bytes()
        if len(content) > 20:
            raise KeyError("x")
        if b"\xff" in content:
            os.system("true")
        json.loads(content)

    reader = fuzz.Reader("bad", read, (b'{"a": 1}',), ".json", fuzz_tree(fuzz))
    found = fuzz.work(reader, tmp_path, fuzz.Args(inputs=200, keep=tmp_path / "kept"))
    kinds = {what.split(":")[0].split(" in ")[0] for what in found.faults}
    assert {"KeyError", "JSONDecodeError"} <= kinds
    assert any(said.startswith("os.system") for said in found.code_run)
    assert any((tmp_path / "kept").iterdir())


def fuzz_tree(fuzz: ModuleType) -> object:
    return sys.modules[fuzz.Reader.__module__].JSON


def _metrics(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    read_metrics(folder / "metrics.jsonl")


def _checkpoint(folder: Path, content: bytes) -> None:
    (folder / "SHA256SUMS").write_bytes(content)
    read_checkpoint(folder)


def _layers(folder: Path, content: bytes) -> None:
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "hidden_size")
    (folder / "config.json").write_text(
        json.dumps({**dict.fromkeys(names, 8), "num_hidden_layers": int(content), "model_type": "qwen3_moe"})
    )
    read_hf_config(folder, length=8)


def _weights(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / "weights.pt", "w") as archive:
        archive.writestr("weights/data.pkl", content)
        archive.writestr("weights/version", "3")
    load_weights(swin_v2_demo(), folder / "weights.pt", CATALOG)


def _bomb(folder: Path, content: bytes) -> None:
    """Half a GiB of zeros in half a MB."""
    torch.save({"head.weight": torch.zeros(1)}, folder / "good.pt")
    with (
        zipfile.ZipFile(folder / "good.pt") as good,
        zipfile.ZipFile(folder / "b.pt", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for info in good.infolist():
            bad.writestr(info.filename, content * (1 << 20) if "/data/" in info.filename else good.read(info))
    load_weights(swin_v2_demo(), folder / "b.pt", CATALOG)


def _tar(folder: Path, content: bytes) -> None:
    (folder / "x.tar").write_bytes(content)
    TarShards(folder / "x.tar").load(SIZE)


def _header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, said: dict[str, str] | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.pax_headers = kind, size, said or {}
    return info.tobuf(tarfile.PAX_FORMAT if said else tarfile.GNU_FORMAT)


def _index(folder: Path, content: bytes) -> None:
    (folder / "x.tsv").write_bytes(content)
    found = IndexFile(folder / "x.tsv").read([folder / "x.tsv"])
    found.store.file(0)


# The old header of a sparse file says that another block follows.
SPARSE = _header("a.png", tarfile.GNUTYPE_SPARSE)
SPARSE = SPARSE[:148] + b" " * 8 + SPARSE[156:482] + b"\1" + SPARSE[483:]
SPARSE = SPARSE[:148] + b"%06o\0 " % sum(SPARSE) + SPARSE[156:]
BACK = _header("a", b"Z", said={"size": "-1536"})  # to its own beginning
LONG_NAME = _header("x", tarfile.GNUTYPE_LONGNAME, 2) + b"y".ljust(512, b"\0")
FOUND = {  # what fuzzing found, each once a traceback or an endless loop
    "metrics that are no UTF-8": (_metrics, b"\xff\n", "is no JSON"),
    "metrics that are no objects": (_metrics, b"1.5\n", "no JSON object"),
    "lists without end": (_metrics, b"[" * 100_000 + b"\n", "deeper than can be read"),
    "sums of files elsewhere": (_checkpoint, b"0  ../../x\n0  state.json\n0  weights.safetensors\n", "is damaged"),
    "10**12 layers": (_layers, b"1000000000000", "wanted at most 100,000"),
    "a bomb of zeros": (_bomb, b"\0" * 16, "is damaged"),
    "an empty stack of a pickle": (_weights, b"\x80\x02e.", "is damaged"),
    "a member of less than nothing": (_tar, _header("a", b"Z", -512), "says -512 bytes"),
    "a member that leads back": (_tar, _header("a.png") + BACK, "leads back to an earlier one"),
    "names of names without end": (_tar, LONG_NAME * 2000, "is no whole, plain tar file"),
    "a name of an exabyte": (_tar, _header("x", tarfile.GNUTYPE_LONGNAME, 1 << 60), "says 1,152,921,504,606,846,976"),
    "a sparse file that is cut off": (_tar, SPARSE, "is no whole, plain tar file"),
    "no header amid a tar file": (_tar, _header("a.png") + b"x" * 512 + _header("b.png"), "byte 512 is no header"),
    "a picture that is none but a device": (_index, b"/dev/null\tcat\n", "is no plain file"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str, tmp_path: Path) -> None:
    read, content, says = FOUND[name]
    with pytest.raises(ValueError, match=says):
        read(tmp_path, content)


def _more_columns(footer: dict[str, Any]) -> None:
    columns = footer["4:9"][1]["1:9"]
    columns.append(columns[-1])


def _more_rows(footer: dict[str, Any]) -> None:
    footer["3:6"] = footer["4:9"][1]["3:6"] = 1 << 53


def _no_rows(footer: dict[str, Any]) -> None:
    footer["4:9"] = footer["4:9"][:1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_more_columns, "its group 0 has 3 columns, wanted 2"),  # ended the process
        (_more_rows, "its group 0 has 2 rows, and says 9,007,199,254,740,992"),
        (_no_rows, "has one class only, none at all"),
    ],
)
def test_a_footer_of_parquet_that_lies_is_refused(fuzz: ModuleType, tmp_path: Path, change: Any, says: str) -> None:
    apart, together = sys.modules[fuzz.Reader.__module__].PARQUET
    columns = {"image": [b"x"] * 4, "label": ["a", "b"] * 2}
    path = write_parquet(tmp_path / "x.parquet", columns, rows=2)
    pages, footer = apart(path.read_bytes())
    change(footer)
    path.write_bytes(together([pages, footer]))
    with pytest.raises(InputError, match=says):
        ParquetFiles(path).load(SIZE)


def test_a_text_that_all_rows_share_is_held_once(tmp_path: Path) -> None:
    """A dictionary of one class in a file of some KiB would else become a GiB of text."""
    labels = ["a" * (1 << 18), None, "b"] * 1365
    path = write_parquet(tmp_path / "x.parquet", {"image": [b"x"] * len(labels), "label": labels}, rows=len(labels))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        found = ParquetFiles(path).read([path])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 << 20
    assert found.labels.tolist() == [0, -1, 1] * 1365


def test_names_of_classes_can_be_shown_and_put_in_order(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, halves of pairs, and numbers that are too long for Python to parse."""
    (tmp_path / "x.tsv").write_bytes(b"a.png\tcaf\xe9\nb.png\tdog\n")
    assert IndexFile(tmp_path / "x.tsv").read([tmp_path / "x.tsv"]).classes == ("caf\ufffd", "dog")
    members = [("a.png", b""), ("a.json", b'{"label": "\\ud800"}'), ("caf\udce9/b.png", b"")]
    path = write_tar(tmp_path / "x.tar", members, kind=tarfile.GNU_FORMAT)
    assert TarShards(path).read([path]).classes == ("caf\ufffd", "\ufffd")
    assert in_order(["10", "9" * 5000, "09", "9"]) == ["09", "9", "10", "9" * 5000]


def test_a_process_that_dies_is_a_fault(fuzz: ModuleType, monkeypatch) -> None:
    died = subprocess.CompletedProcess([], -11, stdout="", stderr="Segmentation fault")
    monkeypatch.setattr(fuzz.subprocess, "run", lambda *_, **__: died)
    assert "the process ended with -11" in next(iter(fuzz.fuzz("rle", fuzz.Args())["faults"]))


def test_the_page_says_what_the_results_say() -> None:
    lines = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "fuzz.jsonl").read_text().splitlines()]
    page = (ROOT / "docs" / "security.md").read_text()
    (said,) = re.findall(r"\*\*([\d,]+) inputs\*\* over (\d+) readers, (\d+) faults", page)
    assert tuple(int(number.replace(",", "")) for number in said) == (
        sum(line["inputs"] for line in lines if line["engine"] == "hypothesis"),
        len({line["reader"] for line in lines if line["engine"] == "hypothesis"}),
        sum(sum(line["faults"].values()) + len(line["code_run"]) for line in lines),
    )
    assert sum(line["inputs"] for line in lines) >= 10_000
    for one in lines:
        row = f"| `{one['reader']}` | {one['inputs']} | {one['read']} | {one['refused']} | {one['peak_mib']:.0f} |"
        assert one["engine"] == "atheris" or row in page
