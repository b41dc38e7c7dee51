"""One checkpoint from those of all ranks: `python -m synchromesh.compat.tutel.checkpoint.gather --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synchromesh.compat.tutel.checkpoint import files, reshard


def gather(options: argparse.Namespace) -> list[Path]:
    """Read the ranks' files one after another and write the whole; return its name.

    Raises:
        ValueError: see `files.read` and `reshard.gather`, or there are files of more ranks. FileNotFoundError: of less.
    """
    ranks, first = options.input_size, {}
    if ranks < 1:
        raise ValueError(f"got --input_size {ranks}, wanted the number of ranks that wrote the files")
    beyond = files.of_rank(options.inputs, ranks, ranks)
    if "{rank}" in options.inputs and beyond.exists():
        raise ValueError(f"got --input_size {ranks}, and there is a file {beyond} too: were there more ranks?")

    def states() -> Iterator[dict[str, Any]]:
        for rank in range(ranks):
            path = files.of_rank(options.inputs, rank, ranks)
            content = files.read(path)
            if rank == 0:
                first.update(content)
            yield files.inside(content, options.namespace, path)

    whole = reshard.gather(states(), options.default_num_global_experts, options.default_model_dim)
    return files.write_all([(Path(options.output), files.with_inside(first, options.namespace, whole))])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="gather", description="join the checkpoints of all ranks to one")
    parser.add_argument("--inputs", required=True, metavar="NAME", help="the ranks' files, with {rank} and {size}")
    parser.add_argument("--input_size", type=int, required=True, metavar="W", help="how many ranks there were")
    parser.add_argument("--output", required=True, metavar="FILE", help="the one file to write")
    parser.add_argument("--default_model_dim", type=int, metavar="D", help="of layers whose gates do not say it")
    files.run(parser, gather)


if __name__ == "__main__":
    main()
