"""Programs for tests: `python ARGUMENTS` in a process of its own, and jobs of several, without a wait for imports."""

from __future__ import annotations

import builtins
import os
import re
import runpy
import signal
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType

import torch.distributed as dist

from synchromesh.testing.forks import fork

HANG = 600.0  # seconds; nothing that lives takes so long
SAID = ("stdout", "stderr")  # the files of what descriptors 1 and 2 are given


class Program:
    """`python ARGUMENTS` that runs: a script, `-m MODULE` or `-c CODE`, with its own arguments, after any -W.

    Modules that tests use are imported already, and the interpreter is not taken apart at the end: what is about
    either wants a real `python`. Used in a `with` block, which kills what still runs.

    Args:
        cwd: where it runs; None is here.
        environment: variables besides those of this process.
    """

    def __init__(
        self, arguments: Sequence[object], *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._said = tempfile.TemporaryDirectory()
        for name in SAID:
            Path(self._said.name, name).touch()
        variables = {**os.environ, **(environment or {})}
        folder = str(Path.cwd() if cwd is None else cwd)
        self._process = fork(_run, self.arguments, folder, variables, self._said.name, daemon=False)

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._said.cleanup()

    def send_signal(self, number: signal.Signals) -> None:
        pid = self._process.pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, *, timeout: float = HANG) -> CompletedProcess[str]:
        """Wait for its end; return code (of a signal n, -n) and all it said.

        Raises:
            TimeoutError: it still runs.
        """
        self._process.join(timeout)
        out, err = (Path(self._said.name, name).read_text() for name in SAID)
        if self._process.exitcode is None:
            raise TimeoutError(f"python {' '.join(self.arguments)} still runs after {timeout} s\n{out}\n{err}")
        return CompletedProcess(self.arguments, self._process.exitcode, out, err)


def run_program(
    *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end; see `Program`."""
    with Program(arguments, cwd=cwd, environment=environment) as program:
        return program.wait()


@contextmanager
def job(
    ranks: int, *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[list[Program]]:
    """Run `python ARGUMENTS` on each rank of a job on this machine, told what torchrun tells, as long as the block."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    told = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": True}  # the ranks meet in that store, whose port is taken already
    with ExitStack() as held:
        programs: list[Program] = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in (told | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            program = Program(arguments, cwd=cwd, environment={**own, **(environment or {})})
            programs.append(held.enter_context(program))
        yield programs


def run_job(
    ranks: int, *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> list[CompletedProcess[str]]:
    """Run a `job` to its end; return all ranks' ends and what they said, by rank."""
    with job(ranks, *arguments, cwd=cwd, environment=environment) as programs:
        return [program.wait() for program in programs]


def _run(arguments: list[str], cwd: str, environment: dict[str, str], said: str) -> None:
    for number, name in enumerate(SAID, start=1):
        with Path(said, name).open("w") as file:
            os.dup2(file.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    while arguments[0] == "-W":
        _filter(arguments[1])
        arguments = arguments[2:]
    match arguments:
        case ["-c", code, *rest]:
            sys.argv, sys.path[:0] = ["-c", *rest], [cwd]
            module = types.ModuleType("__main__")
            sys.modules["__main__"] = module
            exec(compile(code, "<string>", "exec"), module.__dict__)
        case ["-m", name, *rest]:
            sys.argv, sys.path[:0] = [name, *rest], [cwd]
            sys.modules.pop(name, None)  # what is imported already and runs now would be warned of
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        case [path, *rest]:
            sys.argv, sys.path[:0] = [path, *rest], [str(Path(path).resolve().parent)]
            runpy.run_path(path, run_name="__main__")
        case _:
            raise ValueError("nothing to run: wanted a script, -m MODULE or -c CODE")


def _filter(said: str) -> None:
    """Heed what follows -W: ACTION or ACTION:MESSAGE:CATEGORY."""
    action, _, rest = said.partition(":")
    message, _, category = rest.partition(":")
    warnings.filterwarnings(action, re.escape(message), getattr(builtins, category or "Warning"))  # pyright: ignore[reportArgumentType]
