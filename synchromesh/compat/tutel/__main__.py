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
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return
    module = arguments[0] == "-m" if arguments[1:] else False
    if not module and (not arguments or not Path(arguments[0]).is_file()):
        sys.exit(f"there is no file {arguments[0]}\n{USAGE}" if arguments else USAGE)
    install()
    sys.path.insert(1, str(ALIAS))  # for processes that the script spawns
    sys.argv = arguments[1:] if module else arguments
    if module:
        name = arguments[1]
        ours = PACKAGE + name.removeprefix("tutel") if name.startswith("tutel.") else name
        runpy.run_module(ours, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)  # as if Python had started the script itself
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
