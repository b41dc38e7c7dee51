"""How a command ends: its exit code, and what the user is told of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from synchromesh.commands.context import Context
from synchromesh.errors import InputError
from synchromesh.parallel.comm.job import LostRankError
from synchromesh.training.catalog import Catalog

LOST_RANK = 5  # exit code of a rank that lost the others


def guarded(
    command: Callable[[Context], int],
    given: Sequence[str],
    catalog: Callable[[], Catalog],
    program: tuple[str, ...],
) -> int:
    """Run a command in a context of this terminal; return its exit code, or that of what stopped it."""
    # Names of files and classes are shown as they are: no markup, no emoji codes.
    console = Console(markup=False, emoji=False)
    errors = Console(stderr=True, markup=False, emoji=False)
    try:
        return command(Context(console, errors, catalog, program, tuple(given)))
    except (InputError, OSError) as error:  # OSError: a full or read-only disk
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            sys.stderr.close()
            return 141
        errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    except LostRankError as error:
        errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.stderr.flush()
        os._exit(LOST_RANK)  # threads of the broken exchange would keep the process from ending
    except KeyboardInterrupt:
        return 130
