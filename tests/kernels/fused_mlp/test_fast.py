import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.testing.cases import NETWORKS, Case, evil_cases, network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close, check

CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
KINDS = pytest.mark.parametrize("kind", NETWORKS)
ACTIVATIONS = [F.gelu, functools.partial(F.gelu, approximate="tanh"), F.silu, F.relu, torch.sin]
WIDTH, HIDDEN = 10, 37


def parts_of(kind, num_experts, dtype, *, width=WIDTH, hidden=HIDDEN):
    return network_parts(kind, num_experts, dtype, width=width, hidden=hidden)


def run(kernels, rowmap, activation, kind="plain"):
    def run(x, weights, **parts):
        mlp = MLPWeights(**parts, joint="joint" in kind)
        return kernels.fused_mlp(x, weights, rowmap, mlp, activation)

    return run


def check_both(fast, rowmap, activation, kind, inputs):
    check(run(fast, rowmap, activation, kind), run(REFERENCE, rowmap, activation, kind), inputs)


@CASES
@pytest.mark.parametrize("kind", ["biased", "gated_biased", "joint"])
def test_output_and_every_gradient(fast, case: Case, kind, exact):
    inputs = {"x": case.tokens(WIDTH, exact), "weights": case.weights(exact)}
    inputs |= parts_of(kind, case.num_experts, exact)
    check_both(fast, case.rowmap(), F.gelu if kind in ("plain", "biased") else F.silu, kind, inputs)


def test_output_and_every_gradient_of_every_dtype(fast, case: Case, every_dtype):
    inputs = {"x": case.tokens(WIDTH, every_dtype), "weights": case.weights(every_dtype)}
    inputs |= parts_of("gated_biased", case.num_experts, every_dtype)
    check_both(fast, case.rowmap(), F.silu, "gated_biased", inputs)


@KINDS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["gelu", "gelu_tanh", "silu", "relu", "unknown"])
def test_every_activation(fast, kind, activation):
    rowmap = row_map_of(zipf(60, 5, 2), 5)
    inputs = {"x": torch.randn(60, WIDTH), "weights": torch.rand(60, 2), **parts_of(kind, 5, torch.float32)}
    check_both(fast, rowmap, activation, kind, inputs)
    assert fast.fuses(activation) == (activation is not torch.sin)


@KINDS
def test_gate_and_up_in_one_tensor_are_those_of_two(fast, kind):
    rowmap, parts = row_map_of(zipf(30, 4, 2), 4), parts_of(kind, 4, torch.float32)
    mlp = MLPWeights(**parts, joint="joint" in kind)
    x, weights = torch.randn(30, WIDTH), torch.rand(30, 2)
    one, two = (fast.fused_mlp(x, weights, rowmap, each, F.silu) for each in (mlp, mlp.apart()))
    assert_close("y", one, two)


@pytest.mark.parametrize("activation", ACTIVATIONS[:4], ids=["gelu", "gelu_tanh", "silu", "relu"])
def test_a_nan_reaches_what_it_reaches_in_torch(fast, activation):
    case = next(case for case in evil_cases() if case.name == "nan_token")
    parts = parts_of("biased", case.num_experts, torch.float32)
    inputs = {"x": case.tokens(WIDTH, torch.float32), "weights": case.weights(), **parts}
    check_both(fast, case.rowmap(), activation, "biased", inputs)


@KINDS
def test_blocks_that_are_whole(fast, kind):
    inputs = {"x": torch.randn(70, 32), "weights": torch.rand(70, 2)}
    inputs |= parts_of(kind, 3, torch.float32, width=32, hidden=64)
    check_both(fast, row_map_of(zipf(70, 3, 2), 3), F.silu, kind, inputs)


@pytest.mark.parametrize("kind", ["biased", "joint"])
def test_without_gradients_the_result_is_the_same(fast, case: Case, kind, exact):
    rowmap, parts = case.rowmap(), parts_of(kind, case.num_experts, exact)
    x, weights = case.tokens(WIDTH, exact), case.weights(exact)
    learning = run(fast, rowmap, F.gelu, kind)(x.clone().requires_grad_(), weights, **parts)
    assert_close("y", run(fast, rowmap, F.gelu, kind)(x, weights, **parts), learning)


@KINDS
def test_only_the_gradients_that_are_wanted(fast, kind, exact):
    rowmap = row_map_of(torch.tensor([[0, 2], [2, -1], [0, 1]]), 4)
    inputs = {"x": torch.randn(3, WIDTH).to(exact), "weights": torch.rand(3, 2).to(exact), **parts_of(kind, 4, exact)}
    for wanted in inputs:
        grads = []
        for kernels in (fast, REFERENCE):
            own = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in inputs.items()}
            run(kernels, rowmap, F.silu, kind)(**own).sum().backward()  # an expanded gradient
            grads.append(own)
        for name in inputs:
            assert_close(f"gradient of {name}", grads[0][name].grad, grads[1][name].grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_over_experts_of_less_precision(fast, dtype):
    rowmap = row_map_of(zipf(60, 5, 2), 5)
    parts, x, weights = parts_of("biased", 5, dtype), torch.randn(60, WIDTH).to(dtype), torch.rand(60, 2)
    for kernels in (fast, REFERENCE):
        own = weights.clone().requires_grad_()
        y = run(kernels, rowmap, F.gelu)(x, own, **parts)
        y.sum().backward()
        assert (y.dtype, own.grad.dtype) == (dtype, torch.float32)
    inputs = {"x": x, "weights": weights.to(dtype), **parts}

    def widened(kernels):
        return lambda x, weights, **parts: run(kernels, rowmap, F.gelu)(x, weights.float(), **parts)

    check(widened(fast), widened(REFERENCE), inputs)


def test_tensors_that_are_not_contiguous_or_repeat_themselves(fast, exact):
    rowmap = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    parts, weights = parts_of("biased", 2, exact), torch.rand(2, 3).to(exact).T
    turned = replace(MLPWeights(**parts), up=parts["up"].transpose(1, 2).contiguous().transpose(1, 2))
    for x in (torch.randn(WIDTH, 3).to(exact).T, torch.randn(WIDTH).to(exact).expand(3, WIDTH)):
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, turned, F.gelu)
        assert_close("y", fast.fused_mlp(x, weights, rowmap, turned, F.gelu), wanted)


def test_gradients_lie_as_their_parameters_do(fast):
    rowmap = row_map_of(zipf(40, 4, 2), 4)
    opening, closing = torch.randn(4, 2 * HIDDEN, WIDTH), torch.randn(4, WIDTH, HIDDEN)  # as other libraries keep them
    leaves = [opening.requires_grad_(), closing.requires_grad_()]
    mlp = MLPWeights(opening, closing.mT, joint=True)
    fast.fused_mlp(torch.randn(40, WIDTH), torch.rand(40, 2), rowmap, mlp, F.silu).sum().backward()
    assert all(leaf.grad.is_contiguous() for leaf in leaves)


def test_an_expert_without_rows_gets_zero_gradients(fast):
    parts = {name: part.requires_grad_() for name, part in parts_of("gated_biased", 3, torch.float32).items()}
    rowmap = row_map_of(torch.tensor([[0], [2]]), 3)
    run(fast, rowmap, F.silu)(torch.randn(2, WIDTH), torch.rand(2, 1), **parts).sum().backward()
    for name, part in parts.items():
        assert part.grad[1].eq(0).all(), name


@pytest.mark.parametrize("kind", ["plain", "gated", "joint"])
def test_saved_for_backward_are_x_and_the_pre_activations(fast, kind):
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
        run(fast, rowmap, F.silu, kind)(x, weights, **parts)
    inputs = sum(part.numel() for part in parts.values()) + weights.numel()
    assert sum(saved.values()) - inputs == x.numel() + len(rowmap.pairs) * HIDDEN * (1 if kind == "plain" else 2)


def test_twice_the_same_bits(fast):
    rowmap, parts = row_map_of(zipf(60, 5, 2), 5), parts_of("gated_biased", 5, torch.float32)
    x, weights, runs = torch.randn(60, WIDTH), torch.rand(60, 2), []
    for _ in range(2):
        own = {name: t.clone().requires_grad_() for name, t in {"x": x, "weights": weights, **parts}.items()}
        y = run(fast, rowmap, F.silu)(**own)
        y.square().sum().backward()
        runs.append([y, *(t.grad for t in own.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_two_dtypes_are_refused(fast):
    rowmap = row_map_of(torch.tensor([[0]]), 1)
    mlp = MLPWeights(**parts_of("plain", 1, torch.float32))
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        fast.fused_mlp(torch.randn(1, WIDTH).bfloat16(), torch.ones(1, 1), rowmap, mlp, F.gelu)


@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(0, 40),
    choices=st.integers(1, 3),
    experts=st.integers(1, 6),
    capacity=st.none() | st.integers(0, 8),
    width=st.integers(1, 35),
    hidden=st.integers(1, 35),
    kind=st.sampled_from(NETWORKS),
)
def test_any_shape(fast, exact, tokens, choices, experts, capacity, width, hidden, kind):
    rowmap = row_map_of(torch.randint(-1, experts, (tokens, choices)), experts, capacity=capacity)
    inputs = {"x": torch.randn(tokens, width).to(exact), "weights": torch.rand(tokens, choices).to(exact)}
    check_both(fast, rowmap, F.silu, kind, inputs | parts_of(kind, experts, exact, width=width, hidden=hidden))
