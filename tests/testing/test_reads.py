import pytest
import torch

from synchromesh.kernels import CPU
from synchromesh.testing.reads import HostReads

X, M = torch.arange(4.0), torch.empty(4, device="meta")

READS = {
    "item": lambda: X[0].item(),
    "a condition": lambda: bool(X.sum() > 1),
    "int": lambda: int(X[1]),
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "nonzero": lambda: X.nonzero(),
    "unique": lambda: X.unique(),
    "masked_select": lambda: X.masked_select(X > 1),
    "a mask as index": lambda: X[X > 1],
    "a mask written through": lambda: X.clone().__setitem__(X > 1, torch.zeros(2)),
    "equal": lambda: torch.equal(X, X),
    "a tensor of the host's numbers": lambda: torch.tensor([1.0, 2.0]),
    "a tensor like another": lambda: X.new_tensor([1.0]),
    "another device": lambda: X.to("meta"),
    "inside a custom op": lambda: CPU.grouped_mm(X[:, None], X[None, :1, None], torch.tensor([4], dtype=torch.int32)),
}


@pytest.mark.parametrize("name", READS)
def test_what_a_graph_cannot_hold_is_noted_with_its_line(name):
    with HostReads() as reads:
        READS[name]()
    assert reads.found
    where = "kernels/grouped_mm/cpu.py" if name == "inside a custom op" else "test_reads.py"
    assert any(where in one for one in reads.found), reads.found


def test_a_backward_counts():
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.sum())

    y = Reading.apply(X.clone().requires_grad_()).sum()
    with HostReads() as reads:
        y.backward()
    assert len(reads.found) == 1


def test_what_stays_on_the_device_is_not_noted():
    own = X.clone().requires_grad_()
    with HostReads() as reads:
        rows = torch.where(own.detach() > 1, torch.arange(4), -1).clamp(min=0)
        y = (own[rows] * torch.full((4,), 2.0)).masked_fill(own.isnan(), 1.0)
        (y.sum() + own.new_full((1,), 3).sum()).backward()
    assert reads.found == []


def test_nothing_is_noted_after_the_block():
    with HostReads() as reads:
        pass
    X.sum().item(), X.tolist()
    assert reads.found == []


@pytest.mark.parametrize("make", [lambda: M.new_tensor([1.0]), lambda: torch.tensor([1.0], device="meta")])
def test_numbers_sent_to_a_device_without_numbers_are_noted(make):
    with HostReads() as reads:
        make()
    assert reads.found
