import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.fused_mlp.few import is_few
from synchromesh.kernels.gpu import TRITON
from synchromesh.testing.cases import Case, evil_cases, row_map_of, zipf
from synchromesh.testing.compare import assert_close, check

SHORT = [case for case in evil_cases() if case.name != "longer_than_a_block"]
CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
KINDS = pytest.mark.parametrize("kind", ["plain", "biased", "gated", "gated_biased"])
ACTIVATIONS = [F.gelu, functools.partial(F.gelu, approximate="tanh"), F.silu, F.relu, torch.sin]
WIDTH, HIDDEN = 10, 37


def parts_of(kind, num_experts, dtype, *, width=WIDTH, hidden=HIDDEN):
    shapes = {"up": (hidden, width), "down": (hidden, width)}
    if "gated" in kind:
        shapes["gate"] = (hidden, width)
    if "biased" in kind:
        shapes |= {"up_bias": (hidden,), "down_bias": (width,)}
        if "gated" in kind:
            shapes["gate_bias"] = (hidden,)
    return {name: (torch.randn(num_experts, *shape) / width**0.5).to(dtype) for name, shape in shapes.items()}


def run(kernels, rowmap, activation):
    return lambda x, weights, **parts: kernels.fused_mlp(x, weights, rowmap, MLPWeights(**parts), activation)


@CASES
@pytest.mark.parametrize("kind", ["biased", "gated_biased"])
def test_output_and_every_gradient(case: Case, kind):
    compare(case, kind, torch.float32)


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_output_and_every_gradient_in_16_bits(case: Case, dtype):
    compare(case, "gated_biased", dtype)


def compare(case, kind, dtype):
    rowmap = case.rowmap()
    inputs = {"x": case.tokens(WIDTH, dtype), "weights": case.weights(dtype), **parts_of(kind, case.num_experts, dtype)}
    activation = F.silu if "gated" in kind else F.gelu
    check(run(TRITON, rowmap, activation), run(REFERENCE, rowmap, activation), inputs)


@KINDS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["gelu", "gelu_tanh", "silu", "relu", "unknown"])
def test_every_activation(kind, activation):
    rowmap = row_map_of(zipf(60, 5, 2), 5)
    inputs = {"x": torch.randn(60, WIDTH), "weights": torch.rand(60, 2), **parts_of(kind, 5, torch.float32)}
    check(run(TRITON, rowmap, activation), run(REFERENCE, rowmap, activation), inputs)
    assert TRITON.fuses(activation) == (activation is not torch.sin)


@pytest.mark.parametrize("activation", ACTIVATIONS[:4], ids=["gelu", "gelu_tanh", "silu", "relu"])
def test_a_nan_reaches_what_it_reaches_in_torch(activation):
    case = next(case for case in evil_cases() if case.name == "nan_token")
    parts = parts_of("biased", case.num_experts, torch.float32)
    inputs = {"x": case.tokens(WIDTH, torch.float32), "weights": case.weights(), **parts}
    check(run(TRITON, case.rowmap(), activation), run(REFERENCE, case.rowmap(), activation), inputs)


@KINDS
def test_blocks_that_are_whole(kind):
    rowmap = row_map_of(zipf(70, 3, 2), 3)
    parts = parts_of(kind, 3, torch.float32, width=32, hidden=64)
    inputs = {"x": torch.randn(70, 32), "weights": torch.rand(70, 2), **parts}
    check(run(TRITON, rowmap, F.silu), run(REFERENCE, rowmap, F.silu), inputs)


@KINDS
def test_without_gradients_the_result_is_the_same(kind):
    rowmap, parts = row_map_of(zipf(40, 4, 2), 4), parts_of(kind, 4, torch.float32)
    x, weights = torch.randn(40, WIDTH), torch.rand(40, 2)
    learning = run(TRITON, rowmap, F.gelu)(x.clone().requires_grad_(), weights, **parts)
    assert torch.equal(run(TRITON, rowmap, F.gelu)(x, weights, **parts), learning)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_without_gradients(kind, dtype):
    ids = torch.tensor([[0, 7], [7, -1], [-1, -1], [3, 0], [5, 7]])
    for rowmap in (row_map_of(ids, 9), row_map_of(ids, 9, capacity=1), row_map_of(ids[:0], 9)):
        tokens = len(rowmap.rows)
        x, weights, parts = (
            torch.randn(tokens, 150).to(dtype),
            torch.rand(tokens, 2),
            parts_of(kind, 9, dtype, width=150),
        )
        assert is_few(len(rowmap.pairs), 9)
        wanted = run(REFERENCE, rowmap, F.silu)(x, weights, **parts)
        assert_close("y", run(TRITON, rowmap, F.silu)(x, weights, **parts), wanted)


def test_many_rows_of_few_experts_take_tiles():
    assert not is_few(513, 1000)
    assert not is_few(65, 16)
    assert is_few(64, 16)


@KINDS
def test_only_the_gradients_that_are_wanted(kind):
    rowmap = row_map_of(torch.tensor([[0, 2], [2, -1], [0, 1]]), 4)
    inputs = {"x": torch.randn(3, WIDTH), "weights": torch.rand(3, 2), **parts_of(kind, 4, torch.float32)}
    for wanted in inputs:
        grads = []
        for kernels in (TRITON, REFERENCE):
            own = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in inputs.items()}
            run(kernels, rowmap, F.silu)(**own).sum().backward()  # an expanded gradient
            grads.append(own)
        for name in inputs:
            assert_close(f"gradient of {name}", grads[0][name].grad, grads[1][name].grad)


def test_float32_weights_over_experts_of_less_precision():
    rowmap = row_map_of(zipf(60, 5, 2), 5)
    parts, x, weights = parts_of("biased", 5, torch.bfloat16), torch.randn(60, WIDTH).bfloat16(), torch.rand(60, 2)
    own = weights.clone().requires_grad_()
    y = run(TRITON, rowmap, F.gelu)(x, own, **parts)
    y.sum().backward()
    assert (y.dtype, own.grad.dtype) == (torch.bfloat16, torch.float32)


def test_non_contiguous_and_zero_stride_inputs():
    rowmap = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    parts, weights = parts_of("biased", 2, torch.float32), torch.rand(2, 3).T
    turned = replace(MLPWeights(**parts), up=parts["up"].transpose(1, 2).contiguous().transpose(1, 2))
    for x in (torch.randn(WIDTH, 3).T, torch.randn(WIDTH).expand(3, WIDTH)):
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, turned, F.gelu)
        assert_close("y", TRITON.fused_mlp(x, weights, rowmap, turned, F.gelu), wanted)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_saved_for_backward_are_x_and_the_pre_activations(kind):
    """T D + R F numbers, or 2 R F where gated."""
    rowmap = row_map_of(zipf(64, 4, 2), 4)
    parts = {name: part.requires_grad_() for name, part in parts_of(kind, 4, torch.float32).items()}
    x, weights = torch.randn(64, WIDTH, requires_grad=True), torch.rand(64, 2)
    saved = {}

    def count(tensor):
        if tensor.is_floating_point() and tensor.numel():
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run(TRITON, rowmap, F.silu)(x, weights, **parts)
    inputs = sum(part.numel() for part in parts.values()) + weights.numel()
    assert sum(saved.values()) - inputs == x.numel() + len(rowmap.pairs) * HIDDEN * (2 if kind == "gated" else 1)


def test_twice_the_same_bits():
    rowmap, parts = row_map_of(zipf(60, 5, 2), 5), parts_of("gated_biased", 5, torch.float32)
    x, weights, runs = torch.randn(60, WIDTH), torch.rand(60, 2), []
    for _ in range(2):
        own = {name: t.clone().requires_grad_() for name, t in {"x": x, "weights": weights, **parts}.items()}
        y = run(TRITON, rowmap, F.silu)(**own)
        y.square().sum().backward()
        runs.append([y, *(t.grad for t in own.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@settings(deadline=None, max_examples=10)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    choices=st.integers(1, 3),
    capacity=st.none() | st.integers(0, 6),
    width=st.integers(1, 35),
    hidden=st.integers(1, 35),
)
def test_any_shape(tokens, experts, choices, capacity, width, hidden):
    rowmap = row_map_of(torch.randint(-1, experts, (tokens, choices)), experts, capacity=capacity)
    parts = parts_of("gated_biased", experts, torch.float32, width=width, hidden=hidden)
    inputs = {"x": torch.randn(tokens, width), "weights": torch.rand(tokens, choices), **parts}
    check(run(TRITON, rowmap, F.silu), run(REFERENCE, rowmap, F.silu), inputs)


JOINT = pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])


def joint(kernels, rowmap, activation):
    """The same networks from gate and up in one tensor and down turned, as other libraries keep them."""

    def run(x, weights, opening, closing, opening_bias=None, down_bias=None):
        mlp = MLPWeights(opening, closing.mT, up_bias=opening_bias, down_bias=down_bias)
        return kernels.fused_mlp(x, weights, rowmap, mlp, activation)

    return run


def taken_apart(rowmap, activation):
    """The reference of them, from its own views."""

    def run(x, weights, opening, closing, opening_bias=None, down_bias=None):
        gate, up = opening.chunk(2, 1)
        biases = (
            {} if opening_bias is None else dict(zip(("gate_bias", "up_bias"), opening_bias.chunk(2, 1), strict=True))
        )
        mlp = MLPWeights(up, closing.mT, gate, down_bias=down_bias, **biases)
        return REFERENCE.fused_mlp(x, weights, rowmap, mlp, activation)

    return run


def joint_parts(bias, num_experts, dtype):
    shapes = {"opening": (2 * HIDDEN, WIDTH), "closing": (WIDTH, HIDDEN)}
    shapes |= {"opening_bias": (2 * HIDDEN,), "down_bias": (WIDTH,)} if bias else {}
    return {name: (torch.randn(num_experts, *shape) / WIDTH**0.5).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "case", [case for case in evil_cases() if len(case.expert_ids) < 99], ids=lambda case: case.name
)
@JOINT
def test_gate_and_up_in_one_tensor(case: Case, bias):
    rowmap, parts = case.rowmap(), joint_parts(bias, case.num_experts, torch.float32)
    inputs = {"x": case.tokens(WIDTH, torch.float32), "weights": case.weights(torch.float32), **parts}
    check(joint(TRITON, rowmap, F.silu), taken_apart(rowmap, F.silu), inputs)
    check(joint(TRITON, rowmap, torch.sin), taken_apart(rowmap, torch.sin), inputs)
    with torch.no_grad():
        assert_close("y", joint(TRITON, rowmap, F.silu)(**inputs), taken_apart(rowmap, F.silu)(**inputs))


def test_gradients_lie_as_their_parameters_do():
    rowmap, parts = row_map_of(zipf(40, 4, 2), 4), joint_parts(False, 4, torch.float32)
    leaves = {name: part.requires_grad_() for name, part in parts.items()}
    joint(TRITON, rowmap, F.silu)(torch.randn(40, WIDTH), torch.rand(40, 2), **leaves).sum().backward()
    assert all(leaf.grad.is_contiguous() for leaf in leaves.values())
