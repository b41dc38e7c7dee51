"""What leans on private parts of torch, all of it; tests/test_torch_private.py names what breaks when torch changes.

Everything here has no public way as of torch 2.13. Nothing else in the package reads a name of torch that begins with
an underscore.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._compile import _disable_dynamo
from torch._library.custom_ops import OPDEFS as CUSTOM_OPS  # by qualified name
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode, _CheckpointFrame

__all__ = ["CUSTOM_OPS", "TorchDispatchMode", "tree_leaves"]

_POLICIES = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

# What dispatches under an index assignment, and under `tensor.to(...)`.
INDEX_PUT, TO_COPY = torch.ops.aten._index_put_impl_.default, torch.ops.aten._to_copy.default

# What torch's clip_grad_norm_ asks of many gradients at once, and a GradScaler.
FOREACH_NORM: Any = getattr(torch, "_foreach_norm")  # noqa: B009 - its stubs do not name them
UNSCALE: Any = getattr(torch, "_amp_foreach_non_finite_check_and_unscale_")  # noqa: B009


# oneDNN's linear layer with an activation, which inductor calls; None where torch was built without oneDNN.
ONEDNN_LINEAR: Any = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None

# `torch.compiler.disable`, which imports the compiler at the first call and not before: half a second.
BREAKS_GRAPH: Any = _disable_dynamo


def without_torch_function() -> Any:
    """Return a context in which `__torch_function__` of tensors is not asked."""
    return torch._C.DisableTorchFunctionSubclass()


def backward_task() -> int | None:
    """Return the number of the backward that autograd runs in this thread; None outside of one."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def checkpoint_frame() -> object | None:
    """Return the object that a checkpointed forward and its recomputations share; None outside of a checkpoint.

    `torch.utils.checkpoint` (use_reentrant=False) keeps it in the closure of its saved-tensors hook.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore[reportAttributeAccessIssue]
    if hooks is None:
        return None
    pack = inspect.unwrap(hooks[0])
    if not inspect.isfunction(pack):
        return None
    held = inspect.getclosurevars(pack).nonlocals
    frame = held["target_frame_ref"]() if "target_frame_ref" in held else held.get("frame")
    return frame if isinstance(frame, _CheckpointFrame) else None


@contextmanager
def unseen_by_policies() -> Iterator[None]:
    """Hide operations from the policy of a selective checkpoint, which pairs those of a recomputation by their number.

    What is hidden is neither saved nor looked up; other modes go on seeing it.
    """
    stack = [] if torch.compiler.is_compiling() else _get_current_dispatch_mode_stack()
    if not any(isinstance(mode, _POLICIES) for mode in stack):
        yield
        return
    with _disable_current_modes() as modes, ExitStack() as others:
        for mode in (one for one in modes if one is not None):
            if not isinstance(mode, _POLICIES):
                others.enter_context(mode)
        yield


def transformed() -> bool:
    """Tell whether a transform of torch.func or forward-mode differentiation is at work.

    torch.compile sees through neither question; there the answer is no.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or functorch.peek_interpreter_stack() is not None


def vmapped() -> bool:
    """Tell whether a transform at work is torch.vmap (or jacrev, jacfwd, hessian): then no number can be read."""
    if torch.compiler.is_compiling():
        return False
    stack = functorch.get_interpreter_stack() or []
    return any(one.key() == functorch.TransformType.Vmap for one in stack)


def batched(tensor: Tensor) -> bool:
    """Tell whether torch.vmap runs over a dim of this tensor."""
    return not torch.compiler.is_compiling() and functorch.is_batchedtensor(tensor)


def outlived(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs to a transform of torch.func that has ended."""
    if torch.compiler.is_compiling():
        return False
    level = functorch.maybe_get_level(tensor)
    now = functorch.maybe_current_level() or 0
    return level == -2 or level > now


def leave_to_owner(model: nn.Module, names: Iterable[str]) -> None:
    """Make DistributedDataParallel neither broadcast nor reduce these parameters and buffers of a model."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def leave_to_owner_late(run: DistributedDataParallel, model: nn.Module, names: Iterable[str]) -> None:
    """Do so for one that is being built and is about to set `self.module`: it has not spoken to other ranks yet.

    Raises:
        ValueError: nothing is left to reduce.
    """
    kept = set(names)
    own = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in kept}
    run.parameters_to_ignore.update(kept, (f".{name}" for name in kept if "." not in name))  # it spells these so too
    left = [p for p in run._module_parameters if id(p) not in own]
    if not any(parameter.requires_grad for parameter in left):  # torch would crash
        raise ValueError(
            "got a model whose trained parameters are all experts that are spread over ranks, wanted others too: "
            "DistributedDataParallel would have nothing to do; train the model as it is, its gradients are complete"
        )
    run._module_parameters = left


def leave_out_of_fsdp(module: nn.Module) -> None:
    """Make fully_shard pass over a module and all that is in it, as over one that is replicated by other means."""
    from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem  # slow, and for ranks alone

    registry = module.__dict__.setdefault(REGISTRY_KEY, OrderedDict())
    registry["replicate"] = RegistryItem()


def kept_by(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module and its children keep in a state dict, by name; tied tensors under each of their names."""
    found: dict[str, Tensor] = {}
    for prefix, child in module.named_modules(remove_duplicate=False):
        kept = {n: b for n, b in child._buffers.items() if n not in child._non_persistent_buffers_set}
        for name, tensor in {**child._parameters, **kept}.items():
            if tensor is not None:
                found[f"{prefix}.{name}".lstrip(".")] = tensor
    return found


def job_store() -> Any:
    """Return the store that the default process group was made with."""
    return dist.distributed_c10d._get_default_store()


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of the module runs anything besides its forward, there or in backward."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or bool(nn.modules.module._has_any_global_hook())


def unaliased(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor in another shape that is no view, as others may write to it; the one given is used no more."""
    return torch.ops.aten._unsafe_view(tensor, shape)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the children of a module by name; one registered under two names is listed twice."""
    return dict(module._modules)


def onednn_linear(
    x: Float[Tensor, "*T D"], weight: Float[Tensor, "F D"], bias: Float[Tensor, " F"] | None, *, gelu: bool
) -> Float[Tensor, "*T F"]:
    """Return x weight^T + bias, passed through gelu if asked, in one call of oneDNN; without gradient."""
    activation = ("gelu", [], "none") if gelu else ("none", [], "")
    return ONEDNN_LINEAR(x, weight, bias, *activation)


def onednn_has_bfloat16() -> bool:
    """Tell whether this CPU can multiply bfloat16 by oneDNN."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def softmax_backward(grad: Tensor, softmax: Tensor) -> Tensor:
    """Return the gradient of the scores, given a softmax over the last dim and its gradient, both of one dtype."""
    return torch.ops.aten._softmax_backward_data(grad, softmax, -1, softmax.dtype)
