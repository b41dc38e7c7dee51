from unittest.mock import patch

import pytest
import torch

from synchromesh.kernels import REFERENCE, Float8Products, MXFloat8Products
from synchromesh.kernels.gpu import TRITON
from synchromesh.kernels.scaled_mm import triton as scaled
from synchromesh.kernels.scaled_mm.reference import rounded
from synchromesh.testing.compare import check

KINDS = pytest.mark.parametrize("products", [Float8Products(), MXFloat8Products()], ids=["float8", "mxfloat8"])
NOT_ITS_OWN = patch.object(scaled, "multiplies", lambda products, device: False)  # a device that widens


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_devices_without_8_bit_products_widen_the_same_numbers(dtype, products):
    ends = torch.tensor([3, 3, 38], dtype=torch.int32)
    rows = torch.randn(38, 70) * 10.0 ** torch.randint(-5, 2, (38, 70))
    inputs = {"rows": rows.to(dtype), "weight": (torch.randn(3, 70, 40) / 70**0.5).to(dtype)}

    def multiplied(kernels):
        return lambda rows, weight: kernels.scaled_mm(rows, weight, ends, products=products)

    with NOT_ITS_OWN:
        check(multiplied(TRITON), multiplied(REFERENCE), inputs)
        rows = inputs["rows"].clone()
        rows[2, 5] = float("inf")
        wanted, got = multiplied(TRITON)(**inputs), multiplied(TRITON)(rows, inputs["weight"])
    assert got[2].isnan().all()
    others = torch.arange(38) != 2
    assert torch.equal(got[others], wanted[others])


@KINDS
def test_the_numbers_are_the_references_bit_by_bit(products):
    x = torch.randn(3, 40, 100) * 10.0 ** (torch.randint(-25, 25, (3, 40, 1)) + torch.randint(-5, 5, (3, 40, 100)))
    x[0, 1], x[1, 2, 3], x[2, 3, 50] = 0, float("nan"), float("inf")
    x[0, 4] = torch.linspace(-448, 448, 100)
    x[0, 5] = torch.arange(100) * 2.0**-10  # every step of the smallest numbers, and ties between them
    x[0, 5, -1] = 400
    wanted = rounded(x, 2, products)
    wide, _ = scaled.narrowed(x, products, wide=True)
    assert torch.equal(wide[..., :100].float().nan_to_num(7), wanted.nan_to_num(7))
    numbers, scales = scaled.narrowed(x, products, wide=False)
    size = numbers.shape[-1] // scales.shape[-1]
    meant = numbers.float() * scales.view(torch.float8_e8m0fnu).float().repeat_interleave(size, 2)
    assert torch.equal(meant[..., :100].nan_to_num(7), wanted.nan_to_num(7))
    assert not meant[..., 100:].nan_to_num(0).any()


CUDA = {(8, 0): "", (8, 9): "f", (9, 0): "f", (10, 0): "fm", (12, 0): "fm"}  # capability: kinds with units
GPUS = [*((capability, None, wanted) for capability, wanted in CUDA.items()), ((9, 4), "6.4", "")]


@pytest.mark.parametrize(("capability", "hip", "wanted"), GPUS, ids=str)
def test_numbers_that_a_gpu_has_no_units_for_are_widened(capability, hip, wanted):
    with (
        patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        patch.object(torch.version, "hip", hip),
    ):
        kinds = {"f": Float8Products(), "m": MXFloat8Products()}
        assert {name for name, kind in kinds.items() if scaled.multiplies(kind, torch.device("cuda"))} == set(wanted)
