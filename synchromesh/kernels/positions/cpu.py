"""positions on a CPU: a stable sort of short integers, which numpy does as a radix sort."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def positions(
    expert_ids: Int[Tensor, "T K"], num_experts: int, priority: Float[Tensor, " T"] | None = None
) -> tuple[Int[Tensor, "T K"], Int[Tensor, " E"]]:
    """Compute the reference's places and counts. Raises ValueError for an id outside of -1 .. E-1."""
    return _positions(expert_ids, num_experts, priority)


@torch.library.custom_op(
    "synchromesh::positions_cpu",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor expert_ids, int num_experts, Tensor? priority) -> (Tensor, Tensor)",
)
def _positions(expert_ids: Tensor, num_experts: int, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    check_range(expert_ids, num_experts)
    order_T = np.arange(len(expert_ids))
    if priority is not None:
        known = priority.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        order_T = known.argsort(descending=True, stable=True).numpy()
    # Choice-major: all first choices before all second ones, tokens by priority.
    by_choice_KT = expert_ids.numpy()[order_T].T
    keys = (by_choice_KT.reshape(-1) + 1).astype(_shortest_type(num_experts))  # absent pairs lead
    counts = np.bincount(keys, minlength=num_experts + 1)
    # As in the reference: the index among the pairs sorted by expert, less that of the expert's first pair.
    places = np.empty(len(keys), np.int64)
    places[np.argsort(keys, kind="stable")] = np.arange(len(keys)) - np.repeat(counts.cumsum() - counts, counts)
    places[keys == 0] = -1
    places_TK = np.empty(expert_ids.shape, np.int64)
    places_TK[order_T] = places.reshape(by_choice_KT.shape).T
    return torch.from_numpy(places_TK), torch.from_numpy(counts[1:].copy())


@_positions.register_fake
def _(expert_ids: Tensor, num_experts: int, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(expert_ids, memory_format=torch.contiguous_format), expert_ids.new_empty(num_experts)


def _shortest_type(num_experts: int) -> type[np.unsignedinteger]:
    """Return the type of the keys: numpy sorts one or two bytes by radix, a pass a byte, longer keys by comparison."""
    return np.uint8 if num_experts < 256 else np.uint16 if num_experts < 65536 else np.uint64


def check_range(expert_ids: Tensor, num_experts: int) -> None:
    """Raise ValueError for an id outside of -1 .. E-1."""
    if expert_ids.numel() == 0:
        return
    low, high = (int(bound) for bound in expert_ids.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"got expert id {low if low < -1 else high}, wanted 0 .. {num_experts - 1}, or -1 for an absent pair: "
            "check the router"
        )
