"""An experts backend for transformers: `experts_implementation="synchromesh"`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from synchromesh.compat.huggingface.networks import ExpertsModule, network_of
from synchromesh.kernels import kernels_for
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.strategy import Local, run_few_here, run_here
from synchromesh.parallel.adaptive import Adaptive
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.sharded import Sharded
from synchromesh.types import Routing

NAME = "synchromesh"


def register(*, strategy: Callable[[Grid], Sharded] = Adaptive) -> None:
    """Make "synchromesh" a name that transformers knows, for experts and for expert parallelism.

        register()
        model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="synchromesh")
        model.set_experts_implementation("synchromesh")
        config = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="synchromesh")

    Calling it again changes nothing but the strategy of models built from then on. Where transformers has no registry
    of expert parallelism yet, `parallelize_experts` does the same from outside.

    Args:
        strategy: of the ranks of one layer's experts.

    Raises:
        RuntimeError: this transformers has no registry of experts implementations.
    """
    _registry().register(NAME, experts_forward)
    _widen_white_list()
    if importlib.util.find_spec("transformers.distributed.expert_parallel") is not None and dist.is_available():
        from synchromesh.compat.huggingface.expert_parallel import register_expert_parallelism

        register_expert_parallelism(NAME, strategy)


def experts_forward(
    module: ExpertsModule,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Compute y[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t]) with the experts of a transformers module.

    An id outside 0..E-1 is an absent pair and adds nothing: transformers marks so what other ranks compute.
    """
    kernels, network = kernels_for(hidden_states.device), network_of(module)
    x = hidden_states.to(network.weights.down.dtype)  # norms may leave float32 before bfloat16 weights
    ids = _present(top_k_index, module.num_experts)
    # A reentrant checkpoint runs without gradients what it computes again with them: in training both go one way.
    y = None if module.training else run_few_here(x, ids, top_k_weights, network, {}, kernels)
    if y is None:
        routing = _unscored(ids, top_k_weights, module.num_experts)
        y = run_here(x, routing, Dropless()(routing, Local().agree_max), network, {}, kernels)
    return y.to(hidden_states.dtype)


def given_routing(ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"], num_experts: int) -> Routing:
    """Return what a transformers router said as a `Routing`; it says nothing of scores."""
    return _unscored(_present(ids, num_experts), weights, num_experts)


def _present(ids: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "T K"]:
    """Return the ids, -1 for what is no expert here."""
    return ids.masked_fill(ids >= num_experts, -1).clamp_(min=-1)


def _unscored(ids: Int[Tensor, "T K"], weights: Float[Tensor, "T K"], num_experts: int) -> Routing:
    scores = weights.new_zeros(()).expand(len(ids), num_experts)
    return Routing(ids, weights, scores=scores, logits=scores)


def _registry() -> Any:
    if importlib.util.find_spec("transformers.integrations.moe") is not None:
        from transformers.integrations import moe

        registry = getattr(moe, "ALL_EXPERTS_FUNCTIONS", None)
        if registry is not None:
            return registry
    raise RuntimeError(
        f"transformers {transformers.__version__} has no registry of experts implementations "
        "(transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS): install transformers>=5.0"
    )


def _widen_white_list() -> None:
    """Let a model take the name where transformers, up to 5.6, compares with a list instead of its registry."""
    checked = PreTrainedModel.get_correct_experts_implementation
    try:
        checked(cast(Any, None), NAME)  # asks a model only whether it can run grouped_mm
        return
    except ValueError:
        pass

    @functools.wraps(checked)
    def widened(self: Any, requested_experts: str | None) -> str:
        return NAME if requested_experts == NAME else checked(self, requested_experts)

    PreTrainedModel.get_correct_experts_implementation = widened
