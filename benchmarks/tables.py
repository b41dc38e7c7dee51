"""Print what benchmarks/results holds as the tables of docs/benchmarks.md and docs/models.md, machines side by side.

python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface import OTHER_DECODES, OTHER_STEPS
from layer import KEPT_BACK

RESULTS = Path(__file__).parent / "results"
# Records did not name a CPU's family at first; all of those came from one machine.
CPUS = {"AMD EPYC, 2 cores": "Zen 5", "AMD EPYC, cpu family 25, model 17, 2 cores": "Zen 4"}
OURS = ("ours", "synchromesh")

Record = Mapping[str, Any]


def lines(name: str) -> list[Record]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def beside(records: Iterable[Record], names: Sequence[str]) -> dict[tuple[str, ...], dict[str, Record]]:
    """Return the records of each figure, told by these fields, by their machine."""
    found: dict[tuple[str, ...], dict[str, Record]] = {}
    for one in records:
        figure = tuple(" ".join(map(str, one[n])) if n == "shape" else str(one[n]) for n in names)
        found.setdefault(figure, {})[CPUS.get(one["machine"], one["machine"])] = one
    return found


def machines(found: Mapping[Any, Mapping[str, Record]]) -> list[str]:
    own = {cpu for by_cpu in found.values() for cpu in by_cpu}
    return [cpu for cpu in CPUS.values() if cpu in own] + sorted(own - set(CPUS.values()))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def ours_and_best(seconds: Mapping[str, float]) -> tuple[float, str]:
    """Return our time, and whose is the best of the others."""
    ours = next(seconds[name] for name in OURS if name in seconds)
    return ours, min((name for name in seconds if name not in (*OURS, "limit")), key=lambda name: seconds[name])


def of_layer(one: Record | None) -> list[str]:
    """Return ours, the best other, and ours over that and over the limit."""
    if one is None:
        return ["–"] * 4
    ours, best = ours_and_best(one["seconds"])
    other = one["seconds"][best]
    cells = [milliseconds(ours), f"{milliseconds(other)} ({best.removeprefix('hf_')})", f"{ours / other:.2f}"]
    return [*cells, f"{one['over_limit']:.2f}" if "over_limit" in one else ""]


def peaks(by_cpu: Mapping[str, Record]) -> str:
    """Return the newest machine's peaks of memory: ours, and of grouped_mm."""
    (*_, newest) = by_cpu.values()
    return " / ".join(f"{newest['peak_bytes'][name] / 2**20:.0f}" for name in ("ours", "hf_grouped_mm"))


def layer_table(records: Iterable[Record], *, limit: bool) -> str:
    """Return a line for each figure, a group of columns for each machine."""
    names = ("shape", "dtype", "routing", "pass")
    found = beside(records, names)
    columns = ["ours, ms", "best other, ms", "over it", *(["over the limit"] if limit else [])]
    header = ["T D F E K", *names[1:], *(f"{cpu}: {column}" for cpu in machines(found) for column in columns)]
    rows = [
        [*figure, *(cell for cpu in machines(found) for cell in of_layer(by_cpu.get(cpu))[: len(columns)])]
        for figure, by_cpu in found.items()
    ]
    if limit:
        header.append("peak MiB: ours / grouped_mm")
        rows = [[*row, peaks(by_cpu)] for row, by_cpu in zip(rows, found.values(), strict=True)]
    return table(header, rows)


def met(records: Iterable[Record]) -> list[str]:
    """Return, for each machine, how many figures take at most 1.03 times the best other's time."""
    ratios: dict[str, list[float]] = {}
    for one in records:
        ours, best = ours_and_best(one["seconds"])
        ratios.setdefault(CPUS.get(one["machine"], one["machine"]), []).append(ours / one["seconds"][best])
    return [
        f"{cpu}: {sum(ratio <= 1.03 for ratio in own)} of {len(own)} at most 1.03, {min(own):.2f} to {max(own):.2f}"
        for cpu, own in ratios.items()
    ]


def swin_table(records: Iterable[Record]) -> str:
    header = ["model", "dtype", "pass", "CPU", "transformers, images/s", "ours", "with experts"]
    header += ["ours over transformers", "matmul limit", "experts over dense"]
    found = beside(records, ("model", "batch", "dtype", "pass"))
    rows = (swin_row(cpu, by_cpu[cpu]) for by_cpu in found.values() for cpu in machines(found) if cpu in by_cpu)
    return table(header, rows)


def swin_row(cpu: str, found: Record) -> list[str]:
    rate = {name: found["batch"] / seconds for name, seconds in found["seconds"].items()}
    return [
        f"{found['model']}, batch {found['batch']}",
        found["dtype"],
        found["pass"],
        cpu,
        *(f"{rate[name]:,.0f}" for name in ("theirs", "dense", "experts")),
        f"{found['over_transformers']:.2f}",
        f"{found['most_possible']:.2f}",
        f"{found['experts_over_dense']:.2f}",
    ]


def parted(records: Sequence[Record], first: Callable[[Record], bool]) -> tuple[list[Record], list[Record]]:
    """Return the records of which it is true, and the others."""
    return [one for one in records if first(one)], [one for one in records if not first(one)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    kept = [list(shape) for shape in (*KEPT_BACK, *OTHER_STEPS, *OTHER_DECODES)]
    for name in ("layer", "huggingface"):
        for records in parted(lines(name), lambda one: one["shape"] not in kept):
            print(layer_table(records, limit=name == "layer"), *met(records), "", sep="\n")
    for records in parted(lines("swin"), lambda one: not one.get("compiled")):
        print(swin_table(records), "", sep="\n")


if __name__ == "__main__":
    main()
