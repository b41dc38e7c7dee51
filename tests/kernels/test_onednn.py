import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import onednn
from synchromesh.kernels.onednn import leads, multiplies, product, product_of_rows
from synchromesh.testing.compare import assert_close

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("turned", [True, False])
def test_a_product_is_torchs_of_weights_laid_out_either_way(dtype, gelu, turned):
    x, bias = torch.randn(2, 7, 12).to(dtype), torch.randn(9).to(dtype)
    weight = torch.randn(12, 9).t().to(dtype) if turned else torch.randn(9, 12).to(dtype)
    wanted = F.linear(x, weight, bias)
    assert_close("y", product(x, weight, bias, gelu=gelu), F.gelu(wanted) if gelu else wanted)


@pytest.mark.parametrize("leader", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("left", "right"), [(5, 9), (9, 5)])
def test_the_gradient_of_a_weight_is_torchs_whichever_factor_is_wider(leader, dtype, left, right, monkeypatch):
    monkeypatch.setattr(onednn, "leads_in_float32", lambda: leader)
    a, b = torch.randn(30, left).to(dtype), torch.randn(30, right).to(dtype)
    assert_close("gradient", product_of_rows(a, b), a.t() @ b)


def test_other_tensors_are_left_to_torch():
    x = torch.randn(2, 3)
    assert multiplies(x, None, x)
    assert not multiplies(x.double())
    assert not multiplies(x, x.double())
    assert not multiplies(x, dtype=torch.float16)
    assert not multiplies(x, x[:0])
    assert not multiplies(x, torch.empty(2, 3, device="meta"))
    assert not multiplies(x.as_subclass(type("Other", (torch.Tensor,), {})))


@pytest.mark.parametrize(("model", "expected"), [("Intel(R) Xeon(R)", False), ("AMD EPYC, cpu family 26", True)])
def test_float32_goes_to_mkl_on_intels_processors_alone(model, expected, monkeypatch):
    monkeypatch.setattr(onednn, "cpu_model", lambda: model)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(onednn, "leads_in_float32", onednn.leads_in_float32.__wrapped__)
    x = torch.randn(2, 3)
    assert leads(x, None) is expected
    assert not leads(x.bfloat16())
