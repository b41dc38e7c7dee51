"""synchromesh: Mixture-of-Experts layers for PyTorch that run at the speed of the hardware."""

from synchromesh.capacity import Capacity, Dropless, FixedCapacity, NeededCapacity, batch_prioritized, token_order
from synchromesh.experts import Experts, GatedMLPExperts, MLPExperts, ModuleExperts
from synchromesh.layer import MoE, routing_options
from synchromesh.losses import ImportanceLoad, LoadBalance, Loss, ZLoss
from synchromesh.parallel.strategy import Local, Strategy
from synchromesh.record import aux_loss, load_stats, record_load
from synchromesh.replace import replace_ffn
from synchromesh.routing import (
    BiasBalance,
    CosineRouter,
    ExpertChoiceRouter,
    NodeLimit,
    Router,
    Sigmoid,
    Softmax,
    TopKRouter,
    update_balance,
)
from synchromesh.types import LoadStats, Plan, Routing, RowMap, Workload

__version__ = "0.1.0"

__all__ = [
    "BiasBalance",
    "Capacity",
    "CosineRouter",
    "Dropless",
    "ExpertChoiceRouter",
    "Experts",
    "FixedCapacity",
    "GatedMLPExperts",
    "ImportanceLoad",
    "LoadBalance",
    "LoadStats",
    "Local",
    "Loss",
    "MLPExperts",
    "MoE",
    "ModuleExperts",
    "NeededCapacity",
    "NodeLimit",
    "Plan",
    "Router",
    "Routing",
    "RowMap",
    "Sigmoid",
    "Softmax",
    "Strategy",
    "TopKRouter",
    "Workload",
    "ZLoss",
    "aux_loss",
    "batch_prioritized",
    "load_stats",
    "record_load",
    "replace_ffn",
    "routing_options",
    "token_order",
    "update_balance",
]
