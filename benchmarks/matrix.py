"""Runs the quick tests on every Python and torch that is supported and here; says which are missing.

    make matrix
    python benchmarks/matrix.py --pythons 3.10 3.12 --torches 2.10
    python benchmarks/matrix.py --list                     # only what is here

An interpreter counts as here if pythonX.Y is on the path, or pyenv has it. Each pair gets a virtual environment below
--folder, made once, with the wheel's dependencies from pip: what cannot be installed (no network, no build for that
Python) is named as missing. Nothing is missing silently: the exit code is 1 where a test fails, 2 where none ran.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.10", "2.11", "2.12", "2.13")
# Quick, without the network, and over every wing: the layer, plans, models, data, command line.
QUICK = (
    *("tests/moe", "tests/planning", "tests/models", "tests/data", "tests/test_public_names.py", "tests/test_types.py"),
    *("tests/test_deprecation.py", "tests/commands/test_models.py"),
)
INDEX = "https://download.pytorch.org/whl/cpu"

Call = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Args:
    """What to run.

    Attributes:
        pythons: versions.
        torches: versions.
        tests: files and folders.
        folder: of the environments.
        index: further package index, of torch for CPUs.
        list: say what is here, and run nothing.
        out: file for the results as JSON lines; none for none.
    """

    pythons: tuple[str, ...] = PYTHONS
    torches: tuple[str, ...] = TORCHES
    tests: tuple[str, ...] = QUICK
    folder: Path = ROOT / ".venv" / "matrix"
    index: str = INDEX
    list: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Pair:
    """A Python and a torch.

    Attributes:
        python: version.
        torch: version.
        state: "passed", "failed" or "missing".
        why: in a few words.
    """

    python: str
    torch: str
    state: str
    why: str = ""


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program, and keep what it prints."""
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def interpreter(version: str, *, home: Path | None = None) -> Path | None:
    """Return a Python of this version: on the path, or of pyenv; None where there is none."""
    found = shutil.which(f"python{version}")
    if found is not None and run([found, "--version"]).returncode == 0:
        return Path(found)
    pyenv = (Path.home() if home is None else home) / ".pyenv" / "versions"
    there = [path / "bin" / "python" for path in pyenv.glob(f"{version}*") if _is(path.name, version)]
    return next((path for path in sorted(there) if path.is_file()), None)


def tried(python: str, torch: str, args: Args, call: Call = run) -> Pair:
    """Make the environment of a pair where it is missing, and run the tests in it."""
    program = interpreter(python)
    if program is None:
        return Pair(python, torch, "missing", f"no python{python} on the path or in pyenv")
    folder = args.folder / f"py{python}-torch{torch}"
    own = str(folder / "bin" / "python")
    if not (folder / ".ready").exists():
        call([str(program), "-m", "venv", "--clear", str(folder)])
        wanted = [f"torch=={torch}.*", ".[vision,hf,data,report]", "pytest", "pytest-xdist", "hypothesis", "beartype"]
        done = call([own, "-m", "pip", "install", "--quiet", "--extra-index-url", args.index, *wanted])
        if done.returncode:
            return Pair(python, torch, "missing", f"pip: {_last(done.stderr)}")
        (folder / ".ready").touch()
    tested = call([own, "-m", "pytest", "-q", "-x", *args.tests])
    if tested.returncode:
        return Pair(python, torch, "failed", _last(tested.stdout) or _last(tested.stderr))
    return Pair(python, torch, "passed", _last(tested.stdout))


def _is(name: str, version: str) -> bool:
    return name == version or name.startswith(f"{version}.")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main(args: Args) -> int:
    """Run the matrix; return the exit code."""
    if args.list:
        for version in args.pythons:
            print(f"python{version}: {interpreter(version) or 'missing'}")
        return 0
    pairs = []
    for python in args.pythons:
        for torch in args.torches:
            pairs.append(tried(python, torch, args))
            print(f"python {python:5} torch {torch:5} {pairs[-1].state:8} {pairs[-1].why}", flush=True)
    if args.out is not None:
        args.out.write_text("".join(json.dumps(vars(pair)) + "\n" for pair in pairs))
    states = [pair.state for pair in pairs]
    print(", ".join(f"{states.count(state)} {state}" for state in ("passed", "failed", "missing")))
    return 1 if "failed" in states else 0 if "passed" in states else 2


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
