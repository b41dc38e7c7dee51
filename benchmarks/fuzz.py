"""Throws broken and hostile files at every reader of what comes from outside.

    python benchmarks/fuzz.py                               # 12,500 inputs over all readers, a line of results for each
    python benchmarks/fuzz.py --readers coco_json rle --inputs 50
    python benchmarks/fuzz.py --engine atheris              # led by what the readers' code does, where atheris installs

Each reader (benchmarks/fuzz_readers.py) has valid files to start from. An input is such a file with some of its bytes,
or some of the values that it is made of, changed; hypothesis chooses how, the same in every run. It must be read, or
refused by a ValueError of this library (InputError is one) or an OSError, in a process whose memory and time are
limited, without a program started, a socket opened or a planted function called. What is not is a fault: it is printed,
and its file kept.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import tyro
from fuzz_readers import CANARY, READERS, Reader
from hypothesis import HealthCheck, Phase, given, seed, settings

RESULTS = Path(__file__).parent / "results" / "fuzz.jsonl"
MEMORY = 1 << 30  # bytes that a reader may take beyond what its process has after its valid files
SECONDS = 20  # for one input
TOLD = 50  # inputs of atheris between two lines
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen")


@dataclass(frozen=True)
class Args:
    """What to fuzz.

    Attributes:
        readers: names; all of them if not given.
        inputs: for each reader.
        seed: of what is chosen.
        engine: hypothesis or atheris.
        out: file to append to; none prints only.
        keep: folder for the inputs that were faults.
        worker: run this one reader in this process; for the program's own use.
    """

    readers: tuple[str, ...] = ()
    inputs: int = 500
    seed: int = 0
    engine: str = "hypothesis"
    out: Path | None = RESULTS
    keep: Path = Path(tempfile.gettempdir()) / "synchromesh_fuzz"
    worker: str | None = None


@dataclass
class Found:
    """What came of the inputs of one reader.

    Attributes:
        reader: its name.
        inputs: how many there were.
        read: inputs that were read.
        refused: inputs that were refused by a clear error.
        faults: what was neither, by the kind of error and where it was raised.
        code_run: forbidden events, and calls of the planted function.
        peak_mib: most memory over that after the valid files.
    """

    reader: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    code_run: list[str] = field(default_factory=list)
    peak_mib: float = 0.0


class TooLongError(BaseException):
    """An input took more seconds than it may; no reader catches it."""


# workers


def work(reader: Reader, folder: Path, args: Args) -> Found:
    """Fuzz one reader in this process."""
    found = Found(reader.name)
    watch = _Watch(found)
    for number, file in enumerate(reader.seeds(folder)):
        reader.read(file)  # a valid file is read
        reader.read(file) if number == 0 else None
    before = _peak()
    _limit_memory()
    sys.addaudithook(watch.event)

    @seed(args.seed)
    @settings(
        max_examples=args.inputs, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        if found.inputs < args.inputs:
            try_input(reader, reader.mutant(data.draw), folder, found, watch, args.keep)

    one()
    number = 0
    while found.inputs < args.inputs:  # hypothesis gives up where few inputs are new
        number += 1
        again = seed(args.seed + number)(one)
        again()
    found.peak_mib = round((_peak() - before) / 2**20, 1)
    return found


def try_input(reader: Reader, content: bytes, folder: Path, found: Found, watch: _Watch, keep: Path) -> None:
    """Give a reader one input, and note what came of it."""
    found.inputs += 1
    file = folder / f"input{reader.suffix}"
    file.write_bytes(content)
    watch.on = True
    try:
        with _in_time():
            reader.read(file)
        found.read += 1
    except (ValueError, OSError) as error:
        if is_clear(error):
            found.refused += 1
        else:
            _fault(reader, error, content, found, keep)
    except BaseException as error:  # whatever else it is, it is what is looked for
        if isinstance(error, KeyboardInterrupt):
            raise
        _fault(reader, error, content, found, keep)
    finally:
        watch.on = False
    if CANARY.called:
        found.code_run.append("the planted function was called")
        CANARY.called.clear()


def is_clear(error: ValueError | OSError) -> bool:
    """Tell whether an error is meant for people: it says something, and this library raised it, not one below it."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return bool(str(error).strip()) and (isinstance(error, OSError) or "/synchromesh/" in innermost)


def _fault(reader: Reader, error: BaseException, content: bytes, found: Found, keep: Path) -> None:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/synchromesh/" in f.filename]
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    what = f"{type(error).__name__}{where}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    if what not in found.faults:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{reader.name}-{len(found.faults)}{reader.suffix}").write_bytes(content)
    found.faults[what] = found.faults.get(what, 0) + 1


class _Watch:
    """Notes what no reader may do, while one reads."""

    def __init__(self, found: Found) -> None:
        self.on, self._found = False, found

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.on and name in FORBIDDEN:
            self._found.code_run.append(f"{name} {arguments!r:.120}")


@contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLongError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# atheris


def by_coverage(reader: Reader, folder: Path, args: Args) -> Found:
    """Fuzz one reader with inputs that atheris chooses by the code that they reach; it ends the process itself."""
    import atheris

    found = Found(reader.name)
    watch = _Watch(found)
    corpus = folder / "corpus"
    corpus.mkdir()
    for file in reader.seeds(folder):
        reader.read(file)
        shutil.copyfile(file, corpus / file.name)
    before = _peak()
    _limit_memory()
    sys.addaudithook(watch.event)

    def tell(content: bytes) -> None:
        try_input(reader, content, folder, found, watch, args.keep)
        if found.inputs % TOLD == 0:  # libFuzzer ends the process without a word to Python
            found.peak_mib = round((_peak() - before) / 2**20, 1)
            say(found)

    for module in [m for name, m in sys.modules.items() if name.startswith("synchromesh.data")]:
        for name, function in list(vars(module).items()):
            if (
                getattr(function, "__module__", None) == module.__name__
                and callable(function)
                and not isinstance(function, type)
            ):
                setattr(module, name, atheris.instrument_func(function))
    # libFuzzer catches signals of its own; its runs include those of the corpus.
    flags = [
        f"-runs={args.inputs}",
        f"-seed={args.seed + 1}",
        "-rss_limit_mb=0",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup(["fuzz", *flags, str(corpus)], tell)
    atheris.Fuzz()
    return found


# the program


def say(found: Found) -> None:
    """Print what came of a reader as one line for the program that started it."""
    print("FOUND " + json.dumps(asdict(found)), flush=True)


def fuzz(name: str, args: Args) -> dict[str, Any]:
    """Fuzz one reader in a process of its own, which may die."""
    command = [sys.executable, __file__, "--worker", name, f"--inputs={args.inputs}", f"--seed={args.seed}"]
    command += [f"--engine={args.engine}", f"--keep={args.keep}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if lines:
        return json.loads(lines[-1].removeprefix("FOUND "))
    died = asdict(Found(name))
    died["faults"] = {f"the process ended with {done.returncode}: {done.stderr[-300:]}": 1}
    return died


def as_line(found: dict[str, Any], args: Args) -> dict[str, Any]:
    """Return a line of results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    about = {"machine": machine, "commit": commit.stdout.strip(), "python": platform.python_version()}
    limits = {"engine": args.engine, "seed": args.seed, "limit_mib": MEMORY >> 20, "limit_seconds": SECONDS}
    return {**about, **limits, **found}


def main() -> int:
    """Fuzz, print a table, and append to the results; 0 if nothing was found."""
    args = tyro.cli(Args)
    known: dict[str, Callable[[], Reader]] = READERS
    if args.worker is not None:
        run = by_coverage if args.engine == "atheris" else work
        with tempfile.TemporaryDirectory() as folder:
            say(run(known[args.worker](), Path(folder), args))
        return 0
    names = args.readers or tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"got the readers {unknown}, wanted some of {', '.join(known)}")
    total = bad = 0
    print(f"{'reader':22}{'inputs':>8}{'read':>8}{'refused':>9}{'faults':>8}{'code run':>10}{'peak MiB':>10}")
    for name in names:
        found = fuzz(name, args)
        faults, ran = sum(found["faults"].values()), len(found["code_run"])
        total, bad = total + found["inputs"], bad + faults + ran
        counts = f"{found['inputs']:>8}{found['read']:>8}{found['refused']:>9}{faults:>8}{ran:>10}"
        print(f"{name:22}{counts}{found['peak_mib']:>10}", flush=True)
        for what, count in found["faults"].items():
            print(f"    {count} x {what}")
        for what in found["code_run"][:3]:
            print(f"    {what}")
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(as_line(found, args)) + "\n")
    print(f"{total:,} inputs, {bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
