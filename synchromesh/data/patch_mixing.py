"""Mixing of patches: which picture of a group each place of a mixture is taken from (MixedAE, CVPR 2023)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64


def random_sources(group: int, places: int, rng: np.random.Generator) -> Int64[np.ndarray, "G L"]:
    """Draw which picture each mixture of a group shows at each place.

    At every place the numbers are a permutation of the pictures, so that each patch of each picture is in exactly one
    mixture; and a mixture has as many patches of one picture as of another, or one more where G does not divide L.

    Args:
        group: pictures of a group, and mixtures: 1 / r of the paper.
        places: patches of a picture.
        rng: draws them.

    Raises:
        ValueError: a group without pictures.
    """
    if group < 1:
        raise ValueError(f"the group has {group} pictures, wanted one at least")
    first = rng.permutation(np.arange(places, dtype=np.int64) % group)
    return (first + np.arange(group)[:, None]) % group
