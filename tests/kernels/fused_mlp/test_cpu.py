import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import CPU, REFERENCE, MLPWeights, autocast, products
from synchromesh.kernels.fused_mlp import cpu
from synchromesh.testing.cases import NETWORKS, network_parts, row_map_of, zipf
from synchromesh.testing.compare import assert_close

KINDS = pytest.mark.parametrize("kind", NETWORKS)
WIDTH, HIDDEN = 10, 17


def parts_of(kind, num_experts, dtype, *, width=WIDTH, hidden=HIDDEN):
    return network_parts(kind, num_experts, dtype, width=width, hidden=hidden)


def run(kernels, rowmap, activation, kind):
    def run(x, weights, **parts):
        mlp = MLPWeights(**parts, joint="joint" in kind)
        return kernels.fused_mlp(x, weights, rowmap, mlp, activation)

    return run


@KINDS
def test_gradcheck(kind):
    rowmap = row_map_of(torch.tensor([[0, 2], [2, -1], [0, 3]]), 4, capacity=2)
    parts = parts_of(kind, 4, torch.float64, width=3, hidden=2)
    inputs = [torch.randn(3, 3, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64), *parts.values()]
    own = run(CPU, rowmap, F.gelu, kind)
    assert torch.autograd.gradcheck(
        lambda x, weights, *values: own(x, weights, **dict(zip(parts, values, strict=True))),
        [tensor.requires_grad_() for tensor in inputs],
    )


def test_inference_never_holds_all_hidden_rows():
    num_rows, hidden = 131072, 64
    rowmap = row_map_of(torch.zeros(num_rows, 1, dtype=torch.int64), 2)
    parts = parts_of("plain", 2, torch.float32, width=2, hidden=hidden)
    x, weights = torch.randn(num_rows, 2), torch.rand(num_rows, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(CPU, rowmap, F.gelu, "plain")(x, weights, **parts)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < num_rows * hidden * 4 / 2


@pytest.mark.usefixtures("everything_by_onednn")
@KINDS
def test_both_libraries_give_the_reference_and_its_gradients(kind):
    rowmap = row_map_of(zipf(200, 5, 2), 5)
    parts = {name: part.requires_grad_() for name, part in parts_of(kind, 5, torch.float32).items()}
    x, weights = torch.randn(200, WIDTH, requires_grad=True), torch.rand(200, 2, requires_grad=True)
    inputs, grad = [x, weights, *parts.values()], torch.randn(200, WIDTH)
    got, wanted = (run(kernels, rowmap, F.gelu, kind)(x, weights, **parts) for kernels in (CPU, REFERENCE))
    assert_close("y", got, wanted)
    for own, other in zip(*(torch.autograd.grad(y, inputs, grad) for y in (got, wanted)), strict=True):
        assert_close("gradient", own, other)


@pytest.mark.usefixtures("everything_by_onednn")
@pytest.mark.parametrize("most", [7, 40, 512])
@KINDS
def test_inference_by_onednn_takes_its_results_where_they_are(monkeypatch, kind, most):
    monkeypatch.setattr(cpu, "block_rows", lambda *_: most)
    rowmap, parts = row_map_of(zipf(200, 5, 2), 5), parts_of(kind, 5, torch.float32)
    x, weights = torch.randn(200, WIDTH), torch.rand(200, 2)
    y = run(CPU, rowmap, F.gelu, kind)(x, weights, **parts)
    assert_close("y", y, run(REFERENCE, rowmap, F.gelu, kind)(x, weights, **parts))
    learned = run(CPU, rowmap, F.gelu, kind)(x.requires_grad_(), weights, **parts).detach()
    assert_close("y", y, learned)


@KINDS
def test_registrations_agree_with_the_kernel(kind):
    rowmap, joint = row_map_of(torch.tensor([[0, 2], [2, 1], [0, 1]]), 4), "joint" in kind
    parts = MLPWeights(**parts_of(kind, 4, torch.float32), joint=joint).tensors()[:6]
    for part in parts:
        if part is not None:
            part.requires_grad_()
    x, weights = torch.randn(3, WIDTH, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    args = (x, weights, rowmap.pairs, rowmap.rows, rowmap.ends, "gelu", True, joint, *parts)
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
            y = run(kernels, rowmap, activation, kind)(**own)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        results.append({"y": y, **{name: tensor.grad.bfloat16() for name, tensor in own.items()}})
    for name in results[0]:
        assert_close(name, results[0][name], results[1][name])


@KINDS
def test_experts_cast_one_by_one_under_autocast_are_those_cast_before_bit_for_bit(monkeypatch, kind):
    ids = torch.cat([zipf(40, 6, 2), torch.tensor([[7, 8]]).repeat(6, 1)])
    rowmap, gradient = row_map_of(ids, 9), torch.randn(len(ids), WIDTH).bfloat16()
    inputs = {"x": torch.randn(len(ids), WIDTH), "weights": torch.rand(ids.shape), **parts_of(kind, 9, torch.float32)}
    results, cast, narrow = [], [], products.narrow
    monkeypatch.setattr(products, "narrow", lambda one, dtype: cast.append(one.dtype != dtype) or narrow(one, dtype))
    for from_bytes in (2**40, 1):
        assert not any(cast)
        monkeypatch.setattr(autocast, "HUGE_FROM", from_bytes)
        own = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        with torch.autocast("cpu", torch.bfloat16):
            y = run(CPU, rowmap, F.gelu, kind)(**own)
        first = torch.autograd.grad(y, list(own.values()), gradient, retain_graph=True)
        again = torch.autograd.grad(y, list(own.values()), gradient, create_graph=True)
        second = torch.autograd.grad(sum(d.double().square().sum() for d in again), own["x"])
        results.append([y, *first, *again, *second])
    assert any(cast)
    for whole, each in zip(*results, strict=True):
        assert whole.dtype == each.dtype
        assert torch.equal(whole, each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@KINDS
def test_blocks_that_cut_experts_change_no_result(monkeypatch, kind, dtype):
    monkeypatch.setattr(cpu, "block_rows", lambda *_: 7)
    ids = torch.cat([torch.arange(4).repeat_interleave(3), torch.full((20,), 5), torch.tensor([7])])[:, None]
    rowmap, parts = row_map_of(ids, 9), parts_of(kind, 9, dtype)
    inputs = {"x": torch.randn(len(ids), WIDTH).to(dtype), "weights": torch.rand(len(ids), 1).to(dtype), **parts}
    results = []
    for kernels in (CPU, REFERENCE):
        own = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = run(kernels, rowmap, F.gelu, kind)(**own)
        y.backward(torch.ones_like(y))
        results.append({"y": y, **{name: tensor.grad for name, tensor in own.items()}})
    for name in results[0]:
        assert_close(name, results[0][name], results[1][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choices", [1, 2])
@KINDS
def test_inference_overwrites_its_blocks_and_gives_the_bits_of_training(monkeypatch, kind, choices, dtype):
    monkeypatch.setattr(cpu, "block_rows", lambda *_: 7)
    rowmap, parts = row_map_of(zipf(30, 5, choices), 5), parts_of(kind, 5, dtype)
    x, weights = torch.randn(30, WIDTH).to(dtype), torch.rand(30, choices).to(dtype)
    own = run(CPU, rowmap, F.gelu, kind)
    with torch.no_grad():
        y = own(x, weights, **parts)
    assert torch.equal(y, own(x.requires_grad_(), weights, **parts).detach())
    assert_close("y", y, run(REFERENCE, rowmap, F.gelu, kind)(x.detach(), weights, **parts))
    assert torch.equal(y, own(x.detach(), weights.float(), **parts))  # bfloat16 weights lose nothing as they are
