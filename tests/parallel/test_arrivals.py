"""Rows that lie as an exchange brought them go through their experts, and what comes out lies where they lay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh import GatedMLPExperts, MLPExperts, ModuleExperts
from synchromesh.kernels import CPU, REFERENCE
from synchromesh.parallel.arrivals import Arrivals
from synchromesh.testing.compare import assert_close
from synchromesh.testing.copies import RowCopies

D, HIDDEN, COUNTS = 6, 10, [[3, 0, 5], [1, 4, 0], [0, 0, 0], [7, 2, 1]]
EXPERTS = {
    "fused": lambda n: MLPExperts(n, D, hidden=HIDDEN),
    "gated": lambda n: GatedMLPExperts(n, D, hidden=HIDDEN),
    "activation of their own": lambda n: MLPExperts(n, D, hidden=HIDDEN, activation=torch.sin),
    "modules": lambda n: ModuleExperts([nn.Linear(D, D) for _ in range(n)]),
}
FUSED = ("fused", "gated")


def arrived(counts):
    counts = torch.tensor(counts)
    rowmap = CPU.segment_map(counts, num_rows=int(counts.sum()))
    return Arrivals(rowmap, in_order=1 in counts.shape)


def weights_of(experts):
    if isinstance(experts, ModuleExperts):
        return dict(experts.named_parameters())
    return {name: part.unflatten(0, (experts.num_experts, -1)) for name, part in experts.parts().items()}


def one_by_one(experts, rows, counts):
    """Run each segment alone, by its own expert."""
    out, start = [], 0
    for of_member in counts:
        for expert, n in enumerate(of_member):
            own = rows[start : start + n]
            start += n
            if isinstance(experts, ModuleExperts):
                out.append(experts.experts[str(expert)](own))
                continue
            h = F.linear(own, experts.up[expert], None if experts.up_bias is None else experts.up_bias[expert])
            gated = isinstance(experts, GatedMLPExperts)
            a = experts.activation(F.linear(own, experts.gate[expert])) * h if gated else experts.activation(h)
            out.append(a @ experts.down[expert] + (0 if experts.down_bias is None else experts.down_bias[expert]))
    return torch.cat(out)


def with_gradients(run, rows, experts):
    rows = rows.clone().requires_grad_()
    out = run(rows)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, [rows, *experts.parameters()], torch.randn(out.shape, dtype=out.dtype))
    return out.detach(), *grads


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("counts", [COUNTS, [[3, 0, 5]], [[2], [0], [4]], [[0, 0], [0, 0]]], ids=str)
@pytest.mark.parametrize("kind", EXPERTS)
def test_each_row_goes_through_its_own_expert_and_every_gradient_is_right(kind, counts, kernels):
    torch.manual_seed(0)
    experts, lie = EXPERTS[kind](len(counts[0])).double(), arrived(counts)
    rows = torch.randn(len(lie.rowmap.pairs), D, dtype=torch.float64)
    got = with_gradients(lambda rows: lie.through(rows, experts, weights_of(experts), kernels), rows, experts)
    wanted = with_gradients(lambda rows: one_by_one(experts, rows, counts), rows, experts)
    for one, other in zip(got, wanted, strict=True):
        assert_close("an output or a gradient", one, other)


@pytest.mark.parametrize("kind", EXPERTS)
def test_rows_are_copied_only_for_experts_that_no_kernel_gathers_for(kind):
    experts, lie = EXPERTS[kind](3), arrived(COUNTS)
    weights = weights_of(experts)
    rows = torch.randn(len(lie.rowmap.pairs), D, requires_grad=True)
    grad = torch.randn(rows.shape)
    with RowCopies(D) as copies:
        lie.through(rows, experts, weights, CPU).backward(grad)
    assert copies.found["index_select"] == (0 if kind in FUSED else 4)  # both ways, in forward and in backward
    if kind in FUSED:
        assert not copies.found
