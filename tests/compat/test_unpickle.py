"""Files that torch.save wrote, honest and hostile: tensors come out as they went in, and nothing is run."""

import copyreg
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from synchromesh.compat.unpickle import Inert, _Unpickler, load_inert


class CfgNode(dict):
    """A configuration as training scripts keep it: a dictionary with attributes of its own."""

    def __init__(self, values=()):
        super().__init__(values)
        self.frozen = True


class Plain:
    def __init__(self):
        self.rate = 0.5


class Slotted:
    __slots__ = ("rate",)

    def __init__(self):
        self.rate = 0.5


class Runs:
    """Runs a function of the caller's choice where it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Appends(list):
    pass


def saved(tmp_path: Path, value: object, **how: object) -> Path:
    torch.save(value, tmp_path / "file.pth", **how)
    return tmp_path / "file.pth"


TENSORS = {
    "float64": torch.randn(3, 4, dtype=torch.float64),
    "float32": torch.randn(2, 3, 4),
    "bfloat16": torch.randn(5).to(torch.bfloat16),
    "float16": torch.randn(5).half(),
    "int64": torch.arange(7),
    "int32": torch.arange(7, dtype=torch.int32),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 5).t(),
    "slice": torch.randn(10, 4)[3:5, 1:],
    "expanded": torch.randn(1, 4).expand(3, 4),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_containers_come_out_as_they_went_in(tmp_path, zipped):
    state = OrderedDict(TENSORS)
    value = {"model": state, "epoch": 3, "names": ("a", ["b", {1, 2}], None), "dtype": torch.float16}
    got = load_inert(saved(tmp_path, value, _use_new_zipfile_serialization=zipped))
    assert {name: value[name] for name in ("epoch", "names", "dtype")} == {
        k: got[k] for k in ("epoch", "names", "dtype")
    }
    assert list(got["model"]) == list(state)
    for name, tensor in state.items():
        assert got["model"][name].dtype == tensor.dtype
        assert torch.equal(got["model"][name], tensor), name


def test_parameters_and_shared_storages_come_out_as_tensors(tmp_path):
    whole = torch.randn(6)
    got = load_inert(saved(tmp_path, {"p": nn.Parameter(whole), "part": whole[2:], "size": whole.shape}))
    assert torch.equal(got["p"], whole)
    assert got["p"].untyped_storage().data_ptr() == got["part"].untyped_storage().data_ptr()
    assert got["size"] == (6,)


def test_a_module_and_its_optimizer_state_come_out(tmp_path):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    got = load_inert(saved(tmp_path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    assert torch.equal(got["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_an_object_of_another_class_is_inert(tmp_path):
    config = CfgNode({"MODEL": CfgNode({"NAME": "swin"}), "LR": 0.1})
    value = {
        "model": {"w": torch.ones(2)},
        "config": config,
        "plain": Plain(),
        "slotted": Slotted(),
        "keyed": {Plain: 1},
    }
    got = load_inert(saved(tmp_path, value | {"list": Appends([1, 2])}))
    assert torch.equal(got["model"]["w"], torch.ones(2))
    assert isinstance(got["config"], Inert)
    assert got["config"].origin.endswith("CfgNode")
    assert got["config"]["MODEL"]["NAME"] == "swin"
    assert got["config"]["frozen"] is True
    assert got["plain"]["rate"] == got["slotted"]["rate"] == 0.5
    assert got["list"]["items"] == [1, 2]
    assert list(got["keyed"].values()) == [1]


HOSTILE = {
    "os.system": lambda mark: Runs(os.system, f"touch {mark}"),
    "eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Runs(open, str(mark), "w"),
    "getattr": lambda mark: Runs(getattr, Runs(__import__, "os"), "system"),
    "torch.load": lambda mark: Runs(torch.load, str(mark)),
    "a class of torch": lambda mark: Runs(nn.Linear, 3, 3),
    "reconstructor": lambda mark: Runs(copyreg._reconstructor, Plain, object, None),
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_runs_nothing(tmp_path, hostile, protocol):
    mark = tmp_path / "mark"
    value = {"config": HOSTILE[hostile](mark)}
    if protocol == 2:
        path = saved(tmp_path, value | {"model": {"w": torch.ones(2)}})
    else:
        path = archive(tmp_path, pickle.dumps(value, protocol=protocol))
    got = load_inert(path)
    assert not mark.exists()
    assert isinstance(got["config"], Inert)


def archive(tmp_path: Path, pickled: bytes, **how: object) -> Path:
    with zipfile.ZipFile(tmp_path / "file.pth", "w", **how) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
    return tmp_path / "file.pth"


@pytest.mark.parametrize("hostile", ["os.system", "eval", "open"])
def test_a_hostile_file_in_the_old_format_is_refused_and_runs_nothing(tmp_path, hostile):
    mark = tmp_path / "mark"
    path = saved(tmp_path, {"config": HOSTILE[hostile](mark)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6 .* where it is trusted") as raised:
        load_inert(path)
    assert "weights_only" not in str(raised.value)
    assert not mark.exists()


def test_the_same_file_does_run_its_code_under_plain_unpickling(tmp_path):
    """The hostile files above are hostile."""
    mark = tmp_path / "mark"
    torch.load(saved(tmp_path, HOSTILE["os.system"](mark)), weights_only=False)
    assert mark.exists()


class Ids(pickle.Pickler):
    """Writes storages by reference, as torch does, with whatever the test wants in the reference."""

    def persistent_id(self, value):
        return value.reference if isinstance(value, Reference) else None


class Reference:
    def __init__(self, *reference):
        self.reference = reference


def made_of(*arguments: object) -> bytes:
    """A pickle that rebuilds a tensor from these arguments."""
    buffer = io.BytesIO()
    Ids(buffer, protocol=2).dump({"w": Runs(torch._utils._rebuild_tensor_v2, *arguments)})
    return buffer.getvalue()


STORED = Reference("storage", torch.FloatStorage, "0", "cpu", 4)


def test_tensors_are_read_at_their_offset_and_stride(tmp_path):
    got = load_inert(archive(tmp_path, made_of(STORED, 1, (3,), (1,), False, None)))
    assert got["w"].tolist() == [1, 2, 3]


BROKEN = {
    "too long": made_of(STORED, 0, (5,), (1,), False, None),
    "offset past the end": made_of(STORED, 4, (1,), (1,), False, None),
    "negative offset": made_of(STORED, -1, (1,), (1,), False, None),
    "negative stride": made_of(STORED, 3, (2,), (-1,), False, None),
    "no such storage": made_of(Reference("storage", torch.FloatStorage, "7", "cpu", 4), 0, (1,), (1,), False, None),
    "a module instead of a storage": made_of(Reference("module", nn.Linear, "x", "y", 4), 0, (1,), (1,), False, None),
    "a string as a storage": made_of("0", 0, (1,), (1,), False, None),
    "cut off": made_of(STORED, 0, (1,), (1,), False, None)[:-20],
    "nothing": b"",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_damaged_file_is_named(tmp_path, broken):
    with pytest.raises(ValueError, match=r"file\.pth is not a whole checkpoint"):
        load_inert(archive(tmp_path, BROKEN[broken]))


@pytest.mark.parametrize("called", ["torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "torch\nSize"])
def test_a_pickle_changes_no_function_and_no_class_of_ours(tmp_path, called):
    """The opcode b sets attributes of whatever lies on the stack: those of its dictionary, or by setattr."""
    for state in (b"}S'mark'\nI1\ns", b"(N}S'mark'\nI1\nst"):
        with suppress(ValueError):
            load_inert(archive(tmp_path, b"c" + called.encode() + b"\n" + state + b"b."))
    assert not any(hasattr(ours, "mark") for ours in (_Unpickler._tensor, OrderedDict, tuple))


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.complex64, "torch.ComplexFloatStorage"), (torch.float8_e4m3fn, "torch.storage.UntypedStorage")],
)
def test_a_tensor_of_another_dtype_is_refused_with_what_to_do(tmp_path, dtype, stored):
    with pytest.raises(ValueError, match=f"of type {stored}, wanted .* FloatStorage, .*: save its tensors in such"):
        load_inert(saved(tmp_path, {"w": torch.ones(2).to(dtype)}))


def test_compressed_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compressed"):
        load_inert(archive(tmp_path, BROKEN["too long"], compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match=r"not a whole checkpoint of torch: .*No such file"):
        load_inert(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_inert(tmp_path / "text.pth")
    path = saved(tmp_path, {"w": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_inert(path)
