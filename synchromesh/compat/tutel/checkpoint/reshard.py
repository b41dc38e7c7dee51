"""State dicts of Tutel's ranks, from W ranks to one and from one to W: pure functions.

A layer of prefix P has the tensor `P_num_global_experts` (E), and its experts' tensors under `Pexperts.`. Where W
divides E, each rank holds E / W whole experts, dim 0 of each tensor; else S = W / E neighbours hold equal parts of dim
1, the hidden one, of one expert. Tensors of gated experts (`W_fc1` and so on) are [E, D F] laid flat. What has no
hidden dim, the output bias [E, D] and the flat ones, is filled up with zeros to a multiple of S.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from synchromesh.compat.tutel.state import COUNT, new_format

State = Mapping[str, Any]
GATE = r"gates\.\d+\.(wg|cosine_projector)\.weight"  # what ends in model_dim


def expert_counts(state: State, default: int | None = None) -> dict[str, int]:
    """Return the number of experts of each MoE layer, by the layer's prefix ("" or with a dot at its end).

    Args:
        default: of layers without such a tensor, as old versions wrote them.

    Raises:
        ValueError: there is no MoE layer, or one does not say its number and there is no default.
    """
    counts = {key.removesuffix(COUNT): int(state[key]) for key in state if re.fullmatch(rf"(.*\.)?{COUNT}", key)}
    known = r"batched_fc|W_fc" if default is None else ""  # only with a number given may it be any kind of experts
    layers = (re.match(rf"(.*?\.)?experts\.({known})", key) for key in state)
    silent = {layer[1] or "" for layer in layers if layer} - set(counts)
    if silent and default is None:
        raise ValueError(
            f"the layer {min(silent)!r} has experts and no {COUNT}, as in files of old versions: "
            "say how many there are with --default_num_global_experts"
        )
    counts |= {prefix: default for prefix in silent if default is not None}
    if not counts:
        raise ValueError(f"there is no MoE layer in {sorted(state)[:4]} and so on: is the state dict in a --namespace?")
    for prefix, count in counts.items():
        if count < 1:
            raise ValueError(f"the layer {prefix!r} says it has {count} experts, wanted 1 or more")
    return counts


def gather(
    states: Iterable[State], default_num_experts: int | None = None, default_model_dim: int | None = None
) -> dict[str, Any]:
    """Join the state dicts of all ranks to that of one process; what is not of experts is the first rank's.

    Args:
        states: one of each rank, in order; they are read once, and only experts are kept of all.
        default_num_experts: of layers of old versions, which do not say it.
        default_model_dim: of layers with gates of the user's own alone, which do not say it.

    Raises:
        ValueError: ranks and experts do not divide, tensors do not fit, or there is no MoE layer.
    """
    whole: dict[str, Any] = {}
    layers: dict[str, int] = {}
    parts: dict[str, list[Tensor]] = {}
    for rank, state in enumerate(states):
        if rank == 0:
            whole, counts = dict(state), expert_counts(state, default_num_experts)
            layers = _experts(state, counts)
            parts = {key: [] for key in layers}
            whole |= {prefix + COUNT: torch.tensor(count) for prefix, count in counts.items()}
        for key, own in parts.items():
            if key not in state:
                raise ValueError(f"rank {rank} has no {key}, which rank 0 has")
            own.append(new_format(key, state[key]))
    return whole | {key: _join(key, parts.pop(key), count, whole, default_model_dim) for key, count in layers.items()}


def scatter(state: State, ranks: int, default_num_experts: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the state dict of each rank, from that of one process.

    Raises:
        ValueError: as in `gather`.
    """
    counts = expert_counts(state, default_num_experts)
    layers = _experts(state, counts)
    cut = {key: _cut(key, new_format(key, state[key]), count, ranks) for key, count in layers.items()}
    numbers = {prefix + COUNT: torch.tensor(count) for prefix, count in counts.items()}
    for rank in range(ranks):  # a part gets memory of its own: a file holds all that a view shows a part of
        yield {**state, **numbers, **{key: parts[rank].clone() for key, parts in cut.items()}}


def _experts(state: State, counts: Mapping[str, int]) -> dict[str, int]:
    """Return the number of experts of the layer that each tensor of experts belongs to."""
    found = {}
    for prefix, count in counts.items():
        found |= {key: count for key in state if key.startswith(f"{prefix}experts.") and torch.is_tensor(state[key])}
    return found


def _width(key: str, state: State, filled: int, shards: int, default_model_dim: int | None) -> int:
    """Return the length of dim 1 of a whole tensor that may have been filled up to this length."""
    prefix, _, name = key.rpartition("experts.")
    if name == "batched_fc2_bias" and prefix + "experts.batched_fc2_w" in state:
        return state[prefix + "experts.batched_fc2_w"].shape[-1]
    if not name.startswith("W_fc") or shards == 1:
        return filled
    gates = (entry for entry in state if re.fullmatch(re.escape(prefix) + GATE, entry))
    model_dim = next((state[entry].shape[-1] for entry in gates), default_model_dim)
    if not model_dim:
        raise ValueError(
            f"{key} may be filled up with zeros, as {shards} ranks share an expert, and no gate of its layer is 'top' "
            "or 'cosine_top' and says model_dim, of which a whole one is a multiple: say it with --default_model_dim"
        )
    return filled - filled % model_dim


def _shards(key: str, experts: int, ranks: int) -> int:
    """Return how many ranks share one expert."""
    if experts % ranks and ranks % experts:
        raise ValueError(f"{key} has {experts} experts and there are {ranks} ranks, wanted one to divide the other")
    return max(1, ranks // experts)


def _join(key: str, parts: list[Tensor], experts: int, state: State, default_model_dim: int | None) -> Tensor:
    ranks, first = len(parts), parts[0]
    shards, local = _shards(key, experts, ranks), max(1, experts // ranks)
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"{key} differs in shape between ranks: {sorted({tuple(part.shape) for part in parts})}")
    if first.ndim < 2:
        parts = [_by_expert(key, part, local) for part in parts]
        return _join(key, parts, experts, state, default_model_dim).flatten()
    width = _width(key, state, first.shape[1] * shards, shards, default_model_dim)
    if first.shape[0] != local or first.shape[1] != -(-width // shards):
        raise ValueError(
            f"{key} has shape {tuple(first.shape)} on each of {ranks} ranks, wanted {local} in dim 0"
            f"{f' and {-(-width // shards)} in dim 1' if first.shape[0] == local else ''} for {experts} experts: "
            "is this the number of ranks that wrote it?"
        )
    return torch.cat(parts).reshape(experts, -1, *first.shape[2:])[:, :width]


def _cut(key: str, whole: Tensor, experts: int, ranks: int) -> list[Tensor]:
    """Return the parts of all ranks, as views where they need not be filled up."""
    shards = _shards(key, experts, ranks)
    if whole.ndim < 2:
        return [part.flatten() for part in _cut(key, _by_expert(key, whole, experts), experts, ranks)]
    if whole.ndim == 2 and not key.endswith("batched_fc1_bias"):
        whole = torch.nn.functional.pad(whole, (0, -whole.shape[1] % shards))
    if len(whole) != experts or whole.shape[1] % shards:
        raise ValueError(
            f"{key} has shape {tuple(whole.shape)}, which cannot be cut for {ranks} ranks: wanted {experts} in dim 0"
            f"{f' and a multiple of {shards} in dim 1' if shards > 1 else ''}"
        )
    return list(whole.reshape(ranks, max(1, experts // ranks), whole.shape[1] // shards, *whole.shape[2:]))


def _by_expert(key: str, flat: Tensor, experts: int) -> Tensor:
    if flat.numel() % experts:
        raise ValueError(f"{key} has {flat.numel()} numbers, wanted a multiple of {experts} experts")
    return flat.reshape(experts, -1)
