"""`import tutel` gives this package's modules, each once; what is left out says what to take instead."""

import subprocess
import sys
from types import ModuleType

import pytest

import synchromesh.compat.tutel as ours

SCRIPT = """
import sys
from synchromesh.compat.tutel import install
install()
install()
import tutel
import tutel.net as by_name
from tutel import moe as tutel_moe
from tutel import net, system
from tutel.checkpoint import gather
from tutel.impls.communicate import get_world_size, simple_all_reduce
from tutel.impls.fast_dispatch import extract_critical, fast_decode, fast_encode
from tutel.impls.moe_layer import moe_layer
from tutel.launcher import run
import synchromesh.compat.tutel as ours
import synchromesh.compat.tutel.moe, synchromesh.compat.tutel.net, synchromesh.compat.tutel.checkpoint.gather
assert tutel is ours
assert tutel_moe is ours.moe is sys.modules["synchromesh.compat.tutel.moe"]
assert net is by_name is ours.net is tutel.net and net.__name__ == "synchromesh.compat.tutel.net"
assert gather is ours.checkpoint.gather and net.__spec__.name == net.__name__
assert simple_all_reduce is net.simple_all_reduce and moe_layer is tutel_moe.moe_layer
for name, says in {"jit": "Triton", "parted": "synchromesh plan", "ops": "has no module ops"}.items():
    try:
        __import__("tutel." + name)
    except ImportError as error:
        assert says in str(error), error
    else:
        raise AssertionError(name)
try:
    from tutel import jit
except ImportError as error:
    assert "Triton" in str(error), error
else:
    raise AssertionError("jit")
assert not hasattr(tutel, "jit")
try:
    tutel.parted
except AttributeError as error:
    assert "Adaptive" in str(error), error
else:
    raise AssertionError("parted")
try:
    tutel.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
"""


def test_every_name_leads_to_one_module(tmp_path):
    (tmp_path / "tutel.py").write_text("raise AssertionError('the installed Tutel was taken')")
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_tutel_that_is_already_there_is_an_error(monkeypatch):
    there = ModuleType("tutel")
    there.__file__ = "elsewhere/tutel.py"
    monkeypatch.setitem(sys.modules, "tutel", there)
    with pytest.raises(RuntimeError, match=r"already imported from elsewhere/tutel\.py"):
        ours.install()


def test_names_that_are_none():
    with pytest.raises(AttributeError, match="write such a kernel in Triton"):
        ours.jit  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        ours.nonsense  # noqa: B018
