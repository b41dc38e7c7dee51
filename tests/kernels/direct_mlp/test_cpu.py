import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, REFERENCE, MLPWeights, autocast
from synchromesh.kernels.direct_mlp import cpu
from synchromesh.kernels.product_costs import costs_here
from synchromesh.testing.cases import NETWORKS, Case, evil_cases, network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close


def mlp_of(kind, experts, dtype):
    return MLPWeights(**network_parts(kind, experts, dtype, width=10, hidden=17), joint="joint" in kind)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(
    "case", [case for case in evil_cases() if case.capacity is None and case.max_pairs is None], ids=lambda c: c.name
)
def test_the_definition_is_that_of_fused_mlp_where_nothing_is_dropped(case: Case, kind):
    x, weights, mlp = case.tokens(10, torch.float64), case.weights(torch.float64), mlp_of(kind, 20, torch.float64)
    wanted = REFERENCE.fused_mlp(x, weights, row_map_of(case.expert_ids, 20), mlp, F.silu)
    assert_close("y", REFERENCE.direct_mlp(x, weights, case.expert_ids, mlp, F.silu), wanted)


@pytest.mark.parametrize("wrong", [4, -2])
def test_ids_of_no_expert_are_refused(wrong):
    mlp, ids = mlp_of("plain", 4, torch.float32), torch.tensor([[0, 1], [wrong, -1]])
    with pytest.raises(ValueError, match=f"got expert id {wrong}, wanted 0 .. 3"):
        CPU.direct_mlp(torch.randn(2, 10), torch.rand(2, 2), ids, mlp, F.gelu)


def test_autocast_chooses_the_dtype():
    ids, mlp, x = zipf(8, 4, 2), mlp_of("plain", 4, torch.float32), torch.randn(8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        assert CPU.direct_mlp(x, torch.rand(8, 2), ids, mlp, F.gelu).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", NETWORKS)
def test_experts_cast_one_by_one_under_autocast_are_those_cast_before_bit_for_bit(monkeypatch, kind):
    mlp = mlp_of(kind, 9, torch.float32)
    for ids in (zipf(30, 9, 3), torch.tensor([[8, 2]]), torch.tensor([[0, -1], [-1, -1], [5, 3], [0, 5]])):
        x, weights, results = torch.randn(len(ids), 10), torch.rand(ids.shape), []
        for from_bytes in (2**40, 1):
            monkeypatch.setattr(autocast, "HUGE_FROM", from_bytes)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                results.append(CPU.direct_mlp(x, weights, ids, mlp, F.gelu))
        assert torch.equal(*results)


def test_it_is_for_few_pairs_and_known_activations():
    assert CPU.prefers_direct(512, 8, F.silu)
    assert not CPU.prefers_direct(513, 8, F.silu)
    assert not CPU.prefers_direct(2, 8, torch.sin)
    assert not REFERENCE.prefers_direct(2, 8, F.silu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(
    "joins", [lambda *_: True, lambda *_: False, lambda *sizes: sum(sizes) % 2 == 0], ids=["all", "none", "some"]
)
def test_padding_changes_no_result(monkeypatch, joins, kind, dtype):
    monkeypatch.setattr(cpu, "_joins", lambda *_: joins)
    mlp = mlp_of(kind, 9, dtype)
    for ids in (zipf(30, 9, 3), torch.tensor([[8, 2]]), torch.tensor([[0, -1], [-1, -1], [5, 3], [0, 5]])):
        x, weights = torch.randn(len(ids), 10).to(dtype), torch.rand(ids.shape).to(dtype)
        wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
        assert_close("y", CPU.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


@pytest.mark.parametrize(
    "joins", [lambda *_: True, lambda *_: False, lambda *sizes: sum(sizes) % 2 == 0], ids=["all", "none", "some"]
)
def test_every_pair_has_a_place_of_its_own_among_its_experts(joins):
    ids = zipf(50, 12, 3).reshape(-1).numpy().copy()
    ids[::7] = -1
    layout = cpu.laid_out(ids, joins)
    assert sorted(layout.pairs.tolist()) == [pair for pair, expert in enumerate(ids) if expert >= 0]
    assert len(set(layout.slots.tolist())) == len(layout.slots)
    assert (layout.pair_of_slot[layout.slots] == layout.pairs).all()
    expert_of_slot = [e for batch in layout.batches for e in range(batch.first, batch.stop) for _ in range(batch.rows)]
    assert [expert_of_slot[slot] for slot in layout.slots] == ids[layout.pairs].tolist()
    assert layout.padded == (len(expert_of_slot) > len(layout.pairs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_takes_in_an_expert_by_the_costs_of_this_machine(dtype):
    net, costs = mlp_of("plain", 4, dtype).tensors(), costs_here(torch.get_num_threads(), dtype)
    joins, sizes = cpu._joins(dtype, net), [(1, 1, 0, 1), (1, 1, 3, 2), (4, 2, 0, 1), (1, 1, 10**9, 1)]
    wanted = [costs.joins(experts=e, rows=r, skipped=s, count=c, numbers=10 * 17) for e, r, s, c in sizes]
    assert [joins(*own) for own in sizes] == wanted
    assert [joins(*own) for own in sizes] == wanted  # asked again
    assert len(set(wanted)) == 2
