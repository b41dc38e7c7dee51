"""How kernels multiply float32, after every way in which torch can be told, one after the other, on a CPU."""

from types import SimpleNamespace

import pytest
import torch

from synchromesh.kernels.tiles import precision_of

pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API:UserWarning")  # torch, of the older settings
MATMUL = torch.backends.cuda.matmul
MODERN = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="this torch has the older settings only")
OLD = "torch.set_float32_matmul_precision"
NEW = "torch.backends.cuda.matmul.fp32_precision"
CUDNN = "torch.backends.cudnn.fp32_precision"  # in torch the name of all of CUDA
GENERIC = "torch.backends.fp32_precision"
ONEDNN = "torch.backends.mkldnn.matmul.fp32_precision"
FLAG = "torch.backends.cuda.matmul.allow_tf32"

OLD_ONLY = [
    ([], "ieee"),
    ([f"{OLD}('highest')"], "ieee"),
    ([f"{OLD}('high')"], "tf32"),
    ([f"{OLD}('medium')"], "tf32"),
    ([f"{OLD}('high')", f"{OLD}('highest')"], "ieee"),
    ([f"{FLAG} = True"], "tf32"),
    ([f"{FLAG} = True", f"{FLAG} = False"], "ieee"),
]
NEW_ONLY = [
    ([f"{NEW} = 'tf32'"], "tf32"),
    ([f"{NEW} = 'ieee'"], "ieee"),
    ([f"{NEW} = 'none'"], "ieee"),
    ([f"{NEW} = 'tf32'", f"{NEW} = 'none'"], "ieee"),
    ([f"{CUDNN} = 'tf32'"], "tf32"),
    ([f"{GENERIC} = 'tf32'"], "tf32"),
    ([f"{GENERIC} = 'ieee'"], "ieee"),
    ([f"{GENERIC} = 'none'"], "ieee"),
    ([f"{GENERIC} = 'bf16'"], "ieee"),  # which CUDA has not
    ([f"{GENERIC} = 'tf32'", f"{NEW} = 'ieee'"], "ieee"),  # the narrower setting counts, in either order
    ([f"{NEW} = 'ieee'", f"{GENERIC} = 'tf32'"], "ieee"),
    ([f"{GENERIC} = 'ieee'", f"{NEW} = 'tf32'"], "tf32"),
    ([f"{GENERIC} = 'tf32'", f"{NEW} = 'ieee'", f"{NEW} = 'none'"], "tf32"),
    ([f"{ONEDNN} = 'bf16'"], "ieee"),  # of CPUs
]
MIXED = [
    ([f"{NEW} = 'tf32'", f"{OLD}('highest')"], "ieee"),
    ([f"{NEW} = 'ieee'", f"{OLD}('high')"], "tf32"),
    ([f"{OLD}('high')", f"{NEW} = 'ieee'"], "ieee"),
    ([f"{OLD}('highest')", f"{NEW} = 'tf32'"], "tf32"),
    ([f"{OLD}('highest')", f"{GENERIC} = 'tf32'"], "ieee"),  # the older ways set the narrow one
    ([f"{OLD}('high')", f"{GENERIC} = 'ieee'"], "tf32"),
    ([f"{GENERIC} = 'tf32'", f"{OLD}('highest')"], "ieee"),
    ([f"{GENERIC} = 'ieee'", f"{FLAG} = True"], "tf32"),
    ([f"{FLAG} = True", f"{NEW} = 'ieee'"], "ieee"),
    ([f"{FLAG} = False", f"{NEW} = 'tf32'"], "tf32"),
]


@pytest.fixture(autouse=True)
def _undone():
    """Set everything back; the older setting first, because it writes the newer ones."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        for name in (NEW, ONEDNN, CUDNN, GENERIC):
            exec(f"{name} = 'none'")
        assert (torch.get_float32_matmul_precision(), MATMUL.allow_tf32) == ("highest", False)


@pytest.mark.parametrize(("told", "wanted"), OLD_ONLY, ids=str)
def test_the_older_settings_are_followed(told, wanted):
    exec("\n".join(told))
    assert precision_of(torch.float32) == wanted


@MODERN
@pytest.mark.parametrize(("told", "wanted"), NEW_ONLY + MIXED, ids=str)
def test_the_newer_settings_and_mixtures_are_followed_as_cublas_follows_them(told, wanted):
    for line in told:
        exec(line)
        assert precision_of(torch.float32) in ("ieee", "tf32")  # also on the way
    assert precision_of(torch.float32) == wanted
    assert wanted == ("tf32" if MATMUL.fp32_precision == "tf32" else "ieee")


@MODERN
def test_the_older_question_raises_where_ours_does_not():
    exec(f"{NEW} = 'tf32'")
    with pytest.raises(RuntimeError, match="matmul precision"):
        torch.get_float32_matmul_precision()
    assert precision_of(torch.float32) == "tf32"


@pytest.mark.parametrize(("told", "wanted"), OLD_ONLY, ids=str)
def test_a_torch_without_the_newer_settings_is_asked_the_older_way(monkeypatch, told, wanted):
    exec("\n".join(told))
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace())
    assert precision_of(torch.float32) == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("told", [OLD_ONLY[2][0], pytest.param(NEW_ONLY[0][0], marks=MODERN)], ids=str)
def test_other_dtypes_are_never_rounded(told, dtype):
    exec("\n".join(told))
    assert precision_of(dtype) == "ieee"
