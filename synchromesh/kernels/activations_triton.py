"""The activations of `activations.KNOWN`, and their derivatives, inside Triton kernels."""

# ruff: noqa: RET505
# Each `else` after a return is needed: without it Triton compiles the code that follows as well.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(h, ACTIVATION: tl.constexpr):
    """Return act(h), in float32."""
    if ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 is sigmoid(2 z), and 2 sqrt(2 / pi) is 1.5957...
        return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    else:
        tl.static_assert(ACTIVATION == "relu", "no such activation")
        return tl.where(h <= 0, 0.0, h)  # a NaN stays one


@triton.jit
def derivative(h, ACTIVATION: tl.constexpr):
    """Return act'(h), in float32."""
    if ACTIVATION == "gelu":
        # h * cdf(h) has the derivative cdf(h) + h * density(h), of the normal distribution.
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
        # By the chain rule; 0.134145 is 3 * 0.044715.
        return s + h * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "relu", "no such activation")
        return tl.where(h <= 0, 0.0, 1.0)
