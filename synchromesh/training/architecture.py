"""The models that a configuration can name, as values that survive JSON, and how each is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import nn

from synchromesh.capacity import Capacity, Dropless, FixedCapacity, batch_prioritized, token_order
from synchromesh.experts import MLPExperts
from synchromesh.layer import MoE
from synchromesh.losses import ImportanceLoad, LoadBalance
from synchromesh.models.swin_v2 import FeedForward, SwinV2Classifier, SwinV2Config
from synchromesh.routing import BiasBalance, CosineRouter, TopKRouter


@dataclass(frozen=True)
class Swin:
    """A dense SwinV2; the fields mean what those of `SwinV2Config` do.

    Attributes:
        checkpointed: recompute blocks in backward instead of keeping their insides. init_std: of all linear weights.
    """

    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 4)
    num_heads: tuple[int, ...] = (3, 6)
    patch_size: int = 4
    window_size: int = 7
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    dropout: float = 0.0
    checkpointed: bool = False
    init_std: float = 0.02
    branch_norm_init: float = 1.0

    def build(self, *, num_classes: int, channels: int, image_size: int) -> nn.Module:
        """Return the classifier: images [B, channels, H, W] to logits [B, num_classes]."""
        return SwinV2Classifier(self.settings(channels=channels, image_size=image_size), num_classes)

    def settings(self, *, channels: int, image_size: int) -> SwinV2Config:
        """Return the model's own configuration."""
        return SwinV2Config(
            image_size=image_size,
            patch_size=self.patch_size,
            in_channels=channels,
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            pretrained_window_sizes=(0,) * len(self.depths),
            mlp_ratio=self.mlp_ratio,
            drop_path=self.drop_path,
            dropout=self.dropout,
            checkpointed=self.checkpointed,
            init_std=self.init_std,
            branch_norm_init=self.branch_norm_init,
        )


@dataclass(frozen=True)
class Experts:
    """The MoE layers of a model.

    Attributes:
        count: E. k: experts per token. blocks: per stage, the blocks whose feed-forward becomes a MoE layer.
        capacity_factor: room per expert over an even load; 0 drops nothing. prioritized: who is surest is served first
            (batch-prioritised routing), else token order.
        cosine: the cosine router instead of the linear one. noise: on the logits while training, times E.
        loss: keeps the load even. bias_rate: balance by a bias of the selection, at this rate; 0 for none.
        dropout: in the experts. down_bias: whether their second bias is there.
    """

    count: int = 8
    k: int = 1
    blocks: tuple[tuple[int, ...], ...] = ((), (1, 3))
    capacity_factor: float = 1.25
    prioritized: bool = True
    cosine: bool = False
    noise: float = 1.0
    loss: LoadBalance | ImportanceLoad | None = field(default_factory=lambda: ImportanceLoad(0.01))
    bias_rate: float = 0.0
    dropout: float = 0.0
    down_bias: bool = True

    def capacity(self) -> Capacity:
        if self.capacity_factor == 0:
            return Dropless()
        return FixedCapacity(self.capacity_factor, priority=batch_prioritized if self.prioritized else token_order)

    def layer(self, width: int, hidden: int) -> MoE:
        """Return one MoE layer of this kind."""
        if self.cosine:
            router: nn.Module = CosineRouter(width, self.count, k=self.k, noise=self.noise)
        else:
            balance = BiasBalance(self.count, self.bias_rate) if self.bias_rate > 0 else None
            router = TopKRouter(width, self.count, k=self.k, noise=self.noise, balance=balance)
        experts = MLPExperts(self.count, width, hidden=hidden, down_bias=self.down_bias, dropout=self.dropout)
        losses = () if self.loss is None else (self.loss,)
        return MoE(router, experts, capacity=self.capacity(), losses=losses)


@final
@dataclass(frozen=True)
class DenseSwin:
    """A dense SwinV2 classifier."""

    swin: Swin = field(default_factory=Swin)

    def build(self, *, num_classes: int, channels: int, image_size: int) -> nn.Module:
        return self.swin.build(num_classes=num_classes, channels=channels, image_size=image_size)


@final
@dataclass(frozen=True)
class SwinMoE:
    """A SwinV2 classifier with MoE layers in some blocks."""

    swin: Swin = field(default_factory=Swin)
    experts: Experts = field(default_factory=Experts)

    def build(self, *, num_classes: int, channels: int, image_size: int) -> nn.Module:
        """Return the classifier: images [B, channels, H, W] to logits [B, num_classes]."""
        if len(self.experts.blocks) != len(self.swin.depths):
            raise ValueError(
                f"experts.blocks names {len(self.experts.blocks)} stages, the model has {len(self.swin.depths)}"
            )

        def ffn(stage: int, block: int, width: int) -> nn.Module:
            hidden = round(self.swin.mlp_ratio * width)
            if block in self.experts.blocks[stage]:
                return self.experts.layer(width, hidden)
            return FeedForward(width, hidden, dropout=self.swin.dropout)

        settings = self.swin.settings(channels=channels, image_size=image_size)
        return SwinV2Classifier(settings, num_classes, ffn=ffn)


Architecture = SwinMoE | DenseSwin


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model: all, and those that one token passes through."""

    parameters: int
    active: int


def model_size(model: nn.Module) -> ModelSize:
    """Count parameters; of E experts a token passes k."""
    total = active = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, MoE):
            count = sum(p.numel() for p in module.experts.parameters())
            experts, k = module.experts.num_experts, getattr(module.router, "k", 1)
            active -= count * (experts - k) // experts
    return ModelSize(total, active)
