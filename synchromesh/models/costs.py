"""What a SwinV2 costs, counted as the tables of its papers count it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from synchromesh.models.swin_v2 import NormThenMerge, SwinBlock, SwinV2, SwinV2Classifier
from synchromesh.moe.capacity import FixedCapacity
from synchromesh.moe.layer import MoE


@dataclass(frozen=True)
class Costs:
    """The costs of a model.

    Attributes:
        parameters: all of them.
        active_parameters: those that one token passes: k of E experts, without routers.
        router_parameters: what the routers add to both.
        multiply_adds: for one image of the configured size.
    """

    parameters: int
    active_parameters: int
    router_parameters: int
    multiply_adds: int

    @property
    def gflops(self) -> float:
        """Thousand millions of multiply-adds, which the papers call GFLOPs."""
        return self.multiply_adds / 1e9


def costs(model: SwinV2Classifier) -> Costs:
    """Count the parameters and multiply-adds of a model on any device, meta too.

    Linear layers, convolution, the two products of attention and one multiplication per normalised number count; the
    position bias, softmax, activations, residual sums and routers do not. Experts compute k f rows per token, f the
    factor of `FixedCapacity` and else 1 (no empty rows).
    """
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    parameters = _size(model)
    routers = sum(_size(moe.router) for moe in moes)
    idle = sum(_size(moe.experts) * (moe.experts.num_experts - _k(moe)) // moe.experts.num_experts for moe in moes)
    backbone = model.backbone
    work = _embedding(backbone) + sum(_stage(backbone, stage) for stage in range(len(backbone.config.depths)))
    height, width = backbone.config.map_size(len(backbone.config.depths) - 1)
    head = backbone.config.num_features * height * width + model.head.in_features * model.head.out_features
    return Costs(parameters, parameters - idle - routers, routers, round(work + head))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _k(moe: MoE) -> int:
    return moe.options.k or getattr(moe.router, "k", 1)


def _embedding(backbone: SwinV2) -> int:
    config = backbone.config
    height, width = config.map_size(0)
    return height * width * config.embed_dim * (config.in_channels * config.patch_size**2 + 1)


def _stage(backbone: SwinV2, stage: int) -> float:
    config = backbone.config
    height, width = config.map_size(stage)
    positions, channels = height * width, config.width(stage)
    blocks = [module for module in backbone.stages[stage].modules() if isinstance(module, SwinBlock)]
    work = sum((_block(block, positions, channels) for block in blocks), start=0.0)
    if stage == len(config.depths) - 1:
        return work
    merged = -(-height // 2) * -(-width // 2)
    normed = 4 * channels if config.style.merge is NormThenMerge else 2 * channels
    return work + merged * (normed + 8 * channels**2)


def _block(block: SwinBlock, positions: int, channels: int) -> float:
    padded = block.size[0] * block.size[1]
    attention = padded * (4 * channels**2 + 2 * block.side**2 * channels)
    return attention + 2 * positions * channels + positions * _per_token(block.ffn)


def _per_token(ffn: nn.Module) -> float:
    if not isinstance(ffn, MoE):
        return float(sum(module.weight.numel() for module in ffn.modules() if isinstance(module, nn.Linear)))
    capacity = ffn.options.capacity or ffn.capacity
    rows = _k(ffn) * (capacity.factor if isinstance(capacity, FixedCapacity) else 1.0)
    weights = sum(p.numel() for name, p in ffn.experts.named_parameters() if not name.endswith("bias"))
    shared = 0.0 if ffn.shared is None else _per_token(ffn.shared)
    return rows * weights / ffn.experts.num_experts + shared
