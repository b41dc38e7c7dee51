"""ViTDecoder: draws a whole map from the visible tokens of an image, and from a second view if there is one.

Without cross-attention the decoder of MAE (arXiv 2111.06377), with it that of CroCo (arXiv 2210.10716, 2211.10408):
self-attention, attention to the second view's tokens, feed-forward.

Shape letters: B images, C channels, H W rows and columns of patches, N M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.attention import CrossAttention, SelfAttention
from synchromesh.models.initialize import initialize
from synchromesh.models.mixtures import ExpertsConfig, FeedForwardFactory, feed_forwards, multiply_adds_per_token
from synchromesh.models.pyramid import DropPath, drop_path_rate, pre_norm, run_blocks
from synchromesh.models.vit import Positions, Tokens, ViT, check_heads, token_rotation


@final
@dataclass(frozen=True)
class ViTDecoderConfig:
    """What a decoder is made of.

    Attributes:
        width: of its tokens.
        depth: number of blocks.
        num_heads: attention heads of each.
        mlp_ratio: hidden width of a feed-forward over its width.
        cross: whether blocks attend to a second sequence.
        qkv_bias: whether queries, keys and values have biases.
        positions: how tokens know where they are; learned ones are for the encoder's configured size alone.
        rotary_base: of the slowest turns of rotary positions.
        drop_path: largest stochastic depth rate; it rises linearly from 0 over the blocks.
        checkpointed: whether training recomputes blocks in backward instead of keeping their insides.
        init_std: standard deviation of the first weights.
        norm_eps: of the norms.
        experts: the mixtures of experts in some blocks, which are one stage; none for a dense decoder.
    """

    width: int = 512
    depth: int = 8
    num_heads: int = 16
    mlp_ratio: float = 4.0
    cross: bool = True
    qkv_bias: bool = True
    positions: Positions = Positions.ROTARY
    rotary_base: float = 100.0
    drop_path: float = 0.0
    checkpointed: bool = False
    init_std: float = 0.02
    norm_eps: float = 1e-6
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted an integer >= 1")
        check_heads(self.width, self.num_heads, rotary=self.positions is Positions.ROTARY)

    def build(self, backbone: ViT, *, ffn: FeedForwardFactory | None = None) -> ViTDecoder:
        """Return a decoder of the tokens of a backbone; `ffn` makes its feed-forwards, from (0, block, width)."""
        return ViTDecoder(self, backbone.widths[-1], backbone.config.grid, ffn=ffn)


class CrossBlock(nn.Module):
    """Self-attention, attention to a second sequence, feed-forward: each in a residual branch that begins with a norm.

    Without a second sequence, and in a block that has no attention to it, the second branch is left out.
    """

    def __init__(self, config: ViTDecoderConfig, block: int, *, ffn: nn.Module) -> None:
        super().__init__()
        width, heads, eps, bias = config.width, config.num_heads, config.norm_eps, config.qkv_bias
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads, qkv_bias=bias)
        self.norm2 = nn.LayerNorm(width, eps=eps) if config.cross else None
        self.second_norm = nn.LayerNorm(width, eps=eps) if config.cross else None
        self.cross_attention = CrossAttention(width, heads, qkv_bias=bias) if config.cross else None
        self.norm3 = nn.LayerNorm(width, eps=eps)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path_rate(config.drop_path, (config.depth,), 0, block))

    def forward(
        self,
        x: Float[Tensor, "B N C"],
        rotation: Float[Tensor, "2 *B 1 N d"] | None = None,
        second: Float[Tensor, "B M C"] | None = None,
        second_rotation: Float[Tensor, "2 *B2 1 M d"] | None = None,
    ) -> Float[Tensor, "B N C"]:
        x = pre_norm(x, lambda y: self.attention(y, rotation), self.norm1, self.drop_path)
        attend, norm, second_norm = self.cross_attention, self.norm2, self.second_norm
        if second is not None and attend is not None and norm is not None and second_norm is not None:
            memory = second_norm(second)
            x = pre_norm(x, lambda y: attend(y, memory, rotation, second_rotation), norm, self.drop_path)
        return pre_norm(x, self.ffn, self.norm3, self.drop_path)

    def multiply_adds(self, tokens: int, others: int) -> float:
        """Return those of one sequence that attends to one of `others` tokens, or to none for 0."""
        width = self.attention.proj.in_features
        work = self.attention.multiply_adds(tokens) + tokens * (2 * width + multiply_adds_per_token(self.ffn))
        if self.cross_attention is None or not others:
            return work
        return work + self.cross_attention.multiply_adds(tokens, others) + (tokens + others) * width


@final
class ViTDecoder(nn.Module):
    """Tokens of the visible patches of an image to a map of all.

    Args:
        config: sizes, rates, positions and experts.
        encoder_width: channels of the tokens.
        grid: rows and columns of patches that learned positions are for.
        ffn: makes the feed-forward of each block from (0, block, width), instead of what the config says.
    """

    undecayed = frozenset({"mask_token", "places"})

    def __init__(
        self,
        config: ViTDecoderConfig,
        encoder_width: int,
        grid: tuple[int, int],
        *,
        ffn: FeedForwardFactory | None = None,
    ) -> None:
        super().__init__()
        self.config, self.grid, width = config, grid, config.width
        ffn = ffn or feed_forwards((config.depth,), config.mlp_ratio, experts=config.experts)
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        learned = config.positions is Positions.LEARNED
        self.places = nn.Parameter(torch.zeros(grid[0] * grid[1], width)) if learned else None
        self.blocks = nn.ModuleList(
            CrossBlock(config, block, ffn=ffn(0, block, width)) for block in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights again."""
        initialize(self, self.config.init_std)

    def initialize(self, std: float) -> None:
        for learned in (self.mask_token, self.places):
            if learned is not None:
                nn.init.trunc_normal_(learned, std=std)

    def forward(self, seen: Tokens, second: Tokens | None = None) -> Float[Tensor, "B H W C"]:
        """Return the normalised map of all patches of the image that `seen` is of.

        Args:
            seen: of the image's visible patches, from `ViT.encode`.
            second: of another view of the same scene.

        Raises:
            ValueError: a second view for a decoder without cross-attention, or learned positions for another grid.
        """
        if second is not None and not self.config.cross:
            raise ValueError("there is a second view but the decoder has no cross-attention: build it with cross=True")
        x = self._placed(self._whole(seen), seen)
        rotation = self._rotation(seen, None)
        if second is None:
            x = run_blocks(self.blocks, x, rotation, checkpointed=self._checkpointed)
        else:
            memory, turns = self._placed(self.embed(second.x), second), self._rotation(second, second.places)
            x = run_blocks(self.blocks, x, rotation, memory, turns, checkpointed=self._checkpointed)
        return self.norm(x)[:, seen.class_tokens :].unflatten(1, seen.grid)

    def multiply_adds(self, seen: int, tokens: int, second: int = 0) -> float:
        """Return those for one image.

        Args:
            seen: its tokens that were encoded.
            tokens: all of its tokens.
            second: tokens of the second view, 0 for none.
        """
        work = (seen + second) * self.embed.weight.numel() + tokens * self.config.width
        return work + sum(b.multiply_adds(tokens, second) for b in self.blocks if isinstance(b, CrossBlock))

    @property
    def _checkpointed(self) -> bool:
        return self.config.checkpointed and self.training

    def _whole(self, seen: Tokens) -> Float[Tensor, "B N C"]:
        """Put the visible tokens in their places, and the mask token in all others."""
        x, extra = self.embed(seen.x), seen.class_tokens
        if seen.places is None:
            return x
        count, at = seen.grid[0] * seen.grid[1], seen.places[..., None].expand(-1, -1, x.shape[2])
        empty = self.mask_token.to(x.dtype).expand(len(x), count, -1)
        return torch.cat((x[:, :extra], empty.scatter(1, at, x[:, extra:])), 1)

    def _placed(self, x: Float[Tensor, "B N C"], tokens: Tokens) -> Float[Tensor, "B N C"]:
        """Add learned positions, if there are any."""
        if self.places is None:
            return x
        if tokens.grid != self.grid:
            raise ValueError(
                f"the image has {tokens.grid} patches, wanted {self.grid}, for which positions are learned"
            )
        whole = x.shape[1] - tokens.class_tokens == len(self.places)
        own = self.places if whole or tokens.places is None else self.places[tokens.places]
        return torch.cat((x[:, : tokens.class_tokens], x[:, tokens.class_tokens :] + own), 1)

    def _rotation(self, tokens: Tokens, places: Tensor | None) -> Tensor | None:
        config = self.config
        if config.positions is Positions.LEARNED:
            return None
        head = config.width // config.num_heads
        return token_rotation(tokens.grid, places, tokens.class_tokens, head, config.rotary_base, tokens.x)
