"""Collectives of unequal parts, on any device and any group, without gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from synchromesh.compat.tutel.communicate.groups import get_world_size, members
from synchromesh.compat.tutel.communicate.plain import simple_all_gather
from synchromesh.parallel.comm import collectives


def batch_all_to_all_v(
    datas: Sequence[Tensor], partition_sizes: Tensor | Sequence[int], group: ProcessGroup | None = None
) -> tuple[list[Tensor], Tensor]:
    """Send the parts of several tensors, cut in one way, to the ranks.

    Args:
        datas: tensors with the same number n of elements.
        partition_sizes: [W], elements for each rank; n in all.

    Returns:
        For each tensor what arrived, flat, in the order of ranks, and [W] how many elements of each rank that is. A
        rank alone gets its tensors back as they are.

    Raises:
        ValueError: the sizes do not fit the ranks or the tensors.
    """
    sizes = torch.as_tensor(partition_sizes, dtype=torch.int64, device=datas[0].device)
    _check(datas, [*sizes.tolist()], get_world_size(group))
    several = members(group)
    if several is None:
        return list(datas), sizes
    arriving = collectives.all_to_all(sizes, several).wait()
    received, sent = arriving.tolist(), sizes.tolist()
    flights = [collectives.all_to_all(data.detach().reshape(-1), several, received, sent) for data in datas]
    return [flight.wait() for flight in flights], arriving


def batch_all_gather_v(datas: Sequence[Tensor], group: ProcessGroup | None = None) -> tuple[list[Tensor], Tensor]:
    """Gather several tensors from all ranks, which may hold different numbers of elements.

    Args:
        datas: tensors with the same number of elements.

    Returns:
        For each tensor those of all ranks, flat, one after another, and [W] how many elements each rank had.

    Raises:
        ValueError: the tensors of a rank have different numbers of elements.
    """
    flat = [data.detach().reshape(-1) for data in datas]
    own = flat[0].numel()
    _check(flat, [own], 1)
    sizes = simple_all_gather(torch.tensor([own], device=flat[0].device), group)
    several = members(group)
    if several is None:
        return flat, sizes
    counts = sizes.tolist()
    padded = (torch.nn.functional.pad(data, (0, max(counts) - own)) for data in flat)
    flights = [collectives.all_gather(data, several) for data in padded]
    gathered = [[part[:n] for part, n in zip(flight.wait(), counts, strict=True)] for flight in flights]
    return [torch.cat(parts) for parts in gathered], sizes


def _check(datas: Sequence[Tensor], sizes: list[int], ranks: int) -> None:
    if len(sizes) != ranks:
        raise ValueError(f"got {len(sizes)} partition sizes, wanted one for each of {ranks} ranks")
    for data in datas:
        if data.numel() != sum(sizes) or min(sizes) < 0:
            raise ValueError(f"got a tensor of {data.numel()} elements, wanted {sum(sizes)}: the sum of {sizes}")
