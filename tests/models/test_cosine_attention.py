"""The hand-written attention against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synchromesh.models import cosine_attention as module
from synchromesh.models.cosine_attention import cosine_attention
from synchromesh.testing.compare import assert_close, check, relative_rms

CASES = {  # windows, positions, heads, width of a head, biases
    "one bias": (4, 9, 2, 8, 1),
    "a bias for each window of a map": (6, 16, 3, 4, 3),
    "wide heads": (4, 4, 2, 32, 2),
    "one position": (3, 1, 2, 4, 1),
}


def definition(qkv: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(2, (3, len(scale), -1)).permute(2, 0, 3, 1, 4)
    cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    scores = cosine * scale[:, None, None] + bias.repeat(len(qkv) // len(bias), 1, 1, 1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def inputs(W: int, N: int, h: int, d: int, G: int, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {"qkv": torch.randn(W, N, 3 * h * d), "scale": torch.rand(h) * 9 + 1, "bias": torch.randn(G, h, N, N)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_equal_the_definition(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(cosine_attention, definition, inputs(*case, dtype))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bf16_is_as_near_to_float64_as_the_definition_is(case: tuple[int, ...]) -> None:
    given = inputs(*case, torch.bfloat16)
    results = []
    for function, dtype in (
        (definition, torch.float64),
        (definition, torch.bfloat16),
        (cosine_attention, torch.bfloat16),
    ):
        own = {name: tensor.to(dtype).requires_grad_() for name, tensor in given.items()}
        y = function(**own)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(dtype))
        results.append([y, own["qkv"].grad])
    for truth, plain, got in zip(*results, strict=True):
        assert relative_rms(got, truth) < max(0.02, 1.5 * relative_rms(plain, truth))


@pytest.mark.parametrize("scores", [1, 200, 500, 1000])
@pytest.mark.parametrize("maps", [1, 3])
def test_blocks_of_any_size_give_the_same(scores: int, maps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", scores)  # a window has 162, a map of three 486
    check(cosine_attention, definition, inputs(9, 9, 2, 8, maps, torch.float64))


def test_no_window_gives_no_output() -> None:
    assert cosine_attention(**inputs(0, 9, 2, 8, 1, torch.float32)).shape == (0, 9, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_gradients_the_numbers_are_the_same(case: tuple[int, ...], dtype: torch.dtype) -> None:
    given = inputs(*case, dtype)
    with torch.inference_mode():
        got = cosine_attention(**given)
    assert torch.equal(got, cosine_attention(**given))


def test_vectors_of_zeros_give_a_finite_answer() -> None:
    given = inputs(4, 9, 2, 8, 1, torch.float64)
    given["qkv"][0, 0] = 0
    own = {name: tensor.requires_grad_() for name, tensor in given.items()}
    cosine_attention(**own).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in own.values())


def test_a_broken_window_stays_alone() -> None:
    given = inputs(4, 9, 2, 8, 1, torch.float32)
    clean = cosine_attention(**given)
    given["qkv"][1, 3] = torch.nan
    got = cosine_attention(**given)
    assert got[1].isnan().all()
    assert_close("other windows", got[[0, 2, 3]], clean[[0, 2, 3]])


def test_a_second_derivative_is_refused() -> None:
    own = {name: tensor.requires_grad_() for name, tensor in inputs(4, 4, 2, 4, 1, torch.float64).items()}
    (first,) = torch.autograd.grad(cosine_attention(**own).square().sum(), own["qkv"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
