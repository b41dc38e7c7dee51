import dataclasses

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, REFERENCE, MLPWeights
from synchromesh.kernels.direct_mlp import token
from synchromesh.kernels.direct_mlp.token import Run, runs
from synchromesh.testing.cases import NETWORKS, network_parts
from synchromesh.testing.compare import assert_close

CHOICES = [[3], [4, 1], [1, 4], [0, 1, 2, 3, 5], [7, 5, 3, 1, 8], [2, 2], [2, -1, 6, 2], [-1, -1], []]


def mlp_of(kind, dtype):
    torch.manual_seed(0)
    return MLPWeights(**network_parts(kind, 9, dtype, width=10, hidden=16), joint="joint" in kind)


@pytest.mark.parametrize("most_step", [0, 1, 2, 9])
@pytest.mark.parametrize("experts", [[], [4], [1, 2], [0, 2, 4, 5, 8], [2, 2, 2, 3], [0, 3, 6, 8]], ids=str)
def test_runs_hold_every_expert_once_and_in_order_at_steps_that_are_allowed(experts, most_step):
    found = runs(experts, most_step)
    assert [expert for run in found for expert in list(range(9))[run.experts]] == experts
    assert all(run.step <= most_step for run in found if run.number > 1)


def test_experts_at_equal_distances_are_one_run():
    assert runs([1, 4, 7], 9) == [Run(1, 3, 3)]
    assert runs([1, 4, 7], 2) == [Run(1, 1, 1), Run(4, 1, 1), Run(7, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("most_step", [0, 1, 9, None])
@pytest.mark.parametrize("kind", NETWORKS)
def test_output_is_the_references_whatever_the_runs(monkeypatch, kind, most_step, dtype):
    if most_step is not None:
        monkeypatch.setattr(token, "_most_step", lambda *_: most_step)
    mlp, x = mlp_of(kind, dtype), torch.randn(1, 10).to(dtype)
    for ids in (torch.tensor([own], dtype=torch.int64) for own in CHOICES):
        weights = torch.rand(ids.shape).masked_fill(ids < 0, torch.nan)  # of an absent pair nobody may read it
        wanted = REFERENCE.direct_mlp(x, weights, ids, mlp, F.silu)
        assert_close("y", CPU.direct_mlp(x, weights, ids, mlp, F.silu), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_kept_transposed_give_the_same(dtype):
    mlp, x, ids = mlp_of("gated", dtype), torch.randn(1, 10).to(dtype), torch.tensor([[6, 1]])
    turned = MLPWeights(*(w if w is None else w.mT.contiguous().mT for w in mlp.tensors()))
    assert_close("y", *(CPU.direct_mlp(x, torch.rand(1, 2).fill_(0.5), ids, each, F.relu) for each in (turned, mlp)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_between_the_chosen_ones_are_not_read(dtype):
    mlp = mlp_of("gated_biased", dtype)
    parts = {name: getattr(mlp, name) for name in ("up", "down", "gate", "up_bias", "gate_bias", "down_bias")}
    others = torch.tensor([0, 2, 3, 4, 6, 7, 8])
    broken = dataclasses.replace(mlp, **{name: part.index_fill(0, others, torch.nan) for name, part in parts.items()})
    x, weights, ids = torch.randn(1, 10).to(dtype), torch.rand(1, 2), torch.tensor([[5, 1]])
    assert torch.equal(*(CPU.direct_mlp(x, weights, ids, each, F.gelu) for each in (broken, mlp)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_choices_changes_no_bit(dtype):
    mlp, x, weights = mlp_of("joint_biased", dtype), torch.randn(1, 10).to(dtype), torch.rand(1, 3)
    ids = torch.tensor([[8, 3, 4]])
    results = [CPU.direct_mlp(x, weights[:, o], ids[:, o], mlp, F.silu) for o in ([0, 1, 2], [2, 0, 1], [1, 2, 0])]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("wrong", [9, -2])
def test_ids_of_no_expert_are_refused(wrong):
    with pytest.raises(ValueError, match=f"got expert id {wrong}, wanted 0 .. 8"):
        CPU.direct_mlp(
            torch.randn(1, 10), torch.rand(1, 2), torch.tensor([[0, wrong]]), mlp_of("plain", torch.float32), F.gelu
        )
