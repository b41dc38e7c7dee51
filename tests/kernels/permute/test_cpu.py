import pytest
import torch

from synchromesh.kernels import CPU
from synchromesh.kernels.permute.cpu import weighed
from synchromesh.testing.cases import Case, evil_cases, row_map_of

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)


@CASES
def test_gradcheck(case: Case):
    rowmap = row_map_of(case.expert_ids[:6], case.num_experts, capacity=case.capacity)
    x = torch.randn(len(case.expert_ids[:6]), 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(case.expert_ids[:6].shape, dtype=torch.float64, requires_grad=True)
    if x.numel():
        assert torch.autograd.gradcheck(lambda x, w: CPU.combine(CPU.gather(x, rowmap), w, rowmap), (x, weights))


@CASES
def test_registrations_agree_with_the_kernels(case: Case):
    rowmap = case.rowmap()
    x = case.tokens(4, torch.float32).nan_to_num().requires_grad_()
    ops = torch.ops.synchromesh
    if int(rowmap.ends[-1]) == len(rowmap.pairs):  # opcheck compares whole outputs, and the tail may hold anything
        torch.library.opcheck(ops.gather_cpu.default, (x, rowmap.pairs, rowmap.ends, rowmap.rows.shape[1]))
    buffer = torch.randn(len(rowmap.pairs), 4, requires_grad=True)
    weights = torch.rand(case.expert_ids.shape, requires_grad=True)
    torch.library.opcheck(ops.combine_cpu.default, (buffer, weights, rowmap.pairs, rowmap.ends))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
def test_rows_times_their_weights_are_rounded_once(rows, scale):
    a, b = torch.randn(20, 3).to(rows), torch.randn(20, 1).to(scale)
    out = torch.promote_types(rows, scale)
    wanted = (a.double() * b.double()).to(out)  # products of float32 fit into float64
    assert torch.equal(weighed(a, b, torch.full((20, 3), torch.nan, dtype=out)), wanted)
