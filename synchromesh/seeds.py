"""Random numbers without a state to lose: every draw depends on the seed and on where the run stands, on nothing else.

A resumed run therefore draws what the unbroken run would have drawn, whatever happened in between.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# One stream per purpose, so that a purpose never sees another's numbers.
ORDER, CROP, AUGMENT, FORWARD, INIT, SPLIT, SHAPE, ADAPT = range(8)


def numpy_generator(seed: int, stream: int, *position: int) -> np.random.Generator:
    """Return the generator of one purpose at one position, such as (epoch,) or (epoch, index).

    >>> float(numpy_generator(0, ORDER, 3).random()) == float(numpy_generator(0, ORDER, 3).random())
    True
    """
    return np.random.default_rng([seed, stream, *position])


def named_generator(seed: int, stream: int, name: str) -> torch.Generator:
    """Return torch's generator, for CPUs, of one purpose for what has a name, such as a module.

    >>> int(named_generator(0, ADAPT, "fc").initial_seed()) == int(named_generator(0, ADAPT, "mlp").initial_seed())
    False
    """
    drawn = np.random.SeedSequence([seed, stream, zlib.crc32(name.encode())]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(drawn) & (2**63 - 1))


@contextmanager
def torch_seeded(device: torch.device, seed: int, stream: int, *position: int) -> Iterator[None]:
    """Seed torch's generators (weights, drop path, router noise) for one position; their former state comes back."""
    drawn = np.random.SeedSequence([seed, stream, *position]).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(drawn) & (2**63 - 1))
        yield
