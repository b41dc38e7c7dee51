import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh.compat.tutel.routing import choose, extract_critical, route, weights_at_the_entry
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

T, E = 21, 4


def scores_of(seed, tokens=T):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, E, generator=generator, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("factor", [1.0, 0.4, 0.0, -0.4, -9.0])
@pytest.mark.parametrize("alignment", [1, 4])
def test_queues_are_served_choice_by_choice(prioritized, k, factor, alignment):
    scores = scores_of(k)
    (experts, ids, places, weights, capacity, counts), loss = extract_critical(
        scores, k, capacity_factor=factor, batch_prioritized_routing=prioritized, alignment=alignment
    )
    k = min(k, E)
    order = scores.max(1).values.argsort(descending=True).tolist() if prioritized else list(range(T))
    best = scores.argsort(dim=1, descending=True)
    queue = [0] * E
    for choice in range(k):
        for token in order:
            expert = int(best[token, choice])
            assert (ids[choice][token], places[choice][token]) == (expert, queue[expert])
            queue[expert] += 1
    assert counts.tolist() == queue
    rows = k * int(abs(factor) * math.ceil(T / E))
    rows = rows if factor > 0 else max(queue) if factor == 0 else min(max(queue), rows)
    assert capacity == math.ceil(rows / alignment) * alignment
    assert experts == E
    assert len(ids) == len(places) == len(weights) == k
    total = sum(weights)
    assert_close("weights", total, torch.ones_like(total) if k > 1 else scores.max(1).values)
    assert 0 < float(loss) < E


def agreed():
    scores = scores_of(dist.get_rank(), tokens=8 + 8 * dist.get_rank())
    needed = extract_critical(scores, 2, capacity_factor=0)[0][4]
    fixed = [extract_critical(scores, 2, inequivalent_tokens=asked)[0][4] for asked in (False, True)]
    return fixed, needed, int(scores.topk(2).indices.flatten().bincount().max())


def test_ranks_agree_on_what_is_needed_and_on_tokens_where_asked():
    results = run_ranks(agreed, 2)
    assert [fixed for fixed, _, _ in results] == [[4, 8], [8, 8]]
    assert {needed for _, needed, _ in results} == {max(own for _, _, own in results)}


def test_no_choice_is_one_absent_pair():
    scores = scores_of(0)
    ids, weights = choose(scores, 0, normalize=True)
    assert (ids == -1).all()
    assert (weights == 0).all()
    with pytest.raises(ValueError, match="top_k is 0, wanted at least 1"):
        extract_critical(scores, 0)


def test_a_gate_decides_in_its_own_dtype_and_its_noise_is_the_generators():
    gate = nn.Linear(6, E, bias=False)
    gate.gate_noise = 2.0
    x = torch.randn(T, 6, dtype=torch.bfloat16)
    torch.manual_seed(5)
    routing, _ = route(gate, x, 2, noisy=True, normalize=False, gshard=True)
    torch.manual_seed(5)
    logits = gate(x.float())
    scores = (logits + 2.0 * torch.randn_like(logits) / E).softmax(1)
    assert_close("scores", routing.scores, scores)
    assert_close("weights", routing.weights, scores.topk(2).values)
    with pytest.raises(ValueError, match="top_k is -1, wanted 1 to 4"):
        route(gate, x, -1, noisy=True, normalize=False, gshard=True)


def test_weights_at_the_entry_make_a_token_of_each_pair():
    gate = nn.Linear(6, E, bias=False)
    gate.gate_noise = 0.0
    x = torch.randn(T, 6)
    routing, _ = route(gate, x, 2, noisy=False, normalize=True, gshard=True)
    pairs, own = weights_at_the_entry(x, routing)
    assert_close("pairs", pairs.view(T, 2, 6), x[:, None] * routing.weights[..., None])
    assert torch.equal(own.expert_ids.view(T, 2), routing.expert_ids)
    assert (own.weights == 1).all()
