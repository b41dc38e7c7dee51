import pytest
import torch

from synchromesh.testing.compare import assert_close, check


def test_a_wrong_gradient_is_named():
    def doubled(x):
        return x * 2

    def doubled_with_wrong_gradient(x):
        return x * 2 + (x - x.detach())

    with pytest.raises(AssertionError, match="gradient of x"):
        check(doubled_with_wrong_gradient, doubled, {"x": torch.randn(5)})


def test_nan_against_a_number_is_an_error():
    with pytest.raises(AssertionError, match="inf"):
        assert_close("y", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0]))
