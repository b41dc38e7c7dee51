"""How a command ends: its exit code, and what the user is told of errors, once for all ranks of a job."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from rich.console import Console

from synchromesh.commands.context import Context
from synchromesh.errors import InputError
from synchromesh.parallel.comm.environment import first_of_node
from synchromesh.parallel.comm.job import LostRankError, first_to_say
from synchromesh.training.catalog import Catalog

LOST_RANK = 5  # exit code of a rank that lost the others
# A rank that ends is the end of the others: one that leaves the word to another lets it speak first. Ranks that have
# joined fail together, others as they come up.
_SPOKEN, _COME_UP = 0.5, 10.0  # seconds


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
        _say(errors, str(error))
        return 2
    except LostRankError as error:
        _say(errors, str(error), about="a lost rank")  # each rank puts it in its own words
        sys.stderr.flush()
        os._exit(LOST_RANK)  # threads of the broken exchange would keep the process from ending
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def heard_once() -> Iterator[None]:
    """Let the first rank of each machine alone be heard, while ranks that have not joined do all the same."""
    if _speaks():
        yield
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    except SystemExit as end:
        if end.code:
            time.sleep(_COME_UP)
        raise


def _say(errors: Console, text: str, *, about: str = "") -> None:
    """Print an error, unless another rank says the same, or something else about the same."""
    joined = dist.is_initialized()
    if first_to_say(about or text) if joined else _speaks():
        errors.print(f"error: {text}", style="red", highlight=False, soft_wrap=True)
    else:
        time.sleep(_SPOKEN if joined else _COME_UP)


def _speaks() -> bool:
    try:
        return first_of_node()
    except ValueError:  # the environment contradicts itself: the command says how
        return True
