import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, MLPWeights
from synchromesh.testing.cases import routing_of, row_map_of, zipf
from synchromesh.testing.compare import assert_close
from synchromesh.types import RowMap

NUM_EXPERTS, WIDTH, HIDDEN = 4, 16, 24


def inputs_of(dtype, num_tokens=40):
    parts = {"up": (HIDDEN, WIDTH), "down": (HIDDEN, WIDTH), "up_bias": (HIDDEN,), "down_bias": (WIDTH,)}
    inputs = {name: torch.randn(NUM_EXPERTS, *shape) / WIDTH**0.5 for name, shape in parts.items()}
    inputs = {"x": torch.randn(num_tokens, WIDTH), "weights": torch.rand(num_tokens, 2), **inputs}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def fused(rowmap: RowMap, x, weights, **parts):
    return CPU.fused_mlp(x, weights, rowmap, MLPWeights(**parts), F.gelu)


def composed(rowmap: RowMap, x, weights, **parts):
    return CPU.fused_mlp(x, weights, rowmap, MLPWeights(**parts), torch.sin)


def results_of(function, rowmap, inputs):
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(rowmap, **own)
    y.sum().backward()
    return {"y": y, **{f"gradient of {name}": tensor.grad for name, tensor in own.items()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", [fused, composed])
def test_one_graph_forward_and_backward(function, dtype):
    inputs = inputs_of(dtype)
    rowmap = row_map_of(zipf(40, NUM_EXPERTS, 2), NUM_EXPERTS)
    compiled = torch.compile(function, fullgraph=True)
    wanted = results_of(function, rowmap, inputs)
    for name, got in results_of(compiled, rowmap, inputs).items():
        assert_close(name, got, wanted[name])


def test_one_graph_without_gradients():
    inputs = {name: tensor.detach() for name, tensor in inputs_of(torch.float32).items()}
    rowmap = row_map_of(zipf(40, NUM_EXPERTS, 2), NUM_EXPERTS)
    compiled = torch.compile(fused, fullgraph=True)
    assert_close("y", compiled(rowmap, **inputs), fused(rowmap, **inputs))


def test_another_number_of_tokens_needs_no_third_graph():
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=graphs)
    for num_tokens in (40, 30, 20, 10):
        inputs = inputs_of(torch.float32, num_tokens)
        rowmap = row_map_of(zipf(num_tokens, NUM_EXPERTS, 2), NUM_EXPERTS)
        wanted = results_of(fused, rowmap, inputs)
        for name, got in results_of(compiled, rowmap, inputs).items():
            assert_close(name, got, wanted[name])
    assert graphs.frame_count <= 2


def test_positions_stay_in_the_graph():
    ids = zipf(40, NUM_EXPERTS, 2)
    routing = routing_of(ids, NUM_EXPERTS, torch.rand(40, 2))

    def places(routing):
        return CPU.positions(routing.expert_ids, routing.num_experts, routing.weights[:, 0])

    for got, wanted in zip(torch.compile(places, fullgraph=True)(routing), places(routing), strict=True):
        assert torch.equal(got, wanted)
