"""A token has one row for each member that holds some of its experts, with all of them in its tags."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import CPU, REFERENCE
from synchromesh.parallel.hosts import Hosts, hosts_of
from synchromesh.parallel.layout import Layout
from synchromesh.parallel.token_map import Pairs, leading_columns, map_tokens

LAYOUTS = [Layout(*sizes) for sizes in ((2, 2, 1, True), (4, 2, 1, True), (4, 16, 1, True), (4, 8, 2, False))]
HOSTS = [hosts_of(layout, torch.device("cpu")) for layout in LAYOUTS]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Pairs, Hosts]:
    hosts = HOSTS[draw(st.integers(0, len(HOSTS) - 1))]
    tokens, choices = draw(st.integers(0, 7)), draw(st.integers(1, 6))
    numbers = st.lists(st.integers(-1, len(hosts.host) - 1), min_size=tokens * choices, max_size=tokens * choices)
    ids = torch.tensor(draw(numbers), dtype=torch.int64).view(tokens, choices)
    weights = (1 + torch.arange(ids.numel(), dtype=torch.float64).sqrt()).view(ids.shape)
    return Pairs(ids, weights.masked_fill(ids < 0, torch.nan)), hosts


def defined(pairs: Pairs, hosts: Hosts) -> list[tuple[int, int, dict[int, float]]]:
    """By loops: (member, token, {place of an expert: sum of its weights}) of every row, in any order."""
    rows = []
    for member, host in enumerate(hosts.host_of_member.tolist()):
        for token, ids in enumerate(pairs.ids.tolist()):
            there = {}
            for column, expert in enumerate(ids):
                if expert >= 0 and int(hosts.host[expert]) == host:
                    place = int(hosts.place[expert])
                    there[place] = there.get(place, 0.0) + float(pairs.weights[token, column])
            if there:
                rows.append((member, token, there))
    return rows


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=["reference", "cpu"])
@given(cases())
@settings(deadline=None, max_examples=80)
def test_rows_are_those_of_the_definition_sorted_by_member(kernels, drawn):
    pairs, hosts = drawn
    wanted = defined(pairs, hosts)
    found = map_tokens(pairs, hosts, kernels).cut(len(wanted))
    tokens = found.send.pairs // max(1, found.send.rows.shape[1])
    ids, weights = found.tags(pairs.weights)
    got, row = [], 0
    for member, count in enumerate(found.to_each[0].tolist()):
        for _ in range(count):
            there: dict[int, float] = {}
            for place, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
                if place >= 0:
                    there[place] = there.get(place, 0.0) + weight
                else:
                    assert weight == 0
            got.append((member, int(tokens[row]), there))
            row += 1
    assert row == len(wanted)
    for one, other in zip(sorted(got, key=lambda r: r[:2]), sorted(wanted, key=lambda r: r[:2]), strict=True):
        assert one[:2] == other[:2]
        assert one[2] == pytest.approx(other[2])
    of_member = [int((hosts.host[pairs.ids[pairs.ids >= 0]] == h).sum()) for h in hosts.host_of_member.tolist()]
    assert found.to_each[1].tolist() == of_member
    rows = torch.arange(len(wanted), dtype=torch.float64)[:, None]
    sums = found.add(rows, kernels)[:, 0].tolist()  # of row numbers
    assert sums == [float((tokens == token).nonzero().sum()) for token in range(len(pairs.ids))]


@given(cases())
@settings(deadline=None, max_examples=80)
def test_gradients_of_weights_are_those_of_the_tags(drawn):
    """The tags are a linear map of the weights: of_pairs must be its transpose."""
    pairs, hosts = drawn
    found = map_tokens(pairs, hosts, REFERENCE).cut(len(defined(pairs, hosts)))
    _, tags = found.tags(pairs.weights)
    grad = torch.rand_like(tags)
    back = found.of_pairs(grad)
    assert back.shape == pairs.weights.shape
    assert (back[pairs.ids < 0] == 0).all()
    kept = pairs.weights.nan_to_num(0)
    assert float((tags * grad).sum()) == pytest.approx(float((kept * back).sum()))


@given(st.integers(0, 6), st.integers(1, 7), st.randoms(use_true_random=False))
def test_the_leading_column_is_the_first_with_the_same_number(tokens, choices, random):
    rows = [[random.randint(0, 3) for _ in range(choices)] for _ in range(tokens)]
    keys = torch.tensor(rows, dtype=torch.int64).view(tokens, choices)
    assert leading_columns(keys).tolist() == [[row.index(key) for key in row] for row in rows]
