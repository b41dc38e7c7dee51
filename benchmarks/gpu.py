"""The Triton kernels on one GPU: checked against float64, tuned, and timed beside other ways to the same numbers.

    python benchmarks/gpu.py --call prove       # 9 min: do they run, are they right, the same bits twice, in graphs
    python benchmarks/gpu.py --call tune        # 9 min: the fastest block sizes; Triton's products or torch's
    python benchmarks/gpu.py --call table       # 9 min: every shape beside the others, whole layers, each kernel's time
    python benchmarks/gpu.py --part check --dtypes float32 float16 bfloat16
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny --call prove  # without a GPU, in Triton's interpreter

A call is a list of stages (gpu_calls.py), each with a time of its own: what matters most comes first, a cut call keeps
all that it found. Each record is appended to the output as soon as it is known. What `tune` finds is written into the
package and used by the stages after it: tilings to kernels/grouped_mm/tuned.json, choices to measured.json.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

import torch
import tyro
from gpu_calls import CALLS, PARTS, Runs, minutes, run_stages
from gpu_check import check_part
from gpu_choice import choose_part
from gpu_gluon import gluon_part
from gpu_graphs import graphs_part
from gpu_layer import layer_part, profile_part
from gpu_session import Args, session_of
from gpu_smoke import smoke_part, twice_part, warm_part
from gpu_tilings import tune_part
from gpu_time import time_part

from synchromesh.kernels.tiles import interpreted

RUNS: Runs = {
    "smoke": smoke_part,
    "warm": warm_part,
    "check": check_part,
    "twice": twice_part,
    "graphs": graphs_part,
    "gluon": gluon_part,
    "tune": tune_part,
    "choose": choose_part,
    "time": time_part,
    "layer": layer_part,
    "profile": profile_part,
}


def main(args: Args, clock: Callable[[], float] = time.monotonic) -> int:
    """Return the exit code: 1 where there is no GPU or a stage failed."""
    if not (interpreted() and args.tiny) and not torch.cuda.is_available():
        print("No GPU here. To try this script on the CPU: TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny")
        return 1
    if (args.call is None) == (not args.part):
        print("Say which --call (prove, tune, table) or which --part to run.")
        return 2
    stages = CALLS[args.call] if args.call else tuple(PARTS[part] for part in args.part)
    planned = minutes(stages) if args.minutes is None else args.minutes
    session = session_of(dataclasses.replace(args, minutes=planned), clock)
    print(", ".join(f"{name} {value}" for name, value in session.about.items()), f"-> {session.out}")
    if interpreted():
        torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
        print("Speeds in the interpreter mean nothing.")
    return 0 if run_stages(stages, RUNS, session) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
