import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from synchromesh.kernels import CPU, REFERENCE, MLPWeights
from synchromesh.testing.cases import Case, evil_cases, row_map_of, zipf
from synchromesh.testing.compare import TOLERANCE, assert_close, check

DTYPES = list(TOLERANCE)
CASES = pytest.mark.parametrize("case", evil_cases(), ids=lambda case: case.name)
KINDS = pytest.mark.parametrize("kind", ["plain", "biased", "gated", "gated_biased"])
ACTIVATIONS = [F.gelu, functools.partial(F.gelu, approximate="tanh"), F.silu, F.relu, torch.sin]
WIDTH, HIDDEN = 10, 17


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
@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_every_gradient(case: Case, kind, dtype):
    rowmap = case.rowmap()
    x, weights = case.tokens(WIDTH, dtype), case.weights(dtype)
    inputs = {"x": x, "weights": weights, **parts_of(kind, case.num_experts, dtype)}
    activation = F.silu if "gated" in kind else F.gelu
    check(run(CPU, rowmap, activation), run(REFERENCE, rowmap, activation), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_over_experts_of_less_precision(dtype):
    rowmap = row_map_of(zipf(60, 5, 2), 5)
    parts, x, weights = parts_of("biased", 5, dtype), torch.randn(60, WIDTH).to(dtype), torch.rand(60, 2)
    for kernels in (CPU, REFERENCE):
        own = weights.clone().requires_grad_()
        y = run(kernels, rowmap, F.gelu)(x, own, **parts)
        y.sum().backward()
        assert (y.dtype, own.grad.dtype) == (dtype, torch.float32)
    inputs = {"x": x, "weights": weights.to(dtype), **parts}

    def widened(kernels):
        return lambda x, weights, **parts: run(kernels, rowmap, F.gelu)(x, weights.float(), **parts)

    check(widened(CPU), widened(REFERENCE), inputs)


@KINDS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["gelu", "gelu_tanh", "silu", "relu", "unknown"])
def test_every_activation(kind, activation):
    ids = zipf(60, 5, 2)
    inputs = {"x": torch.randn(60, WIDTH), "weights": torch.rand(60, 2), **parts_of(kind, 5, torch.float32)}
    rowmap = row_map_of(ids, 5)
    check(run(CPU, rowmap, activation), run(REFERENCE, rowmap, activation), inputs)
    assert CPU.fuses(activation) == (activation is not torch.sin)


@CASES
@KINDS
def test_without_gradients_the_result_is_the_same(case: Case, kind):
    rowmap, parts = case.rowmap(), parts_of(kind, case.num_experts, torch.float64)
    x, weights = case.tokens(WIDTH, torch.float64), case.weights(torch.float64)
    learning = run(CPU, rowmap, F.gelu)(x.clone().requires_grad_(), weights, **parts)
    assert_close("y", run(CPU, rowmap, F.gelu)(x, weights, **parts), learning)


@KINDS
def test_gradcheck(kind):
    rowmap = row_map_of(torch.tensor([[0, 2], [2, -1], [0, 3]]), 4, capacity=2)
    parts = parts_of(kind, 4, torch.float64, width=3, hidden=2)
    inputs = [torch.randn(3, 3, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64), *parts.values()]
    assert torch.autograd.gradcheck(
        lambda x, weights, *values: run(CPU, rowmap, F.gelu)(x, weights, **dict(zip(parts, values, strict=True))),
        [tensor.requires_grad_() for tensor in inputs],
    )


@KINDS
def test_only_the_gradients_that_are_wanted(kind):
    rowmap = row_map_of(torch.tensor([[0, 2], [2, -1], [0, 1]]), 4)
    parts = parts_of(kind, 4, torch.float64)
    inputs = {"x": torch.randn(3, WIDTH).double(), "weights": torch.rand(3, 2).double(), **parts}
    for wanted in inputs:
        grads = []
        for kernels in (CPU, REFERENCE):
            own = {name: tensor.clone().requires_grad_(name == wanted) for name, tensor in inputs.items()}
            run(kernels, rowmap, F.silu)(**own).sum().backward()  # an expanded gradient
            grads.append(own)
        for name in inputs:
            assert_close(f"gradient of {name}", grads[0][name].grad, grads[1][name].grad)


def test_an_expert_without_rows_gets_zero_gradients():
    parts = {name: part.requires_grad_() for name, part in parts_of("gated_biased", 3, torch.float32).items()}
    rowmap = row_map_of(torch.tensor([[0], [2]]), 3)
    run(CPU, rowmap, F.silu)(torch.randn(2, WIDTH), torch.rand(2, 1), **parts).sum().backward()
    for name, part in parts.items():
        assert part.grad[1].eq(0).all(), name


def test_non_contiguous_and_zero_stride_inputs():
    rowmap = row_map_of(torch.tensor([[0, 1], [1, 0], [0, 1]]), 2)
    parts, weights = parts_of("biased", 2, torch.float64), torch.rand(2, 3).double().T
    turned = replace(MLPWeights(**parts), up=parts["up"].transpose(1, 2).contiguous().transpose(1, 2))
    for x in (torch.randn(WIDTH, 3).double().T, torch.randn(WIDTH).double().expand(3, WIDTH)):
        wanted = REFERENCE.fused_mlp(x, weights, rowmap, turned, F.gelu)
        assert_close("y", CPU.fused_mlp(x, weights, rowmap, turned, F.gelu), wanted)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_only_pre_activations_are_saved_besides_the_inputs(kind):
    num_tokens, choices, num_experts = 64, 2, 4
    rowmap = row_map_of(zipf(num_tokens, num_experts, choices), num_experts)
    parts = parts_of(kind, num_experts, torch.float32)
    x, weights = torch.randn(num_tokens, WIDTH), torch.rand(num_tokens, choices)
    given_ = {t.data_ptr() for t in (x, weights, rowmap.pairs, rowmap.rows, rowmap.ends, *parts.values())}
    saved: dict[int, int] = {}

    def count(tensor):
        if tensor.numel() and tensor.data_ptr() not in given_:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    learning = {name: part.requires_grad_() for name, part in parts.items()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run(CPU, rowmap, F.gelu)(x.requires_grad_(), weights.requires_grad_(), **learning)
    assert sum(saved.values()) == num_tokens * choices * HIDDEN * 4 * (2 if kind == "gated" else 1)


def test_inference_never_holds_all_hidden_rows():
    num_rows, hidden = 8192, 64
    rowmap = row_map_of(torch.zeros(num_rows, 1, dtype=torch.int64), 2)
    parts = parts_of("plain", 2, torch.float32, width=2, hidden=hidden)
    x, weights = torch.randn(num_rows, 2), torch.rand(num_rows, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(CPU, rowmap, F.gelu)(x, weights, **parts)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < num_rows * hidden * 4 / 2


@KINDS
def test_registrations_agree_with_the_kernel(kind):
    rowmap = row_map_of(torch.tensor([[0, 2], [2, 1], [0, 1]]), 4)
    mlp = MLPWeights(**parts_of(kind, 4, torch.float32))
    parts = [mlp.up, mlp.down, mlp.gate, mlp.up_bias, mlp.gate_bias, mlp.down_bias]
    for part in parts:
        if part is not None:
            part.requires_grad_()
    x, weights = torch.randn(3, WIDTH, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    args = (x, weights, rowmap.pairs, rowmap.rows, rowmap.ends, "gelu", True, *parts)
    torch.library.opcheck(torch.ops.synchromesh.fused_mlp_cpu.default, args)


@KINDS
@pytest.mark.parametrize("activation", [F.gelu, torch.sin], ids=["fused", "composed"])
def test_autocast_reaches_the_kernel(kind, activation):
    rowmap = row_map_of(zipf(20, 3, 2), 3)
    inputs = {"x": torch.randn(20, WIDTH), "weights": torch.rand(20, 2), **parts_of(kind, 3, torch.float32)}
    results = []
    for kernels in (CPU, REFERENCE):
        own = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            y = run(kernels, rowmap, activation)(**own)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        results.append({"y": y, **{name: tensor.grad.bfloat16() for name, tensor in own.items()}})
    for name in results[0]:
        assert_close(name, results[0][name], results[1][name])


def test_two_dtypes_are_refused():
    rowmap = row_map_of(torch.tensor([[0]]), 1)
    mlp = MLPWeights(**parts_of("plain", 1, torch.float32))
    with pytest.raises(ValueError, match=r"input of torch\.bfloat16 .* torch\.float32"):
        CPU.fused_mlp(torch.randn(1, WIDTH).bfloat16(), torch.ones(1, 1), rowmap, mlp, F.gelu)


def test_a_gate_bias_without_a_gate_is_refused():
    with pytest.raises(ValueError, match="gate_bias"):
        MLPWeights(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), gate_bias=torch.zeros(1, 2))


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.integers(0, 30),
    choices=st.integers(1, 3),
    experts=st.integers(1, 5),
    capacity=st.none() | st.integers(0, 8),
    kind=st.sampled_from(["plain", "biased", "gated", "gated_biased"]),
)
def test_any_shape(tokens, choices, experts, capacity, kind):
    rowmap = row_map_of(torch.randint(-1, experts, (tokens, choices)), experts, capacity=capacity)
    parts = parts_of(kind, experts, torch.float64, width=3, hidden=4)
    inputs = {"x": torch.randn(tokens, 3).double(), "weights": torch.rand(tokens, choices).double(), **parts}
    check(run(CPU, rowmap, F.gelu), run(REFERENCE, rowmap, F.gelu), inputs)


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
    rowmap, parts = case.rowmap(), joint_parts(bias, case.num_experts, torch.float64)
    inputs = {"x": case.tokens(WIDTH, torch.float64), "weights": case.weights(torch.float64), **parts}
    check(joint(CPU, rowmap, F.silu), taken_apart(rowmap, F.silu), inputs)
    check(joint(CPU, rowmap, torch.sin), taken_apart(rowmap, torch.sin), inputs)
    with torch.no_grad():
        assert_close("y", joint(CPU, rowmap, F.silu)(**inputs), taken_apart(rowmap, F.silu)(**inputs))


def test_gradients_lie_as_their_parameters_do():
    rowmap, parts = row_map_of(zipf(40, 4, 2), 4), joint_parts(False, 4, torch.float32)
    leaves = {name: part.requires_grad_() for name, part in parts.items()}
    joint(CPU, rowmap, F.silu)(torch.randn(40, WIDTH), torch.rand(40, 2), **leaves).sum().backward()
    assert all(leaf.grad.is_contiguous() for leaf in leaves.values())
