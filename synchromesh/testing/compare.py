"""Comparison of results and of every gradient, with one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Relative root-mean-square error that two right computations of one number may differ by.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted|, both as root mean squares in float64; infinite where NaN or inf disagree.

    >>> relative_rms(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.0
    """
    got64, wanted64 = got.detach().to(torch.float64), wanted.detach().to(torch.float64)
    finite = wanted64.isfinite()
    if not torch.equal(finite, got64.isfinite()):
        return float("inf")
    error = (got64 - wanted64)[finite].norm()
    scale = wanted64[finite].norm()
    return float(error / scale) if scale > 0 else float(error)


def assert_close(name: str, got: Tensor | None, wanted: Tensor | None) -> None:
    """Fail unless shapes and dtypes agree and the error is within the table. None (no gradient) equals None only."""
    if got is None or wanted is None:
        assert got is wanted, f"{name}: got {_about(got)}, wanted {_about(wanted)}"
        return
    assert got.shape == wanted.shape, f"{name}: got shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    if not wanted.is_floating_point():
        assert torch.equal(got, wanted), f"{name}: integers differ"
        return
    dtype = max((got.dtype, wanted.dtype), key=lambda d: TOLERANCE[d])
    error = relative_rms(got, wanted)
    assert error <= TOLERANCE[dtype], f"{name}: relative RMS error {error:.3g} over {TOLERANCE[dtype]:.3g} ({dtype})"


def check(
    got: Callable[..., Tensor], wanted: Callable[..., Tensor], inputs: Mapping[str, Tensor], *, seed: int = 0
) -> None:
    """Fail unless two functions of the same named tensors agree in their output and in every gradient.

    Each function gets its own copy of the inputs; one random gradient of the output flows back to the floating ones.
    """
    results = []
    for function in (wanted, got):
        own = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
        y = function(**own)
        generator = torch.Generator().manual_seed(seed)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        y.backward(dy)
        results.append((y, {k: v.grad for k, v in own.items() if v.is_floating_point()}))
    (wanted_y, wanted_grads), (got_y, got_grads) = results
    assert_close("output", got_y, wanted_y)
    for name, grad in wanted_grads.items():
        assert_close(f"gradient of {name}", got_grads[name], grad)


def _about(tensor: Tensor | None) -> str:
    return "no tensor" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
