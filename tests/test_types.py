import copy
import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from synchromesh.types import LoadStats, Plan, Routing, RowMap, Workload


def routing(ids: list[list[int]], experts: int = 3) -> Routing:
    ids_TK = torch.tensor(ids)
    scores = torch.rand(len(ids), experts)
    return Routing(ids_TK, torch.rand(ids_TK.shape), scores, scores.log())


def test_absent_pairs_are_not_counted():
    values = routing([[0, -1], [2, 0], [-1, -1]])
    assert values.tokens_per_expert().tolist() == [2, 0, 1]
    assert values.tokens_per_expert(1).tolist() == [1, 0, 1]


def test_known_sums_are_read_where_they_answer_and_forgotten_with_what_they_were_of():
    values = routing([[0, 1, 2], [2, 0, 1]])
    known = values.with_sums(torch.tensor([7.0, 8.0, 9.0]), torch.tensor([[10, 11, 12], [13, 14, 15]]))
    assert known.scores_per_expert().tolist() == [7, 8, 9]
    assert known.tokens_per_expert(1).tolist() == [10, 11, 12]
    assert [known.tokens_per_expert(k).tolist() for k in (None, 3, 4)] == [[13, 14, 15]] * 3
    assert known.tokens_per_expert(2).tolist() == values.tokens_per_expert(2).tolist() == [2, 1, 1]
    leaves, tree = pytree.tree_flatten(known)
    fewer = dataclasses.replace(known, expert_ids=known.expert_ids.masked_fill(known.expert_ids == 0, -1))
    for one in (values, fewer, pytree.tree_unflatten(leaves, tree)):
        assert one.score_sums is None
        assert one.choice_counts is None
    assert fewer.tokens_per_expert().tolist() == [0, 2, 2]


def test_every_value_shows_its_tensors_to_wrappers():
    """Hooks of DDP, activation checkpointing and export walk a module's output as a tree."""
    leaves, tree = pytree.tree_flatten(routing([[0], [1]]))
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 4
    assert isinstance(pytree.tree_unflatten(leaves, tree), Routing)
    rowmap = RowMap(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.ones(2).int(), None)
    assert len([x for x in pytree.tree_leaves(rowmap) if isinstance(x, torch.Tensor)]) == 3
    stats = LoadStats(torch.ones(2).long(), torch.tensor(0), Plan())
    assert len([x for x in pytree.tree_leaves(stats) if isinstance(x, torch.Tensor)]) == 2


def test_tokens_of_rows_are_forgotten_by_every_copy_that_may_hold_other_pairs():
    rowmap = RowMap(torch.tensor([[1, 0], [-1, 2]]), torch.tensor([1, 0, 3, -1]), torch.tensor([3]).int(), None)
    tokens = rowmap.token_of_rows()
    assert (tokens.tolist(), tokens.dtype) == ([0, 0, 1, -1], torch.int32)
    known = rowmap.with_tokens(tokens)
    assert known.token_of_rows() is tokens
    leaves, tree = pytree.tree_flatten(known)
    for one in (rowmap, dataclasses.replace(known, pairs=rowmap.pairs), pytree.tree_unflatten(leaves, tree)):
        assert one.tokens is None
        assert torch.equal(one.token_of_rows(), tokens)
    assert RowMap.of_rows(3, torch.tensor([1, 2])).token_of_rows().tolist() == [0, 1, -1]


def test_a_plan_is_a_key_and_survives_json():
    plan = Plan(gather=4, near=False, chunks=2, two_level=True, ragged=False, regather=True)
    assert {plan: 1}[copy.copy(plan)] == 1
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", ["[]", '{"gather": 1}', '{"gather": 1, "speed": 2}', "no json"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match=r"a plan holds the fields|Expecting value"):
        Plan.from_json(text)


@pytest.mark.parametrize("field", ["gather", "chunks"])
def test_a_plan_without_ranks_or_pieces_is_refused(field):
    with pytest.raises(ValueError, match=f"Plan.{field} is 0, wanted an integer >= 1"):
        Plan(**{field: 0})


def test_a_workload_is_a_key():
    def workload(skew: int) -> Workload:
        return Workload(8, 1, 4, 8, 2, torch.float32, training=True, skew=skew)

    assert len({workload(0), workload(0), workload(1)}) == 2


def test_nothing_routed_is_nothing_dropped():
    assert LoadStats(torch.zeros(3).long(), torch.tensor(0), Plan()).drop_rate == 0
    assert LoadStats(torch.tensor([3, 1]), torch.tensor(1), Plan()).drop_rate == 0.25
