import torch

from synchromesh.testing.copies import RowCopies


def test_what_writes_rows_counts_forward_and_backward_and_what_looks_at_them_does_not():
    x, order = torch.randn(5, 3, requires_grad=True), torch.tensor([4, 0, 1])
    with RowCopies(3) as copies:
        own = x.detach()[1:].view(-1, 3)
        own[:0].clone()  # no row
        order.view(1, 3).clone()  # no number of a row
        own.index_select(0, order.clamp(max=3))
        torch.cat([own.t(), own.t()]).t()  # of another width
        (x * 2).backward(x.detach())
    assert copies.found == {"index_select": 1, "mul": 2}
