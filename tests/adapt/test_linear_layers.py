import pytest
import torch
from torch import nn

from synchromesh.adapt.linear_layers import LinearLayer, is_linear


def test_both_kinds_of_linear_layers_have_one_shape_and_writes_reach_the_module():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    x = torch.randn(5, 3)
    for module in (conv1d(7, 3), nn.Linear(3, 7)):
        layer = LinearLayer(module)
        assert is_linear(module)
        assert (layer.in_features, layer.out_features) == (3, 7)
        torch.testing.assert_close(x @ layer.weight.T + layer.bias, module(x))
        with torch.no_grad():
            layer.weight.copy_(torch.ones(7, 3))
        assert (module.weight == 1).all()
    assert LinearLayer(nn.Linear(3, 7, bias=False)).bias is None


def test_other_modules_are_no_linear_layers():
    class Conv1D(nn.Conv1d):
        """Of the same name as transformers' one."""

    assert not any(map(is_linear, (nn.Conv1d(3, 7, 1), Conv1D(3, 7, 1), nn.Identity(), nn.Bilinear(2, 2, 2), None)))
