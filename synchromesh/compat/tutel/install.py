"""Scripts that say `from tutel import ...` find this package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
ALIAS = Path(__file__).parent / "alias"  # the same by a search path

# What is left out, and the way instead.
LEFT_OUT = {
    "jit": "write such a kernel in Triton; synchromesh/kernels shows how one gets a reference, a gradient and a test",
    "parted": "for MoE layers `synchromesh plan` predicts the best parallel plan, and Adaptive finds it while training",
}

# Where scripts reach into Tutel's own files.
ELSEWHERE = {
    "impls.communicate": "net",
    "impls.fast_dispatch": "moe",
    "impls.losses": "losses",
    "impls.moe_layer": "moe",
}


def install() -> None:
    """Let `import tutel`, `from tutel import moe, net, system` and so on give the modules of this package.

    Raises:
        RuntimeError: another package of that name has been imported already.
    """
    ours, found = importlib.import_module(PACKAGE), sys.modules.get("tutel")
    if found not in (None, ours) and str(found.__file__) != str(ALIAS / "tutel.py"):
        raise RuntimeError(f"tutel is already imported from {found.__file__}: call install() before that")
    sys.modules["tutel"] = ours
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in ("moe", "net", "system"):
        importlib.import_module(f"tutel.{name}")


def refusal(name: str) -> str | None:
    """Say what to take instead of a part of Tutel that is left out."""
    return f"tutel.{name} is not part of {PACKAGE}: {LEFT_OUT[name]}" if name in LEFT_OUT else None


class _Finder(MetaPathFinder, Loader):
    """Finds tutel.X as X of this package: one module under two names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, name = fullname.replace(PACKAGE, "tutel", 1).partition(".")
        refused = refusal(name.partition(".")[0]) if root == "tutel" else None
        if refused is not None:  # `from tutel import X` asks for X of this package
            raise ImportError(refused, name=fullname)
        if fullname.partition(".")[0] != "tutel":
            return None
        return ModuleSpec(fullname, self, is_package=name == "impls")

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        if name == "impls":
            return
        ours = f"{PACKAGE}.{ELSEWHERE.get(name, name)}"
        if importlib.util.find_spec(ours) is None:
            raise ModuleNotFoundError(f"{PACKAGE} has no module {name}", name=module.__name__)
        sys.modules[module.__name__] = importlib.import_module(ours)  # the import gives what stands here
