"""Where a command computes."""

from __future__ import annotations

import torch

from synchromesh.errors import InputError


def pick_device(wanted: str | None = None) -> torch.device:
    """Return the device of this name; of None the first GPU, or the CPU where there is none.

    Raises:
        InputError: torch cannot use it here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(
            f"there is no device {wanted!r} that torch can use here: wanted such as cpu or cuda:0"
        ) from error
