"""Every expert has one host on each level, and its members together hold all of it."""

import pytest
import torch

from synchromesh.parallel.hosts import Hosts, hosts_of, hosts_on_two_levels
from synchromesh.parallel.layout import Layout
from synchromesh.planning.lattice import Ranks, every_plan, members_per_node, refusal

CPU = torch.device("cpu")
GRIDS = [(world, experts) for world in (2, 4, 6, 8, 12) for experts in (1, 2, 3, 4, 6, 12, 24)]
GRIDS = [(world, experts) for world, experts in GRIDS if world % experts == 0 or experts % world == 0]


def legal(world, experts, per_node, *, two_level):
    for plan in every_plan(world):
        plain = plan.chunks == 1 and not plan.regather and plan.two_level == two_level and plan.deduplicate
        if plain and refusal(plan, Ranks(world, per_node), experts, known_beforehand=False) is None:
            yield plan


@pytest.mark.parametrize(("world", "experts"), GRIDS)
def test_the_members_of_an_experts_host_are_those_its_rows_go_to(world, experts):
    for plan in legal(world, experts, world, two_level=False):
        layout = Layout(world, experts, plan.gather, plan.near)
        hosts = hosts_of(layout, CPU)
        assert (hosts.copies, hosts.local_experts) == (layout.copies, layout.local_experts)
        for expert, slots in enumerate(layout.destinations):
            members = hosts.members[hosts.host[expert]].tolist()
            assert members == [slot // layout.local_experts for slot in slots]
            assert {slot % layout.local_experts for slot in slots} == {int(hosts.place[expert])}
            assert all(int(hosts.host_of_member[member]) == int(hosts.host[expert]) for member in members)


@pytest.mark.parametrize(("world", "experts"), GRIDS)
def test_on_two_levels_node_and_place_lead_to_the_same_members(world, experts):
    for per_node in (2, 3, 4):
        if world % per_node:
            continue
        for plan in legal(world, experts, per_node, two_level=True):
            layout = Layout(world, experts, plan.gather, plan.near)
            local = members_per_node(plan, Ranks(world, per_node))
            levels = [hosts_on_two_levels(layout, local, node, CPU) for node in range(layout.members // local)]
            for expert, slots in enumerate(layout.destinations):
                nodes, _ = levels[0]
                found = []
                for node in nodes.members[nodes.host[expert]].tolist():
                    _, inside = levels[node]
                    number = nodes.place[expert]
                    found += [node * local + place for place in inside.members[inside.host[number]].tolist()]
                    assert int(inside.place[number]) == slots[0] % layout.local_experts
                assert sorted(found) == [slot // layout.local_experts for slot in slots]


def test_members_that_share_a_part_of_their_experts_are_no_hosts():
    with pytest.raises(ValueError, match="none in part in common"):
        Hosts.of([[0, 1], [1, 2]], CPU)
