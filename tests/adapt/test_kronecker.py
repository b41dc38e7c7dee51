import pytest
import torch

from synchromesh.adapt.kronecker import kronecker_product


@pytest.mark.parametrize(("groups", "out", "width", "height"), [(1, 1, 6, 2), (4, 2, 3, 5), (2, 4, 8, 1), (3, 3, 1, 7)])
def test_it_is_the_product_with_the_built_matrix(groups: int, out: int, width: int, height: int):
    x, kernel = torch.randn(2, 5, groups * width).double(), torch.randn(groups, out).double()
    template = torch.randn(width, height).double()
    wanted = x @ torch.kron(kernel, template)
    torch.testing.assert_close(kronecker_product(x, kernel, template), wanted, rtol=2e-14, atol=2e-14)
    assert (kronecker_product(x, kernel, template) - wanted).norm() <= 2e-15 * wanted.norm()


def test_each_row_group_has_its_own_template_and_all_gradients_are_those_of_the_built_matrix():
    inputs = [torch.randn(3, 4, 6), torch.randn(2, 5), torch.randn(3, 3, 2)]
    inputs = [one.double().requires_grad_() for one in inputs]
    got = kronecker_product(*inputs)
    x, kernel, template = inputs
    wanted = torch.stack([x[t] @ torch.kron(kernel, template[t]) for t in range(3)])
    torch.testing.assert_close(got, wanted)
    weight = torch.randn(got.shape).double()
    for one, other in zip(
        torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)
