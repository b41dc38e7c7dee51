"""The configuration of SwinV2-MoE as transformers keeps one: a flat config.json, strings for choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, Swinv2Config
from transformers.backbone_utils import BackboneConfigMixin

from synchromesh.models.mixtures import CosineGate, ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import BlockStyle, SwinV2Config
from synchromesh.moe.capacity import Dropless, FixedCapacity, batch_prioritized, token_order
from synchromesh.moe.losses import ImportanceLoad, LoadBalance

STYLES = {style.value: style for style in BlockStyle}
GATES = {"linear": LinearGate, "cosine": CosineGate}
LOSSES = {"load_balance": LoadBalance, "importance_load": ImportanceLoad}
# What of a dense Swinv2's configuration is carried over; the rest must be as it is by default.
CARRIED = (
    *("image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size"),
    *("pretrained_window_sizes", "mlp_ratio", "qkv_bias", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("drop_path_rate", "initializer_range", "id2label", "label2id", "problem_type"),
)
FIXED = {"hidden_act": "gelu", "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}


class SwinV2MoEConfig(BackboneConfigMixin, PreTrainedConfig):
    """What a SwinV2-MoE is made of. Fields up to initializer_range are those of `transformers.Swinv2Config`.

    Attributes:
        block_style: "swin_v2", or "swin_moe" for the blocks of the released Swin-MoE.
        moe_blocks: for each stage, the blocks with experts; None is every second one of the later half of the stages.
        norm_topk_prob: whether the weights of a token's experts are the softmax over these alone, so that they sum to
            one; else they are its probabilities among all experts, and the published setting.
        router: "linear" or "cosine".
        router_noise: on the logits while training, over E.
        router_aux_loss: "load_balance", or "importance_load", which wants noise.
        router_aux_loss_coef: its weight.
        capacity_factor: room of an expert over an even load; None drops nothing.
        batch_prioritized: whether a full expert keeps the tokens of highest score, instead of the first.
        output_bias: whether feed-forwards, experts or not, have one.
        aux_loss_in_backward: whether a backbone's output carries the experts' loss into backward, so that any detector
            trains with it. Without it, add `aux_loss(model)` to each step's loss, as you must where a GradScaler or
            the division by accumulation steps changes that loss.
    """

    model_type = "swinv2_moe"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}  # noqa: RUF012

    image_size: int | Sequence[int] = 224
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: Sequence[int] = (2, 2, 6, 2)
    num_heads: Sequence[int] = (3, 6, 12, 24)
    window_size: int = 7
    pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    initializer_range: float = 0.02
    block_style: str = "swin_v2"
    moe_blocks: Sequence[Sequence[int]] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    router: str = "linear"
    router_noise: float = 0.0
    router_aux_loss: str = "load_balance"
    router_aux_loss_coef: float = 0.01
    capacity_factor: float | None = None
    batch_prioritized: bool = True
    expert_dropout: float = 0.0
    output_bias: bool = True
    aux_loss_in_backward: bool = True

    def __init__(self, **fields: Any) -> None:
        own = {name: getattr(type(self), name) for name in SwinV2MoEConfig.__annotations__}
        for name, default in own.items():
            setattr(self, name, fields.pop(name, default))
        stages = len(self.depths)
        if not any(self.pretrained_window_sizes):
            self.pretrained_window_sizes = [0] * stages
        if self.moe_blocks is None:
            self.moe_blocks = default_blocks(self.depths)
        if self.block_style not in STYLES:
            raise ValueError(f"block_style is {self.block_style!r}, wanted one of {', '.join(STYLES)}")
        check_choices(self)
        self.num_layers = stages
        self.hidden_size = self.embed_dim * 2 ** (stages - 1)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, stages + 1))]
        chosen = {name: fields.pop(name, None) for name in ("out_indices", "out_features")}
        self.set_output_features_output_indices(**chosen)
        super().__init__(**fields)

    @classmethod
    def from_dense(cls, dense: Swinv2Config, **experts: Any) -> SwinV2MoEConfig:
        """Return the configuration of a dense Swinv2 with experts; fields of both may be overridden.

        Raises:
            ValueError: a field that these models do not have.
        """
        for name, value in FIXED.items():
            if getattr(dense, name) != value:
                raise ValueError(f"the dense Swinv2 has {name}={getattr(dense, name)!r}, wanted {value!r}")
        carried = {name: getattr(dense, name) for name in CARRIED}
        return cls(**carried | {"out_features": dense.out_features} | experts)

    def settings(self) -> SwinV2Config:
        """Return this in the library's own words, experts included; also called `swin`."""
        return self.swin()

    def swin(self) -> SwinV2Config:
        """Return this in the library's own words, experts included."""
        height, width = self.image_size if isinstance(self.image_size, Sequence) else (self.image_size,) * 2
        return SwinV2Config(
            image_size=(height, width),
            patch_size=self.patch_size,
            in_channels=self.num_channels,
            embed_dim=self.embed_dim,
            depths=tuple(self.depths),
            num_heads=tuple(self.num_heads),
            window_size=self.window_size,
            pretrained_window_sizes=tuple(self.pretrained_window_sizes),
            mlp_ratio=float(self.mlp_ratio),
            qkv_bias=self.qkv_bias,
            drop_path=float(self.drop_path_rate),
            dropout=float(self.hidden_dropout_prob),
            attention_dropout=float(self.attention_probs_dropout_prob),
            init_std=float(self.initializer_range),
            style=STYLES[self.block_style],
            experts=experts_of(self),
        )


def experts_of(config: Any) -> ExpertsConfig:
    """Return the experts that the fields of a configuration describe."""
    order = batch_prioritized if config.batch_prioritized else token_order
    factor = config.capacity_factor
    return ExpertsConfig(
        num_experts=config.num_experts,
        k=config.num_experts_per_tok,
        blocks=tuple(tuple(blocks) for blocks in config.moe_blocks),
        router=GATES[config.router](noise=float(config.router_noise), norm_topk=bool(config.norm_topk_prob)),
        capacity=Dropless() if factor is None else FixedCapacity(float(factor), priority=order),
        losses=(LOSSES[config.router_aux_loss](float(config.router_aux_loss_coef)),),
        dropout=float(config.expert_dropout),
        down_bias=config.output_bias,
    )


def default_blocks(depths: Sequence[int]) -> list[list[int]]:
    """Return every second block of the later half of the stages."""
    later = [2 * stage >= len(depths) for stage in range(len(depths))] if len(depths) > 1 else [True]
    return [list(range(1, n, 2)) if late else [] for n, late in zip(depths, later, strict=True)]


def check_choices(config: Any) -> None:
    """Raise ValueError for a router or a loss that there is not."""
    for name, known in (("router_aux_loss", LOSSES), ("router", GATES)):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}, wanted one of {', '.join(known)}")
