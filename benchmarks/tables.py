"""Print what benchmarks/results holds as the Markdown tables of docs/benchmarks.md.

python benchmarks/tables.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def lines(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def layer_row(found: dict[str, Any]) -> list[str]:
    seconds, peak = found["seconds"], found["peak_bytes"]
    others = [seconds.get(name) for name in ("padded", "hf_grouped_mm", "hf_eager")]
    missed = [name for name, met in found["met"].items() if not met]
    return [
        " ".join(map(str, found["shape"])),
        found["dtype"],
        found["routing"],
        found["pass"],
        f"{1e3 * seconds['limit']:.1f}",
        f"{1e3 * seconds['ours']:.1f}",
        *("–" if other is None else f"{1e3 * other:.1f}" for other in others),
        f"{found['over_limit']:.2f}",
        " / ".join(
            f"{peak[name] / 2**20:.0f}" if name in peak else "–" for name in ("ours", "padded", "hf_grouped_mm")
        ),
        "; ".join(missed) or "-",
    ]


def swin_row(found: dict[str, Any]) -> list[str]:
    rate = {name: found["batch"] / seconds for name, seconds in found["seconds"].items()}
    return [
        found["model"],
        found["dtype"],
        found["pass"],
        *(f"{rate[name]:,.0f}" for name in ("theirs", "dense", "experts")),
        f"{found['over_transformers']:.2f}",
        f"{found['experts_over_dense']:.2f}",
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    milliseconds = ["limit", "ours", "padded", "grouped_mm", "eager"]
    header = ["T D F E K", "dtype", "routing", "pass", *(f"{name}, ms" for name in milliseconds)]
    print(
        table(
            [*header, "ours / limit", "peak MiB: ours / padded / grouped_mm", "missed"],
            list(map(layer_row, lines("layer"))),
        )
    )
    header = ["model", "dtype", "pass", "transformers, images/s", "dense", "experts", "dense / transformers"]
    print("\n" + table([*header, "experts / dense"], list(map(swin_row, lines("swin")))))


if __name__ == "__main__":
    main()
