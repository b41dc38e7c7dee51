"""The models that a configuration can name, as values that survive JSON, and how each is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import final

from torch import nn

from synchromesh.data.images import Preprocess
from synchromesh.errors import InputError
from synchromesh.kernels import Float8Products, MXFloat8Products, Products
from synchromesh.models.swin_v2 import SWIN_V2, SwinV2Classifier, SwinV2Config
from synchromesh.models.swin_v2_moe import SWIN_MOE, ExpertsConfig, RouterFactory, swin_v2_moe
from synchromesh.moe.capacity import Capacity, Dropless, FixedCapacity, batch_prioritized, token_order
from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import ImportanceLoad, LoadBalance, OverRanks
from synchromesh.moe.routing import BiasBalance, CosineRouter, TokenRounding, TopKRouter


@dataclass(frozen=True)
class Swin:
    """Sizes and rates of a SwinV2.

    Attributes:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        patch_size: side of a patch, pixels.
        window_size: side of a window, positions.
        mlp_ratio: hidden width of a feed-forward over its width.
        drop_path: largest stochastic depth rate.
        dropout: after the patch embedding and each feed-forward.
        released_style: pre-norm blocks with dot-product attention, as in the released Swin-MoE, instead of SwinV2's.
        recompute: compute the blocks again in backward instead of keeping their insides.
        init_std: standard deviation of the first weights.
        branch_norm_init: first weight of the norms that end residual branches.
    """

    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 4)
    num_heads: tuple[int, ...] = (3, 6)
    patch_size: int = 4
    window_size: int = 4
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    dropout: float = 0.0
    released_style: bool = False
    recompute: bool = False
    init_std: float = 0.02
    branch_norm_init: float = 1.0

    def settings(self, *, channels: int, image_size: int) -> SwinV2Config:
        """Return the model's own configuration for images of this kind."""
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
            checkpointed=self.recompute,
            init_std=self.init_std,
            branch_norm_init=self.branch_norm_init,
            style=SWIN_MOE if self.released_style else SWIN_V2,
        )


class Factors(Enum):
    """What products are made of."""

    THEMSELVES = "themselves"
    FLOAT8 = "float8"
    MXFLOAT8 = "mxfloat8"

    def chosen(self) -> Products | None:
        """Return what experts take."""
        return {Factors.FLOAT8: Float8Products(), Factors.MXFLOAT8: MXFloat8Products()}.get(self)


@dataclass(frozen=True)
class ExpertLayers:
    """The MoE layers of a model.

    Attributes:
        count: experts of each layer, E.
        k: experts per token.
        blocks: for each stage, the blocks whose feed-forward becomes a MoE layer, from 0.
        capacity_factor: room per expert over an even load; 0 drops nothing.
        prioritized: serve the surest tokens first (batch-prioritised routing), else in their order.
        cosine: the cosine router instead of the linear one.
        noise: on the logits while training, times E.
        loss: keeps the load even.
        bias_rate: balance by a bias of the selection that moves at this rate; 0 for none. Linear router only.
        tile: give each expert a multiple of this many tokens while training (token rounding); 0 for whatever it gets.
        products: what the experts multiply: rows and weights themselves, or 8-bit numbers of one kind or the other.
        dropout: in the experts.
        down_bias: whether feed-forwards, experts or not, have an output bias.
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
    tile: int = 0
    products: Factors = Factors.THEMSELVES
    dropout: float = 0.0
    down_bias: bool = True

    def settings(self) -> ExpertsConfig:
        """Return the model's own configuration."""
        return ExpertsConfig(
            num_experts=self.count,
            k=self.k,
            blocks=self.blocks,
            router=self._router(),
            capacity=self._capacity(),
            losses=() if self.loss is None else (OverRanks(self.loss),),  # of the batch, whatever the ranks
            dropout=self.dropout,
            down_bias=self.down_bias,
            products=self.products.chosen(),
        )

    def _capacity(self) -> Capacity:
        if self.capacity_factor == 0:
            return Dropless()
        return FixedCapacity(self.capacity_factor, priority=batch_prioritized if self.prioritized else token_order)

    def _router(self) -> RouterFactory:
        gate = self._gate()
        if self.tile == 0:
            return gate
        return lambda width, count, k: TokenRounding(gate(width, count, k), tile=self.tile)

    def _gate(self) -> RouterFactory:
        if self.cosine:
            return lambda width, count, k: CosineRouter(width, count, k=k, noise=self.noise)

        def linear(width: int, count: int, k: int) -> nn.Module:
            balance = BiasBalance(count, self.bias_rate) if self.bias_rate > 0 else None
            return TopKRouter(width, count, k=k, noise=self.noise, balance=balance)

        return linear


@final
@dataclass(frozen=True)
class DenseSwin:
    """A dense SwinV2 classifier."""

    swin: Swin = field(default_factory=Swin)

    def build(self, num_classes: int, *, channels: int, image_size: int) -> nn.Module:
        """Return the classifier: images [B, channels, H, W] to logits [B, num_classes]."""
        return SwinV2Classifier(self.swin.settings(channels=channels, image_size=image_size), num_classes)


@final
@dataclass(frozen=True)
class SwinMoE:
    """A SwinV2 classifier with MoE layers in some blocks."""

    swin: Swin = field(default_factory=Swin)
    experts: ExpertLayers = field(default_factory=ExpertLayers)

    def build(self, num_classes: int, *, channels: int, image_size: int) -> nn.Module:
        """Return the classifier: images [B, channels, H, W] to logits [B, num_classes]."""
        settings = self.swin.settings(channels=channels, image_size=image_size)
        return swin_v2_moe(settings, num_classes, experts=self.experts.settings())


Architecture = SwinMoE | DenseSwin


def build_classifier(architecture: Architecture, preprocess: Preprocess, num_classes: int) -> nn.Module:
    """Build the model for these images and classes.

    Raises:
        InputError: its settings contradict each other.
    """
    try:
        return architecture.build(num_classes, channels=preprocess.channels, image_size=preprocess.image_size)
    except ValueError as error:
        raise InputError(f"the model cannot be built: {error}") from error


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model: all, and those that one token passes through."""

    parameters: int
    active: int


def expert_counts(model: nn.Module) -> dict[str, int]:
    """Return E of each MoE layer, by its name."""
    return {name: m.experts.num_experts for name, m in model.named_modules() if isinstance(m, MoE)}


def model_size(model: nn.Module) -> ModelSize:
    """Count parameters; of E experts a token passes k."""
    total = active = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, MoE):
            count = sum(p.numel() for p in module.experts.parameters())
            experts, k = module.experts.num_experts, getattr(module.router, "k", 1)
            active -= count * (experts - k) // experts
    return ModelSize(total, active)
