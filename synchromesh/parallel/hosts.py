"""Hosts: who holds which experts on one level of a deduplicated exchange.

A host is one member of a group, or the r members that hold the pieces of the same experts: whoever needs one of these
experts sends to all of them. On one level the members are ranks; on two they are first nodes, each with all experts of
its ranks, then the ranks of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from synchromesh.parallel.layout import Layout


@dataclass(frozen=True)
class Hosts:
    """The experts of a level, by number, and their hosts.

    Attributes:
        host: int64, the host of each expert.
        place: int64, the number of each expert among those of its host.
        members: int64, the r members of each host.
        host_of_member: int64.
        local_experts: N, of each host.
    """

    host: Int[Tensor, " E"]
    place: Int[Tensor, " E"]
    members: Int[Tensor, "H r"]
    host_of_member: Int[Tensor, " X"]
    local_experts: int

    @classmethod
    def of(cls, held: Sequence[Sequence[int]], device: torch.device) -> Hosts:
        """Return the hosts of members that hold these experts each.

        Raises:
            ValueError: two members hold some experts in common and others not.
        """
        kinds = {experts: number for number, experts in enumerate(dict.fromkeys(map(tuple, held)))}
        hosts = [kinds[tuple(experts)] for experts in held]
        members: list[list[int]] = [[] for _ in kinds]
        for member, host in enumerate(hosts):
            members[host].append(member)
        where = {expert: (host, place) for experts, host in kinds.items() for place, expert in enumerate(experts)}
        if len(where) != sum(map(len, kinds)) or len(set(map(len, members))) != 1 or len(set(map(len, kinds))) != 1:
            raise ValueError(f"got members that hold the experts {held}, wanted equal numbers, none in part in common")
        own, place = zip(*(where[expert] for expert in range(len(where))), strict=True)
        tensors = (torch.tensor(numbers, device=device) for numbers in (own, place, members, hosts))
        return cls(*tensors, local_experts=len(next(iter(kinds))))

    @property
    def count(self) -> int:
        """H."""
        return self.members.shape[0]

    @property
    def copies(self) -> int:
        """r: members of a host."""
        return self.members.shape[1]


def hosts_of(layout: Layout, device: torch.device) -> Hosts:
    """Return the members of an exchange group as hosts of all experts."""
    return Hosts.of([layout.experts_of(member) for member in range(layout.members)], device)


def hosts_on_two_levels(layout: Layout, per_node: int, node: int, device: torch.device) -> tuple[Hosts, Hosts]:
    """Return the nodes as hosts of all experts, and the members of one node as hosts of that node's experts.

    Args:
        layout: of the plan.
        per_node: members of the exchange group on each node.
        node: whose members are asked for.
        device: of the tensors.
    """
    members = range(layout.members)
    nodes = [
        list(
            dict.fromkeys(
                expert for member in members[first : first + per_node] for expert in layout.experts_of(member)
            )
        )
        for first in members[::per_node]
    ]
    number = {expert: place for place, expert in enumerate(nodes[node])}
    own = members[node * per_node : (node + 1) * per_node]
    return Hosts.of(nodes, device), Hosts.of([[number[e] for e in layout.experts_of(m)] for m in own], device)
