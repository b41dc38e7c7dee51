"""Context: what every command is given in addition to its request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console

from synchromesh.errors import InputError
from synchromesh.parallel.comm.environment import in_job
from synchromesh.parallel.comm.grid import TIMEOUT, Grid
from synchromesh.parallel.comm.job import joined
from synchromesh.training.catalog import Catalog


@dataclass(frozen=True)
class Context:
    """Where a command runs.

    Attributes:
        console: for results.
        errors: for what went wrong.
        load_catalog: recipes, and what files may hold; imported when it is asked for.
        program: what follows `python` to start this program again, on other ranks.
        given: the command and its arguments, as they were typed.
    """

    console: Console
    errors: Console
    load_catalog: Callable[[], Catalog]
    program: tuple[str, ...] = ("-m", "synchromesh")
    given: tuple[str, ...] = ()

    def catalog(self) -> Catalog:
        """Return the catalog. Raises InputError where a package that it needs is not installed."""
        try:
            return self.load_catalog()
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "synchromesh":
                raise  # no extra would bring it
            raise InputError(
                f"`synchromesh {self.given[0]}` needs packages of the extra vision, and there is no {error.name}: "
                "pip install 'synchromesh[vision]'"
            ) from error

    def on_ranks(
        self, ranks: int, run: Callable[[Context, Grid], int], *, restarts: int = 0, timeout: timedelta = TIMEOUT
    ) -> int:
        """Run on some ranks of this machine, or on those of the job around this process; return the exit code.

        Only the first rank writes to the console.

        Args:
            ranks: to start where no job is around.
            run: what each of them does.
            restarts: how often to begin again when a rank dies.
            timeout: how long ranks wait for one another.
        """
        if ranks < 1 or restarts < 0:
            raise InputError(f"got {ranks} for the number of ranks and {restarts} restarts, wanted at least 1 and 0")
        if ranks > 1 and not in_job():
            from synchromesh.commands.launch import launch  # torchrun's modules, which one rank and help do without

            return launch(self.program, self.given, ranks, errors=self.errors, restarts=restarts)
        with joined(timeout=timeout) as grid:
            return run(self if grid.rank == 0 else self._silent(), grid)

    def _silent(self) -> Context:
        quiet = Console(quiet=True)
        return dataclasses.replace(self, console=quiet, errors=quiet)
