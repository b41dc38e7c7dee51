"""Run in tests: `synchromesh ARGUMENTS`, in which rank 1, or a process alone, sends itself a signal at one moment.

Where it is started again after that, it lives. Without a signal, SIGKILL is sent.

    dies.py [SIGTERM|SIGINT|SIGSTOP] forward|backward|exchange|save COUNT ARGUMENTS...
"""

import os
import signal
import sys

import torch

from synchromesh import cli
from synchromesh.moe.layer import MoE
from synchromesh.parallel.exchange import Exchange
from synchromesh.training import checkpoint

MOMENTS = {
    "forward": (MoE, "forward"),
    "backward": (torch.Tensor, "backward"),
    "exchange": (Exchange, "end"),
    "save": (checkpoint, "write_tensors"),
}


def dying(original, count, number):
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    return call


def main() -> int:
    given = sys.argv[1:]
    number = signal.Signals[given.pop(0)] if given[0] in signal.Signals.__members__ else signal.SIGKILL
    moment, count, *arguments = given
    if os.environ.get("RANK", "1") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        place, name = MOMENTS[moment]
        setattr(place, name, dying(getattr(place, name), int(count), number))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
