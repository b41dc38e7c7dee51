"""Run in tests: `synchromesh ARGUMENTS`, in which rank 1, or a process alone, kills itself at one moment.

Where it is started again after that, it lives.

    dies.py forward|backward|exchange|save COUNT ARGUMENTS...
"""

import os
import signal
import sys

import torch

from synchromesh import cli
from synchromesh.moe.layer import MoE
from synchromesh.parallel import store
from synchromesh.parallel.exchange import Exchange
from synchromesh.training import checkpoint


def dying(original, count, when=lambda *args, **kwargs: True):
    calls = []

    def call(*args, **kwargs):
        if when(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return call


def main() -> int:
    moment, count, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "1") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if moment == "forward":
            MoE.forward = dying(MoE.forward, int(count))
        elif moment == "backward":
            torch.Tensor.backward = dying(torch.Tensor.backward, int(count))
        elif moment == "exchange":
            back = dying(Exchange.end, int(count))
            Exchange.end = back
        elif moment == "save":
            checkpoint.write_tensors = dying(store.write_tensors, int(count))
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
