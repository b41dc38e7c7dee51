"""Processes for tests that start in an instant: forked from a server that has imported what is heavy, and nothing else.

Each is fresh: the server runs nothing but imports, so no process knows anything of one before it.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

# torch's compiler, scikit-learn and transformers are imported late, at a first use.
ALWAYS = ["torch", "torch.distributed", "torch._dynamo", "numpy", "sklearn.datasets"]
WHERE_USED = {"synchromesh", "transformers", "pytest", "hypothesis"}  # packages, as far as the caller imported them


def fork(target: Callable[..., None], *arguments: Any, daemon: bool) -> ForkServerProcess:
    """Start `target(*arguments)` in a new process.

    Args:
        daemon: it ends with this process, and may start no other by multiprocessing.
    """
    context = multiprocessing.get_context("forkserver")
    used = [name for name in sys.modules if name.partition(".")[0] in WHERE_USED and not name.endswith("__main__")]
    context.set_forkserver_preload([*ALWAYS, *used])  # heeded once, by the first
    process = context.Process(target=_begin, args=(target, arguments), daemon=daemon)
    process.start()
    return process


def _begin(target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # to look through what the server imported would copy its pages
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    target(*arguments)
