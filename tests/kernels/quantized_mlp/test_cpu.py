import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, REFERENCE, MLPWeights, quantize
from synchromesh.testing.cases import network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close


def test_autocast_chooses_the_dtype():
    mlp = quantize(MLPWeights(**network_parts("plain", 4, torch.float32, width=10, hidden=17)), torch.int8)
    rowmap, x, weights = row_map_of(zipf(40, 4, 2), 4), torch.randn(40, 10), torch.rand(40, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = CPU.fused_mlp(x, weights, rowmap, mlp, F.gelu)
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, mlp, F.gelu)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert_close("y", got, wanted)
