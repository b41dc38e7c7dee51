"""A checkpoint for each rank from one: `python -m synchromesh.compat.tutel.checkpoint.scatter --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from synchromesh.compat.tutel.checkpoint import files, reshard


def scatter(options: argparse.Namespace) -> list[Path]:
    """Read the whole and write each rank's file; return their names.

    Raises:
        ValueError: see `files.read` and `reshard.scatter`. FileNotFoundError: there is no such file.
    """
    ranks, path = options.output_size, Path(options.input)
    if ranks < 1:
        raise ValueError(f"got --output_size {ranks}, wanted the number of ranks that will read the files")
    names = [files.of_rank(options.outputs, rank, ranks) for rank in range(ranks)]
    content = files.read(path)
    whole = files.inside(content, options.namespace, path)
    states = reshard.scatter(whole, ranks, options.default_num_global_experts)
    nested = (files.with_inside(content, options.namespace, state) for state in states)
    return files.write_all(zip(names, nested, strict=True))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="scatter", description="cut one checkpoint for each of some ranks")
    parser.add_argument("--input", required=True, metavar="FILE", help="the one file, as gather writes it")
    parser.add_argument("--output_size", type=int, required=True, metavar="W", help="how many ranks there will be")
    parser.add_argument("--outputs", required=True, metavar="NAME", help="the ranks' files, with {rank} and {size}")
    files.run(parser, scatter)


if __name__ == "__main__":
    main()
