"""Run an unmodified script: `python -m synchromesh.compat.tutel SCRIPT ARGS...`, or `-m MODULE ARGS...`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from synchromesh.compat.tutel.install import ALIAS, PACKAGE, install

USAGE = "usage: python -m synchromesh.compat.tutel SCRIPT ARGS... (or -m MODULE ARGS...)\n"


def main(arguments: list[str]) -> None:
    """Run a script or a module as the main program, with `tutel` as a name of this package.

    Raises:
        SystemExit: no script is given, or there is no such file.
    """
    install()
    sys.path.insert(1, str(ALIAS))  # for processes that the script spawns
    if arguments[:1] == ["-m"] and arguments[1:]:
        name = arguments[1]
        sys.argv = arguments[1:]
        ours = name.startswith("tutel.")
        runpy.run_module(PACKAGE + name.removeprefix("tutel") if ours else name, run_name="__main__", alter_sys=True)
        return
    if not arguments or not Path(arguments[0]).is_file():
        sys.exit(USAGE if not arguments else f"there is no file {arguments[0]}\n{USAGE}")
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as if Python had started the script itself
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
