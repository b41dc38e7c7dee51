"""Each private part of torch that the package leans on does what is expected of it; a new torch fails here first."""

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from synchromesh import torch_private
from synchromesh.testing.distributed import run_ranks

TORCH = ("torch", "aten", "dist", "nn", "DistributedDataParallel", "functorch")  # names by which modules know it
PACKAGE = sorted((Path(__file__).parent.parent / "synchromesh").rglob("*.py"))


def test_a_backward_has_a_number_and_a_forward_has_none():
    seen = []
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        y = x * 2
        y.register_hook(lambda _: seen.append(torch_private.backward_task()))
        assert torch_private.backward_task() is None
        y.sum().backward()
    assert None not in seen
    assert len(set(seen)) == 2


def test_a_checkpointed_forward_and_its_recomputation_share_a_frame_that_others_do_not():
    frames = []

    def block(x):
        frames.append(torch_private.checkpoint_frame())
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    assert torch_private.checkpoint_frame() is None
    (checkpoint(block, x, use_reentrant=False) + checkpoint(block, x, use_reentrant=False)).sum().backward()
    first, second, *recomputed = frames
    assert first is not None
    assert second is not None
    assert first is not second
    assert {id(frame) for frame in recomputed} == {id(first), id(second)}


def test_a_function_that_breaks_graphs_runs_as_it_is_and_brings_no_compiler_before():
    code = (
        "import sys; from synchromesh.torch_private import BREAKS_GRAPH; f = BREAKS_GRAPH(lambda x: x + 1);"
        "before = 'torch._dynamo' in sys.modules; print(before, f(1), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "2", "True"]


def test_hooks_of_others_are_no_checkpoint():
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert torch_private.checkpoint_frame() is None


def ignored_by_ddp():
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = model[1].weight.detach().clone()
    torch_private.leave_to_owner(model, ["1.weight"])
    run = DistributedDataParallel(model)
    run(torch.full((1, 2), 1.0 + dist.get_rank())).sum().backward()
    assert torch.equal(model[1].weight, own)  # not broadcast
    return [parameter.grad.tolist() for parameter in (model[0].bias, model[1].weight)]


def test_ddp_neither_broadcasts_nor_reduces_what_is_left_to_its_owner():
    (shared, own), (other_shared, other_own) = run_ranks(ignored_by_ddp, 2)
    assert shared == other_shared
    assert own != other_own


class LateOwner(DistributedDataParallel):
    def __setattr__(self, name, value):
        if name == "module":
            torch_private.leave_to_owner_late(self, value, ["weight", "0.weight", "0.buffer"])
        super().__setattr__(name, value)


def ignored_late():
    torch.manual_seed(dist.get_rank())
    kept = []
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))):
        layer = model if isinstance(model, nn.Linear) else model[0]
        layer.register_buffer("buffer", torch.full((1,), float(dist.get_rank())))
        own, shared = layer.weight.detach().clone(), layer.bias.detach().clone()
        run = LateOwner(model)
        run(torch.full((1, 2), 1.0 + dist.get_rank())).sum().backward()
        assert torch.equal(layer.weight, own)  # not broadcast
        assert torch.equal(layer.bias, shared) == (dist.get_rank() == 0)
        kept.append((layer.weight.grad.tolist(), layer.bias.grad.tolist(), layer.buffer.item()))
    return kept


def test_a_ddp_that_is_being_built_leaves_what_it_is_told_to_its_owner():
    for (own, shared, _), (other_own, other_shared, _) in zip(*run_ranks(ignored_late, 2), strict=True):
        assert shared == other_shared
        assert own != other_own
    assert [kept[1][2] for kept in run_ranks(ignored_late, 2)] == [0.0, 1.0]


def left_out_of_fsdp():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    torch_private.leave_out_of_fsdp(model[1])
    fully_shard(model)
    return [isinstance(parameter, DTensor) for parameter in model.parameters()]


def test_fully_shard_passes_over_a_module_and_its_children():
    assert run_ranks(left_out_of_fsdp, 2) == [[True, True, False, False]] * 2


def test_what_a_module_keeps_in_a_state_dict_is_listed_by_name_each_time():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.append(model[1])
    model.register_buffer("gone", torch.zeros(1), persistent=False)
    kept = torch_private.kept_by(model)
    assert list(kept) == list(model.state_dict())
    assert kept["2.weight"] is model[1].weight


def told_through_the_store():
    store = torch_private.job_store()
    store.set(f"said {dist.get_rank()}", "here")
    return store.get(f"said {1 - dist.get_rank()}")


def test_the_store_of_a_job_is_found_and_shared():
    assert run_ranks(told_through_the_store, 2) == [b"here", b"here"]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_call_are_seen(register):
    layer = nn.Linear(2, 2)
    assert not torch_private.has_hooks(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert torch_private.has_hooks(layer)
    handle.remove()
    assert not torch_private.has_hooks(layer)


def test_hooks_of_all_modules_are_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch_private.has_hooks(nn.Linear(2, 2))
    handle.remove()
    assert not torch_private.has_hooks(nn.Linear(2, 2))


def test_a_child_registered_under_two_names_is_listed_twice():
    shared = nn.Linear(2, 2)
    assert torch_private.children_of(nn.ModuleDict({"a": shared, "b": shared})) == {"a": shared, "b": shared}


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_one_call_of_onednn_is_a_linear_layer(gelu, dtype, biased):
    if not torch.backends.mkldnn.is_available() or (
        dtype == torch.bfloat16 and not torch_private.onednn_has_bfloat16()
    ):
        pytest.skip("this CPU has no such product")  # a user's machine may lack oneDNN, or bfloat16
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 8), torch.randn(6, 8), torch.randn(6)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) if biased else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = torch_private.onednn_linear(x, weight, bias, gelu=gelu)
    assert got.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (got - (F.gelu(wanted) if gelu else wanted)).abs().max() < bound


TRANSFORMS = {
    "grad": (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), False),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x,)), False),
    "vmap": (lambda f, x: torch.func.vmap(f)(x), True),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), None),  # f runs outside of its vmap, the backward inside
    "vmap of grad": (lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x), True),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_transforms_are_noticed_while_they_run_and_not_after(name):
    transform, by_vmap = TRANSFORMS[name]
    seen, kept = [], []

    def function(x):
        seen.append((torch_private.transformed(), torch_private.vmapped()))
        kept.append(x * 2)
        assert not torch_private.outlived(kept[-1])
        return x * 2

    transform(function, torch.ones(3, 2))
    assert seen
    assert all(transformed for transformed, _ in seen)
    assert by_vmap is None or all(vmapped == by_vmap for _, vmapped in seen)
    assert not torch_private.transformed()
    assert not torch_private.vmapped()
    assert all(torch_private.outlived(tensor) for tensor in kept)


def test_tensors_that_vmap_runs_over_are_known():
    seen = []

    def look(x, y):
        seen.append((torch_private.batched(x), torch_private.batched(y)))
        return x + y

    torch.vmap(look, in_dims=(0, None))(torch.ones(2, 3), torch.ones(3))
    assert seen == [(True, False)]
    assert not torch_private.batched(torch.ones(2))


def test_plain_tensors_and_dual_levels():
    x = torch.ones(2, requires_grad=True)
    assert not torch_private.outlived(x * 2)
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.transformed()
        assert not torch_private.vmapped()
    assert not torch_private.transformed()


def test_an_unaliased_tensor_can_be_written_to():
    x = torch.ones(2, 3, requires_grad=True)
    y = torch_private.unaliased((x * 2).view_as(x), torch.Size([3, 2]))
    assert not y._is_view()
    y += 1
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


def test_clipping_and_scaling_ask_a_gradient_s_own_kind():
    asked = []

    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            with torch_private.without_torch_function():
                return func(*args, **(kwargs or {}))

    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), 2.0).as_subclass(Own)
    nn.utils.clip_grad_norm_([parameter], 1.0, foreach=True)
    assert torch_private.FOREACH_NORM in asked
    nn.utils.clip_grad_norm_([parameter], 1.0)
    assert torch.linalg.vector_norm in asked
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([parameter])
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    assert torch_private.UNSCALE in asked


def test_what_is_hidden_from_policies_is_seen_by_others():
    seen, counted = [], []

    def policy(context, op, *_args, **_kwargs):
        seen.append((context.is_recompute, op))
        return CheckpointPolicy.MUST_SAVE

    class Counts(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func)
            return func(*args, **(kwargs or {}))

    def run(x):
        with torch_private.unseen_by_policies():
            shown = x.cos()
        return x.sin() * shown

    x = torch.ones(3, requires_grad=True)
    with Counts():
        checkpoint(run, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))
    assert torch.ops.aten.sin.default in [op for _, op in seen]
    assert torch.ops.aten.cos.default not in [op for _, op in seen]
    assert torch.ops.aten.cos.default in counted


def test_a_mode_sees_index_assignments_copies_and_trees():
    seen = []

    class Mode(torch_private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, len(torch_private.tree_leaves((args, kwargs)))))
            return func(*args, **(kwargs or {}))

    with Mode():
        x = torch.zeros(3)
        x[torch.tensor([True, False, True])] = 1.0
        x.to(torch.float64)
    found = {func for func, _ in seen}
    assert torch_private.TO_COPY in found
    assert found & {torch_private.INDEX_PUT, torch.ops.aten.index_put_.default}
    assert all(leaves >= 1 for _, leaves in seen)


def test_the_gradient_of_a_softmax_is_autograds():
    scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    weights, grad = scores.softmax(-1), torch.randn(3, 7, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(weights, scores, grad)
    torch.testing.assert_close(torch_private.softmax_backward(grad, weights.detach()), wanted)


def test_custom_ops_are_found_by_their_names():
    @torch.library.custom_op("synchromesh_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert "synchromesh_test::twice" in torch_private.CUSTOM_OPS


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.stem)
def test_nothing_else_reads_a_private_name_of_torch(path):
    if path.name == "torch_private.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and _private(node.attr):
            assert ast.unparse(node).split(".")[0] not in TORCH, node.lineno
            assert node.attr not in ("_modules", "_parameters", "_buffers", "_forward_hooks"), node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(map(_private, names)), node.lineno


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
