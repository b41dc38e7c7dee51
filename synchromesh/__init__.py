"""synchromesh: Mixture-of-Experts layers for PyTorch that run at the speed of the hardware."""

from synchromesh.adapt.replace import replace_ffn
from synchromesh.kernels import Float8Products, MXFloat8Products
from synchromesh.moe.capacity import Capacity, Dropless, FixedCapacity, NeededCapacity, batch_prioritized, token_order
from synchromesh.moe.experts import Experts, GatedMLPExperts, MLPExperts, ModuleExperts, set_products
from synchromesh.moe.layer import MoE, routing_options
from synchromesh.moe.losses import ImportanceLoad, LoadBalance, Loss, OverRanks, ZLoss
from synchromesh.moe.quantized import QuantizedExperts, quantize_experts
from synchromesh.moe.record import aux_loss, load_stats, record_load
from synchromesh.moe.routing import (
    BiasBalance,
    CosineRouter,
    ExpertChoiceRouter,
    NodeLimit,
    Router,
    Sigmoid,
    Softmax,
    TokenRounding,
    TopKRouter,
    update_balance,
)
from synchromesh.moe.strategy import Local, Strategy
from synchromesh.parallel.adaptive import Adaptive, Council
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import (
    DDP,
    FSDP2,
    accumulating,
    adaptive_layers,
    clip_grad_norm,
    distribute,
    expert_parameters,
    parallelize,
    split_by_kind,
    token_mean_loss,
)
from synchromesh.parallel.sharded import Sharded
from synchromesh.parallel.wire import AsIs, Float8, Wire
from synchromesh.types import LoadStats, Plan, Routing, RowMap, Workload

__version__ = "0.1.0"

__all__ = [
    "DDP",
    "FSDP2",
    "Adaptive",
    "AsIs",
    "BiasBalance",
    "Capacity",
    "CosineRouter",
    "Council",
    "Dropless",
    "ExpertChoiceRouter",
    "Experts",
    "FixedCapacity",
    "Float8",
    "Float8Products",
    "GatedMLPExperts",
    "Grid",
    "ImportanceLoad",
    "LoadBalance",
    "LoadStats",
    "Local",
    "Loss",
    "MLPExperts",
    "MXFloat8Products",
    "MoE",
    "ModuleExperts",
    "NeededCapacity",
    "NodeLimit",
    "OverRanks",
    "Plan",
    "QuantizedExperts",
    "Router",
    "Routing",
    "RowMap",
    "Sharded",
    "Sigmoid",
    "Softmax",
    "Strategy",
    "TokenRounding",
    "TopKRouter",
    "Wire",
    "Workload",
    "ZLoss",
    "accumulating",
    "adaptive_layers",
    "aux_loss",
    "batch_prioritized",
    "clip_grad_norm",
    "distribute",
    "expert_parameters",
    "load_stats",
    "parallelize",
    "quantize_experts",
    "record_load",
    "replace_ffn",
    "routing_options",
    "set_products",
    "split_by_kind",
    "token_mean_loss",
    "token_order",
    "update_balance",
]
