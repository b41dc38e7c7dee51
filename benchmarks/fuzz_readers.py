"""The readers of what comes from outside, the valid files that fuzzing starts from, and how these are changed."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fuzz_thrift as thrift
import hypothesis.strategies as st
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_bytes

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Canary:
    """What hostile pickles ask for; a reader must never call it."""

    called: list[int] = field(default_factory=list)


CANARY = Canary()


def sing(*_: Any) -> None:
    """Note that code of a file was run."""
    CANARY.called.append(1)


def clear(error: ValueError) -> None:
    """Hold that an error which a reader caught says something."""
    if not str(error).strip():
        raise AssertionError("an error says nothing") from error


class Evil:
    """Pickles as a call of `sing`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sing, (1,)


class EvilSystem:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("true",)


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 255, 256, 65536, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**31), -(2**63), 10**30),
    *(0.5, -0.5, 1e-320, 1e300, -1e300, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "0",
        "-1",
        "none",
        "../../../etc/passwd",
        "/etc/passwd",
        "C:\\x",
        "a\0b",
        "\ud800",
        "é\u202e",
        "x" * 5000,
    ),
    *("<script>alert(1)</script>", "${7*7}", "__class__", "os.system", "[bold]", "]]>", "\n---\n"),
    *([], {}, [[]], [1, 2, 3, 4], [None], {"kind": "object"}, {"": {}}, [1e9] * 6, list(range(2000))),
)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        name: of it.
        read: reads a file, and looks at all that comes of it.
        files: contents of valid files.
        suffix: of files, for readers that go by it.
        tree: takes a file apart into plain values, and puts them together; None for bytes alone.
    """

    name: str
    read: Callable[[Path], Any]
    files: tuple[bytes, ...]
    suffix: str = ""
    tree: tuple[Callable[[bytes], Any], Callable[[Any], bytes]] | None = None

    def seeds(self, folder: Path) -> Iterator[Path]:
        """Write the valid files."""
        for number, content in enumerate(self.files):
            path = folder / f"seed{number}{self.suffix}"
            path.write_bytes(content)
            yield path

    def mutant(self, draw: Draw) -> bytes:
        """Return a changed file."""
        content = draw(st.sampled_from(self.files))
        if self.tree is not None and draw(st.integers(0, 9)) < 7:
            apart, together = self.tree
            value = apart(content)
            for _ in range(draw(st.integers(1, 3))):
                value = changed_tree(value, draw)
            content = together(value)
            if draw(st.integers(0, 4)) < 4:
                return content
        for _ in range(draw(st.integers(1, 4))):
            content = changed_bytes(content, draw)
        return content


def changed_bytes(content: bytes, draw: Draw) -> bytes:
    """Flip, cut, insert, repeat or overwrite some bytes."""
    if not content:
        return draw(st.binary(max_size=64))
    at, size = draw(st.integers(0, len(content) - 1)), draw(st.sampled_from((1, 1, 2, 4, 8, 64)))
    how = draw(st.integers(0, 7))
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + draw(st.binary(max_size=16)) + content[at:]
    if how == 2:
        return content[:at] + content[at : at + size] * draw(st.integers(2, 40)) + content[at + size :]
    if how == 3:
        return content[:at] + content[at + size :]
    if how == 4:
        return content[:at] + draw(st.sampled_from((b"\xff", b"\0", b"\x7f", b"\x80"))) * size + content[at + size :]
    if how == 5:
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if how == 6:
        number = draw(st.sampled_from((2**16 - 1, 2**31 - 1, 2**32 - 1)))
        return content[:at] + number.to_bytes(4, draw(st.sampled_from(("big", "little")))) + content[at + 4 :]
    return (
        content[:at]
        + draw(
            st.sampled_from(
                (b"9" * 5000, b"-1", b"1e999", b"[" * 100_000, b'{"a":' * 100_000, b"<a>" * 50_000, b"&#0;")
            )
        )
        + content[at:]
    )


def changed_tree(value: Any, draw: Draw) -> Any:
    """Put a hostile value somewhere into nested lists and mappings, or take something out, or in twice."""
    value = copy.deepcopy(value)
    holder, key = None, None
    here = value
    while isinstance(here, dict | list) and here and (holder is None or draw(st.integers(0, 4)) > 0):
        key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(min(len(here), 5000))))
        holder, here = here, here[key]
    if holder is None:
        return draw(st.sampled_from(HOSTILE))
    how = draw(st.integers(0, 5))
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, list):
        holder.extend(copy.deepcopy([here] * draw(st.integers(1, 30))))
    elif how == 1:
        holder[draw(st.sampled_from(("", "kind", "extra", "id", "__proto__", "a\0")))] = here
    elif how == 2 and isinstance(here, int | float):
        holder[key] = here * draw(st.sampled_from((-1, 0, 1000, 1_000_003, 0.37)))
    else:
        holder[key] = draw(st.sampled_from(HOSTILE))
    return value


# trees


def _json_out(value: Any) -> bytes:
    return json.dumps(value).encode()


JSON = (json.loads, _json_out)


def _lines_apart(content: bytes) -> Any:
    lines, _, last = content.partition(b"\n\n")
    return [[json.loads(line) for line in lines.splitlines()], json.loads(last)]


def _lines_out(value: Any) -> bytes:
    """Write the lines of metrics, an empty one, and a summary."""
    lines, last = [*value, [], {}][:2] if isinstance(value, list) else ([], value)
    each = lines if isinstance(lines, list) else [lines]
    return b"\n".join([*map(_json_out, each), b"", _json_out(last)])


LINES = (_lines_apart, _lines_out)


def _safetensors_apart(content: bytes) -> Any:
    (size,) = struct.unpack("<Q", content[:8])
    return [json.loads(content[8 : 8 + size]), content[8 + size :].hex()]


def _safetensors_together(value: Any) -> bytes:
    header, body = [*value, {}, ""][:2] if isinstance(value, list) else (value, "")
    said = json.dumps(header).encode()
    rest = bytes.fromhex(body) if isinstance(body, str) and HEX.fullmatch(body) else b""
    return struct.pack("<Q", len(said)) + said + rest


SAFETENSORS = (_safetensors_apart, _safetensors_together)


def _xml_apart(content: bytes) -> Any:
    return re.split(r"(<[^>]*>)", content.decode("latin-1"))


def _xml_together(value: Any) -> bytes:
    parts = value if isinstance(value, list) else [value]
    return "".join(map(str, parts)).encode("utf-8", "replace")


XML = (_xml_apart, _xml_together)


def _zip_apart(content: bytes) -> Any:
    """Take a checkpoint of torch apart; bytes are written as numbers."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        found = {info.filename: archive.read(info) for info in archive.infolist()}
    return [[name, list(raw) if name.endswith(".pkl") else raw.hex()] for name, raw in found.items()]


HEX = re.compile(r"(?:[0-9a-f]{2})*")


def _zip_together(value: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for entry in value if isinstance(value, list) else []:
            name, body = [*entry, "x", []][:2] if isinstance(entry, list) else ("x", [])
            if isinstance(body, str):
                raw = bytes.fromhex(body) if HEX.fullmatch(body) else body.encode("utf-8", "replace")
            else:
                raw = bytes(n % 256 if isinstance(n, int) else 0 for n in (body if isinstance(body, list) else [0]))
            text = str(name).replace("\0", "").encode("utf-8", "replace").decode() or "x"
            if text not in archive.namelist():
                archive.writestr(zipfile.ZipInfo(text), raw)
    return file.getvalue()


ZIP = (_zip_apart, _zip_together)


def _tar_apart(content: bytes) -> Any:
    """Take a tar file apart: what its headers say, and what follows each."""
    found, at = [], 0
    while len(header := content[at : at + 512]) == 512 and header.strip(b"\0"):
        size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
        says = {key: header[a:b].rstrip(b"\0").decode("latin-1") for key, (a, b) in TAR_FIELDS.items()}
        found.append([{**says, "size": size}, content[at + 512 : at + 512 + size].decode("latin-1")])
        at += 512 + -(-size // 512) * 512
    return found


def _tar_together(value: Any) -> bytes:
    """Write members whose checksums are right, so that what else their headers say is read."""
    out = bytearray()
    for entry in value if isinstance(value, list) else [value]:
        says, body = [*entry, "", ""][:2] if isinstance(entry, list) else (entry, "")
        header = bytearray(512)
        for key, own in says.items() if isinstance(says, dict) else ():
            start, end = TAR_FIELDS.get(key, (124, 136))
            header[start:end] = _tar_field(own, end - start)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        raw = _raw(body)
        out += header + raw + bytes(-len(raw) % 512)
    return bytes(out) + bytes(1024)


def _tar_field(value: Any, width: int) -> bytes:
    """Write a number in octal, or as GNU does where it is negative or too large; all else as text."""
    if isinstance(value, int) and 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    if isinstance(value, int) and width > 1:
        sign = b"\xff" if value < 0 else b"\x80"
        return sign + (value % 256 ** (width - 1)).to_bytes(width - 1, "big")
    return _raw(value)[:width].ljust(width, b"\0")


def _raw(value: Any) -> bytes:
    return str(value).encode("latin-1", "backslashreplace")


TAR_FIELDS = {"name": (0, 100), "type": (156, 157), "link": (157, 257), "magic": (257, 265), "prefix": (345, 500)}
TAR = (_tar_apart, _tar_together)


def _parquet_apart(content: bytes) -> Any:
    """Take a parquet file apart into its pages and its footer, which is a struct of Thrift."""
    size = int.from_bytes(content[-8:-4], "little")
    return [content[: -8 - size].decode("latin-1"), thrift.read(content[-8 - size : -8])]


def _parquet_together(value: Any) -> bytes:
    pages, footer = [*value, "", {}][:2] if isinstance(value, list) else ("", value)
    raw = thrift.written(footer)
    return _raw(pages) + raw + len(raw).to_bytes(4, "little") + b"PAR1"


PARQUET = (_parquet_apart, _parquet_together)


def _words_apart(content: bytes) -> Any:
    return re.split(r"([\t, \r\n]+)", content.decode("latin-1"))


WORDS = (_words_apart, lambda value: b"".join(map(_raw, value if isinstance(value, list) else [value])))


# readers


def picture(kind: str, mode: str = "RGB", **named: Any) -> bytes:
    """Return a small picture file."""
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, (12, 17, 3), dtype=np.uint8)
    Image.fromarray(values).convert(mode).save(file, kind, **named)
    return file.getvalue()


def images() -> Reader:
    """Pictures, as training and prediction read them."""
    from synchromesh.data.files import header, read_picture

    def read(path: Path) -> None:
        header(path)
        for channels in (1, 3):
            read_picture(path, channels)
        read_picture(path, 3, draft=4, upright=False)

    kinds = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    more = (picture("PNG", "LA"), picture("PNG", "P"), picture("TIFF", "L"), picture("PNG", "I;16"))
    return Reader("images", read, (*map(picture, kinds), *more), ".img")


def _picture_folder(path: Path) -> Path:
    folder = path.parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        if not (folder / name).exists():
            (folder / name).write_bytes(picture("PNG"))
    return folder


COCO = {
    "images": [{"id": n, "file_name": name, "height": 12, "width": 17} for n, name in enumerate(("a.png", "b.png"))],
    "annotations": [
        {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0,
         "segmentation": [[1, 2, 6, 2, 6, 8, 1, 8]]},
        {"id": 2, "image_id": 1, "category_id": 5, "bbox": [0, 0, 17, 12], "area": 9, "iscrowd": 1,
         "segmentation": {"size": [12, 17], "counts": [100, 9, 95]}},
        {"id": 3, "image_id": 1, "category_id": 5, "bbox": [0, 0, 3, 3], "area": 9, "iscrowd": 0,
         "segmentation": {"size": [12, 17], "counts": "T39o2"}},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
}  # fmt: skip


def coco_json() -> Reader:
    """COCO's objects: boxes, polygons, run lengths."""
    from synchromesh.data.coco_json import CocoJson
    from synchromesh.data.picture_files import read_annotated

    def read(path: Path) -> None:
        for one in CocoJson(path, _picture_folder(path)).load().pictures:
            read_annotated(one.path, 3, (one.height, one.width))
            for thing in one.objects:
                if thing.region is not None:
                    thing.region.mask(one.height, one.width)

    return Reader("coco_json", read, (json.dumps(COCO).encode(),), ".json", JSON)


def coco_panoptic() -> Reader:
    """COCO's panoptic json, and its files of ids."""
    from synchromesh.data.coco_panoptic import CocoPanoptic

    segments = [{"id": 1, "category_id": 3, "iscrowd": 0, "area": 9, "bbox": [0, 0, 3, 3]}]
    found = {
        "images": COCO["images"],
        "annotations": [{"image_id": n, "file_name": name, "segments_info": segments}
                        for n, name in enumerate(("a.png", "b.png"))],
        "categories": [{"id": 3, "name": "cat", "isthing": 1}, {"id": 5, "name": "sky", "isthing": 0}],
    }  # fmt: skip

    def read(path: Path) -> None:
        folder = _picture_folder(path)
        for one in CocoPanoptic(path, folder, folder).load().pictures:
            try:
                one.opened(3)
            except ValueError as error:
                clear(error)

    return Reader("coco_panoptic", read, (json.dumps(found).encode(),), ".json", JSON)


def rle() -> Reader:
    """COCO's compressed run lengths."""
    from synchromesh.data.regions import RunLengths

    def read(path: Path) -> None:
        found = RunLengths.parsed(path.read_bytes(), 12, 17)
        found.mask(12, 17)
        assert RunLengths.parsed(found.compressed(), 12, 17).area() == found.area()

    rng = np.random.default_rng(0)
    masks = [RunLengths.of(rng.random((12, 17)) < share) for share in (0.1, 0.5, 0.9)]
    return Reader("rle", read, tuple(mask.compressed().encode() for mask in masks))


VOC = b"""<annotation><filename>a.png</filename><size><width>17</width><height>12</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"""
BOMB = b'<!DOCTYPE a [<!ENTITY b "cccccccc"><!ENTITY d "&b;&b;&b;">]>' + VOC.replace(b"cat", b"&d;")


def voc() -> Reader:
    """VOC's XML files."""
    from synchromesh.data.voc import VocFolder

    def read(path: Path) -> None:
        root = path.parent / "voc"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages" / "a.png").write_bytes(picture("PNG"))
        (root / "ImageSets" / "Main" / "train.txt").write_text("a\n")
        (root / "Annotations" / "a.xml").write_bytes(path.read_bytes())
        VocFolder(root, classes=("cat",)).load()
        VocFolder(root).load()

    return Reader("voc", read, (VOC,), ".xml", XML)


def labels() -> Reader:
    """Label maps: indices, ids, colours."""
    from synchromesh.data import label_files
    from synchromesh.data.label_maps import LabelCoding

    def read(path: Path) -> None:
        said = []
        calls = (label_files.read_indices, label_files.read_ids, label_files.read_colors, label_files.read_values)
        for call in (*calls, LabelCoding.of({n: n for n in range(250)}, 250).read):
            try:
                call(path)
            except ValueError as error:
                clear(error)
                said.append(error)
        if len(said) > 4:
            raise said[0]

    files = (picture("PNG", "L"), picture("PNG", "P"), picture("PNG"), picture("PNG", "I;16"))
    return Reader("labels", read, files, ".png")


def depth() -> Reader:
    """Maps of depth."""
    from synchromesh.data.depth_maps import DepthPng

    return Reader("depth", lambda path: DepthPng(path, 0.001).read(), (picture("PNG", "I;16"),), ".png")


def _small() -> Any:
    from synchromesh.models.heads.classifier import Classifier
    from synchromesh.models.mixtures import ExpertsConfig
    from synchromesh.models.swin_v2 import SwinV2Config

    torch.manual_seed(0)
    experts = ExpertsConfig(num_experts=2, blocks=((0,),))
    config = SwinV2Config(image_size=8, in_channels=1, embed_dim=8, depths=(1,), num_heads=(2,), window_size=2,
                          experts=experts)  # fmt: skip
    return Classifier(config.build(), 3)


def _catalog() -> Any:
    from synchromesh.recipes.catalog import CATALOG

    return CATALOG


def _torch_file(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _evil_zip(good: bytes, evil: Any) -> bytes:
    """Return a checkpoint whose pickle calls something."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as archive, zipfile.ZipFile(file, "w") as out:
        for info in archive.infolist():
            body = pickle.dumps({"model": evil}) if info.filename.endswith("data.pkl") else archive.read(info)
            out.writestr(zipfile.ZipInfo(info.filename), body)
    return file.getvalue()


def weights_safetensors() -> Reader:
    """`--start.weights FILE.safetensors`."""
    from synchromesh.training.start import load_weights

    model = _small()
    return Reader(
        "weights_safetensors",
        lambda path: load_weights(model, path, _catalog(), partial=True),
        (save_bytes({name: t.contiguous() for name, t in model.state_dict().items()}),),
        ".safetensors",
        SAFETENSORS,
    )


def weights_torch() -> Reader:
    """`--start.weights FILE.pt`, hostile pickles among them."""
    from synchromesh.training.start import load_weights

    model = _small()
    good = _torch_file({"model": model.state_dict()})

    def read(path: Path) -> None:
        for hostile in (Evil(), EvilSystem()):
            (path.parent / "evil.pt").write_bytes(_evil_zip(good, hostile))
            try:
                load_weights(model, path.parent / "evil.pt", _catalog(), partial=True)
            except ValueError as error:
                clear(error)
        load_weights(model, path, _catalog(), partial=True)

    return Reader("weights_torch", read, (good,), ".pt", ZIP)


def swin() -> Reader:
    """Files of the released Swin-MoE, whose pickles hold objects."""
    from synchromesh.compat.swin import read_swin

    return _pickled("swin", read_swin)


def unpickle() -> Reader:
    """Checkpoints whose pickles are not trusted."""
    from synchromesh.compat.unpickle import load_inert

    return _pickled("unpickle", load_inert)


def _pickled(name: str, load: Callable[[Path], Any]) -> Reader:
    import tempfile

    from synchromesh.compat.swin import save_swin

    with tempfile.TemporaryDirectory() as folder:
        save_swin(_small(), Path(folder) / "a.pth", ranks=1, everything=True)
        good = next(Path(folder).iterdir()).read_bytes()
    evil = tuple(_evil_zip(good, one) for one in (Evil(), EvilSystem()))

    def read(path: Path) -> None:
        for hostile in evil:
            (path.parent / "evil.pth").write_bytes(hostile)
            try:
                load(path.parent / "evil.pth")
            except ValueError as error:
                clear(error)
        load(path)

    return Reader(name, read, (good,), ".pth", ZIP)


def tutel() -> Reader:
    """Checkpoints of Tutel's ranks."""
    from synchromesh.compat.tutel.checkpoint.files import inside, read
    from synchromesh.compat.tutel.checkpoint.reshard import gather, scatter

    layer = {
        "moe._num_global_experts": torch.tensor(2),
        "moe.experts.batched_fc1_w": torch.zeros(2, 4, 3),
        "moe.experts.batched_fc2_w": torch.zeros(2, 4, 3),
        "moe.experts.batched_fc1_bias": torch.zeros(2, 4),
        "moe.experts.batched_fc2_bias": torch.zeros(2, 3),
        "moe.gates.0.wg.weight": torch.zeros(2, 3),
    }

    def convert(path: Path) -> None:
        for _ in scatter(gather([inside(read(path), "model", path)]), 2):
            pass

    return Reader("tutel", convert, (_torch_file({"model": layer}),), ".pt", ZIP)


def mmdetection() -> Reader:
    """Weights of mmdetection: names and shapes, out of a safe file."""
    from synchromesh.compat.mmdetection import from_mmdetection
    from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
    from synchromesh.training.start import _read  # the dictionary alone

    with torch.device("meta"):
        model = CascadeMaskRCNN().build(_small().backbone, 2)
    state = {
        "neck.lateral_convs.0.conv.weight": torch.zeros(4, 8, 1, 1),
        "roi_head.bbox_head.0.shared_convs.0.conv.weight": torch.zeros(4, 4, 3, 3),
        "backbone.patch_embed.proj.weight": torch.zeros(8, 1, 4, 4),
        "backbone.norm0.weight": torch.zeros(8),
    }

    def read(path: Path) -> None:
        try:
            from_mmdetection(_read(path, _catalog()), model)
        except ValueError as error:
            clear(error)

    return Reader("mmdetection", read, (save_bytes(state),), ".safetensors", SAFETENSORS)


def _trained(folder: Path) -> Path:
    """Write the checkpoint of a small model."""
    from synchromesh.parallel.store import model_tensors
    from synchromesh.tasks.classification import Classification
    from synchromesh.training.agree import ALONE
    from synchromesh.training.checkpoint import Snapshot, write_checkpoint
    from synchromesh.training.run_folder import identity

    model = _small()
    facts = {"classes": ["a", "b", "c"]}
    state = {"step": 1, **identity(Classification(), model.backbone.config, facts)}
    return write_checkpoint(folder, Snapshot(state, model_tensors(model, ALONE), {}))


def checkpoint_state() -> Reader:
    """state.json of a checkpoint, with the right checksums: an attacker writes those too."""
    import tempfile

    from synchromesh.training.durable import sha256
    from synchromesh.training.run_folder import load_trained

    holder = tempfile.TemporaryDirectory()
    found = _trained(Path(holder.name))

    def read(path: Path, _: Any = holder) -> None:
        (found / "state.json").write_bytes(path.read_bytes())
        names = ("weights.safetensors", "state.json")
        (found / "SHA256SUMS").write_text("".join(f"{sha256(found / name)}  {name}\n" for name in names))
        load_trained(found, _catalog())

    return Reader("checkpoint_state", read, ((found / "state.json").read_bytes(),), ".json", JSON)


def checkpoint_files() -> Reader:
    """SHA256SUMS and the weights of a checkpoint."""
    import tempfile

    from synchromesh.training.run_folder import load_trained

    holder = tempfile.TemporaryDirectory()
    found = _trained(Path(holder.name))
    sums, weights = ((found / name).read_bytes() for name in ("SHA256SUMS", "weights.safetensors"))

    def read(path: Path, _: Any = holder) -> None:
        from synchromesh.training.durable import sha256

        content = path.read_bytes()
        (found / "SHA256SUMS").write_bytes(sums)
        (found / "weights.safetensors").write_bytes(weights)
        if content[:1].isalnum() and b"__metadata__" not in content:
            (found / "SHA256SUMS").write_bytes(content)
        else:
            (found / "weights.safetensors").write_bytes(content)
            names = ("weights.safetensors", "state.json")
            (found / "SHA256SUMS").write_text("".join(f"{sha256(found / name)}  {name}\n" for name in names))
        load_trained(found, _catalog())

    return Reader("checkpoint_files", read, (sums, weights), ".bin")


def hub_folder() -> Reader:
    """config.json of a pulled model."""
    return _hub("hub_config", "config.json", JSON)


def hub_weights() -> Reader:
    """model.safetensors of a pulled model."""
    return _hub("hub_weights", "model.safetensors", SAFETENSORS)


def _hub(name: str, file: str, tree: Any) -> Reader:
    import tempfile

    from synchromesh.tasks.classification import Classification
    from synchromesh.training.hub_folder import Published, read_hub_folder, write_hub_folder
    from synchromesh.training.run_folder import Trained

    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name) / "model"
    model = _small()
    trained = Trained(model, Classification(), {"classes": ["a", "b", "c"]}, folder)
    write_hub_folder(folder, Published(trained, model.backbone.config, None), "card")
    good = (folder / file).read_bytes()

    def read(path: Path, _: Any = holder) -> None:
        (folder / file).write_bytes(path.read_bytes())
        read_hub_folder(folder, _catalog())

    return Reader(name, read, (good,), Path(file).suffix, tree)


def recipe() -> Reader:
    """recipe.json of a run, and a file of settings."""
    from synchromesh.commands.options import read_file
    from synchromesh.recipes.digits import digits
    from synchromesh.recipes.segment_demo import segment_demo
    from synchromesh.training.codec import encode
    from synchromesh.training.run_folder import read_config

    def read(path: Path) -> None:
        folder = path.parent / "recipe_run"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.json").write_bytes(path.read_bytes())
        try:
            read_file(path, None, _catalog())
        except ValueError as error:
            clear(error)
        read_config(folder, _catalog())

    files = tuple(json.dumps(encode(make())).encode() for make in (digits, segment_demo))
    return Reader("recipe", read, files, ".json", JSON)


def run_folder() -> Reader:
    """summary.json and metrics.jsonl of a run, as its report reads them."""
    from synchromesh.recipes.digits import digits
    from synchromesh.training.codec import encode
    from synchromesh.training.report import write_report

    line = {"kind": "train", "step": 1, "epoch": 0.5, "loss": 1.0, "learning_rate": 1e-3, "seconds": 1.0,
            "images_per_second": 5.0, "drop_rate": 0.0, "load": {"backbone.x.ffn": [0.5, 0.5]}}  # fmt: skip
    test = {"kind": "test", "step": 1, "epoch": 0.5, "accuracy": 0.5, "loss": 1.0, "seconds": 2.0, "drop_rate": 0.0,
            "images_per_second": 5.0, "load": {"backbone.x.ffn": [0.5, 0.5]}}  # fmt: skip
    summary = {
        "test_images": 9, "test_accuracy": 0.5, "test_loss": 1.0, "epochs": 1, "train_seconds": 1.0, "device": "cpu",
        "images_per_second": 1.0, "dead_experts": 0, "evaluated_images_per_second": 1.0, "best_accuracy": 0.5,
        "parameters": 5, "active_parameters": 5, "test_load": {"backbone.x.ffn": [0.5, 0.5]},
        "pictures": {"x.png": "<b>"},
        "panels": [{"kind": "Sheet", "title": "t", "columns": ["a"], "rows": [["<script>alert"]]}],
    }  # fmt: skip

    def read(path: Path) -> None:
        folder = path.parent / "run"
        folder.mkdir(exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(encode(digits())))
        lines, _, said = path.read_bytes().partition(b"\n\n")
        (folder / "metrics.jsonl").write_bytes(lines + b"\n")
        (folder / "summary.json").write_bytes(said)
        assert "<script>alert" not in write_report(folder, _catalog()).read_text()

    return Reader("run_folder", read, (_lines_out([[line, test], summary]),), ".json", LINES)


def cluster() -> Reader:
    """Profiles of clusters, and a plan on them."""
    from importlib import resources

    from synchromesh.planning.cluster import load_profile

    folder = resources.files("synchromesh.planning").joinpath("profiles")
    files = tuple(file.read_bytes() for file in folder.iterdir() if file.name.endswith(".json"))

    def read(path: Path) -> None:
        found = load_profile(path)
        found.rate_of(next(iter(found.matmul), "float32"))
        found.node.message.at(1e6)

    return Reader("cluster", read, files, ".json", JSON)


def plans() -> Reader:
    """plans.json of a run."""
    from synchromesh.planning.dictionary import Dictionary
    from synchromesh.planning.lattice import Ranks
    from synchromesh.planning.tuner import Entry, Trial
    from synchromesh.types import Plan, Workload

    work = Workload(7, 1, 8, 16, 4, torch.float32, True)
    trials = [Trial(Plan(1), 1e-3, [2e-3]), Trial(Plan(2), 1e-3)]
    known = Dictionary(Ranks(2, 2), {"layer": {work: Entry(trials, Plan(1))}}, {"layer": [(0, Plan(1))]})

    def read(path: Path) -> None:
        found = Dictionary.from_json(path.read_text(errors="replace"))
        Dictionary.from_json(found.to_json())

    return Reader("plans", read, (known.to_json().encode(),), ".json", JSON)


def hf_config() -> Reader:
    """config.json of a Hugging Face model."""
    from synchromesh.compat.hf_config import read_hf_config

    found = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
             "vocab_size": 32000, "head_dim": 128, "first_k_dense_replace": 1, "decoder_sparse_step": 1,
             "mlp_only_layers": [0], "n_shared_experts": 1}  # fmt: skip
    return Reader(
        "hf_config", lambda path: read_hf_config(path, length=128), (json.dumps(found).encode(),), ".json", JSON
    )


def parquet() -> Reader:
    """Parquet files of pictures and classes, with and without what Hugging Face's `datasets` says of them."""
    from synchromesh.data.parquet import ParquetFiles
    from synchromesh.testing.packed import CLASSES, encoded, parquet_of, write_parquet

    pictures = encoded(6, size=(12, 17))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    columns = {"image": [content for _, content, _ in pictures], "label": [label for *_, label in pictures]}
    said = json.dumps({"info": {"features": features}}).encode()

    def files(folder: Path) -> Iterator[Path]:
        yield parquet_of(folder / "a.parquet", pictures, rows=2)
        yield write_parquet(folder / "b.parquet", columns, rows=4, metadata=said)
        yield write_parquet(folder / "c.parquet", {**columns, "id": [None, "a", *"bcde"]}, rows=6)

    return Reader("parquet", partial(_packed, ParquetFiles), _written(files), ".parquet", PARQUET)


def tar_shards() -> Reader:
    """Tar files as WebDataset has them, with the long names of GNU and of pax."""
    from synchromesh.data.tar_shards import TarShards
    from synchromesh.testing.packed import encoded, tar_of, write_tar

    pictures = encoded(4, size=(12, 17))
    named = [(f"{'long/' * 40}{label}/\u00e9{n}.{end}", content) for n, (end, content, label) in enumerate(pictures)]
    told = [(f"{n}.json", json.dumps({"label": label}).encode()) for n, (*_, label) in enumerate(pictures)]
    both = [one for n, (end, content, _) in enumerate(pictures) for one in ((f"{n}.{end}", content), told[n])]

    def files(folder: Path) -> Iterator[Path]:
        yield tar_of(folder / "a.tar", pictures)
        yield write_tar(folder / "b.tar", both)
        for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
            yield write_tar(folder / f"{number}.tar", named, kind=kind)

    return Reader("tar_shards", partial(_packed, TarShards), _written(files), ".tar", TAR)


def index_file() -> Reader:
    """Lists of pictures and classes."""
    from synchromesh.data.index_file import IndexFile

    def read(path: Path) -> None:
        _picture_folder(path)
        _packed(IndexFile, path)

    names = [f"pictures/{name}.png" for name in "abab"]
    files = tuple(
        "".join(f"{name}{mark}{n % 2 + 9}{end}" for n, name in enumerate(names)).encode()
        for mark, end in (("\t", "\n"), (",", "\r\n"), (" ", "\n\n"))
    )
    return Reader("index_file", read, files, ".tsv", WORDS)


def _written(files: Callable[[Path], Iterator[Path]]) -> tuple[bytes, ...]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return tuple(path.read_bytes() for path in files(Path(folder)))


def _packed(kind: Callable[[Path], Any], path: Path) -> None:
    """List the pictures of a file, divide them, and decode each; only InputError may refuse one of these."""
    from synchromesh.data.files import read_picture
    from synchromesh.data.images import Preprocess
    from synchromesh.errors import InputError

    refused = []

    def tried(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except InputError as error:
            clear(error)
            refused.append(error)
        except ValueError as error:
            raise AssertionError(f"{type(error).__name__} instead of InputError: {error}") from error

    whole = tried(lambda: kind(path).read([path]))
    if whole is None:
        raise refused[0]
    "".join(whole.classes).encode()  # can be printed
    assert len(whole.store) == len(whole.labels)
    grouped = whole.store.groups()
    assert grouped is None or len(grouped[0]) == len(whole.store)
    tried(lambda: kind(path).load(Preprocess(8, 3, 1.0, (0.5,) * 3, (0.5,) * 3)))
    for number in range(min(len(whole.store), 100)):
        assert whole.store.name(number)
        tried(lambda number=number: read_picture(whole.store.file(number), 3))
    if len(refused) > len(whole.store):
        raise refused[-1]


READERS: Mapping[str, Callable[[], Reader]] = MappingProxyType(
    {
        "images": images,
        "coco_json": coco_json,
        "coco_panoptic": coco_panoptic,
        "rle": rle,
        "voc": voc,
        "labels": labels,
        "depth": depth,
        "weights_safetensors": weights_safetensors,
        "weights_torch": weights_torch,
        "swin": swin,
        "unpickle": unpickle,
        "tutel": tutel,
        "mmdetection": mmdetection,
        "checkpoint_state": checkpoint_state,
        "checkpoint_files": checkpoint_files,
        "hub_config": hub_folder,
        "hub_weights": hub_weights,
        "recipe": recipe,
        "run_folder": run_folder,
        "cluster": cluster,
        "plans": plans,
        "hf_config": hf_config,
        "parquet": parquet,
        "tar_shards": tar_shards,
        "index_file": index_file,
    }
)
