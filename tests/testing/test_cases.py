import torch

from synchromesh.testing.cases import balanced, chosen_by_experts, evil_cases, row_map_of, zipf


def test_names_are_unique_and_ids_in_range():
    cases = evil_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.expert_ids.numel() == 0 or -1 <= int(case.expert_ids.min()) <= int(case.expert_ids.max())
        assert case.expert_ids.numel() == 0 or int(case.expert_ids.max()) < case.num_experts


def test_a_balanced_routing_differs_by_one_pair_at_most():
    counts = balanced(1000, 7, 3).flatten().bincount(minlength=7)
    assert int(counts.max() - counts.min()) <= 1


def test_a_zipf_routing_is_skewed_and_gives_a_token_different_experts():
    ids = zipf(4000, 32, 2)
    assert all(len(set(row)) == 2 for row in ids[:50].tolist())
    counts = ids.flatten().bincount(minlength=32)
    assert int(counts.max()) > 4 * int(counts.sum()) / 32


def test_experts_choose_as_many_tokens_as_told():
    ids = chosen_by_experts(20, 6, 4)
    assert (ids >= 0).sum(0).tolist() == [4] * 6


def test_a_row_map_keeps_first_choices_before_second_ones():
    rowmap = row_map_of(torch.tensor([[1, 0], [0, 1], [-1, 0]]), 2, capacity=2)
    assert rowmap.rows.tolist() == [[2, 1], [0, 3], [-1, -1]]
    assert rowmap.pairs.tolist() == [2, 1, 0, 3]
    assert rowmap.ends.tolist() == [2, 4]
