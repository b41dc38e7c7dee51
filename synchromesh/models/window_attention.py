"""Self-attention inside the windows of a map, with a position bias that is a function of the offset (arXiv 2111.09883).

Shape letters: B images, C channels, H W rows and columns, G windows of a map, N positions of a window, W windows of all
images, h heads, d width of a head, M offsets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from synchromesh.models.cosine_attention import cosine_attention
from synchromesh.models.known import Known, known_here
from synchromesh.models.linear import apply, linear
from synchromesh.torch_private import transformed

MASKED = -200.0  # added to the score of a pair from two image regions; transformers adds -100 twice
MAX_LOG_SCALE = math.log(100.0)  # of cosine attention
BIAS_HIDDEN = 512  # hidden width of the position bias MLP


def pad_map(x: Float[Tensor, "B H W C"], multiple: int) -> Float[Tensor, "B H2 W2 C"]:
    """Append zero rows and columns until both sides are multiples; the same tensor where they are."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def to_windows(x: Float[Tensor, "B H W C"], side: int) -> Float[Tensor, "B G N C"]:
    """Cut a map into square windows, row by row; one window that covers the map is a view."""
    B, H, W, C = x.shape
    tiles = x.reshape(B, H // side, side, W // side, side, C).transpose(2, 3)
    return tiles.reshape(B, (H // side) * (W // side), side * side, C)


def from_windows(x: Float[Tensor, "B G N C"], height: int, width: int) -> Float[Tensor, "B H W C"]:
    """Put windows back; the inverse of `to_windows`."""
    B, _, N, C = x.shape
    side = math.isqrt(N)
    tiles = x.reshape(B, height // side, width // side, side, side, C).transpose(2, 3)
    return tiles.reshape(B, height, width, C)


def shift_mask(height: int, width: int, side: int, shift: int) -> Float[Tensor, "G N N"]:
    """Score to add so that a shifted window attends only inside one region of the image: 0 or `MASKED`."""
    # After the roll by `shift` the last window along each side holds positions from both ends of the image. That makes
    # three bands along each side, of which the last window holds two, and nine regions: 3 * row band + column band.
    region = torch.zeros(1, height, width, 1)
    for weight, length, dim in ((3.0, height, 1), (1.0, width, 2)):
        place = torch.arange(length)
        band = (place >= length - side).float() + (place >= length - shift).float()
        region += weight * band.view([-1 if d == dim else 1 for d in range(4)])
    region_GN = to_windows(region, side)[0, :, :, 0]
    return (region_GN[:, :, None] != region_GN[:, None, :]).float() * MASKED


def relative_coordinates(side: int, pretrained: int) -> Float[Tensor, "M 2"]:
    """Log-spaced offsets of pairs of a window: sign(o) log2(1 + 8 |o| / (P - 1)) / 3, P the side in pre-training."""
    offsets = torch.arange(1 - side, side, dtype=torch.float32) / max(1, (pretrained or side) - 1) * 8.0
    spaced = offsets.sign() * torch.log2(offsets.abs() + 1.0) / math.log2(8.0)
    return torch.cartesian_prod(spaced, spaced)


def relative_index(side: int) -> Int[Tensor, " NN"]:
    """Row of `relative_coordinates` for each pair of positions of a window."""
    # Offsets run from 1 - side to side - 1; moved to begin at 0, a pair (dy, dx) is row dy * (2 side - 1) + dx.
    place = torch.arange(side)
    offset = place[:, None] - place[None, :] + side - 1
    return (offset[:, None, :, None] * (2 * side - 1) + offset[None, :, None, :]).reshape(-1)


class CosineAttention(nn.Module):
    """Scaled cosine attention: softmax(s cos(q, k) + bias) v, with s <= 100 learned per head (section 3.2)."""

    undecayed = frozenset({"log_scale"})

    def __init__(self, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.log_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_scale, math.log(10.0))

    def initialize(self, std: float) -> None:
        self.reset_parameters()

    def forward(
        self, qkv: Float[Tensor, "W N QKV"], bias: Float[Tensor, "G h N N"], dropout: float
    ) -> Float[Tensor, "W N C"]:
        scale = self.log_scale.clamp(max=MAX_LOG_SCALE).exp()
        by_hand = qkv.device.type == "cpu" and dropout == 0.0 and not torch.compiler.is_compiling()
        if by_hand and not transformed():
            return cosine_attention(qkv, scale.flatten(), bias)
        q, k, v = _heads(qkv, self.num_heads)
        # Scale and norms go into the narrow q and k, not into the wide scores.
        q, k = q * (scale / _norm(q)).to(q.dtype), k * _norm(k).reciprocal().to(k.dtype)
        return attend(q, k, v, bias, dropout)


class DotAttention(nn.Module):
    """Scaled dot-product attention: softmax(q.k / sqrt(d) + bias) v."""

    def __init__(self, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, head_width**-0.5

    def forward(
        self, qkv: Float[Tensor, "W N QKV"], bias: Float[Tensor, "G h N N"], dropout: float
    ) -> Float[Tensor, "W N C"]:
        q, k, v = _heads(qkv, self.num_heads)
        return attend(q * self.scale, k, v, bias, dropout)


def attend(
    q: Float[Tensor, "W h N d"],
    k: Float[Tensor, "W h N d"],
    v: Float[Tensor, "W h N d"],
    bias: Float[Tensor, "G h N N"],
    dropout: float,
) -> Float[Tensor, "W N C"]:
    """Return softmax(q k^T + bias) v, heads side by side; bias is one for all windows (G = 1) or one per window."""
    # No fused kernel of a CPU has a gradient for the bias, and none of any device has a forward-mode derivative.
    if transformed() or (q.device.type == "cpu" and torch.is_grad_enabled()):
        scores = (q @ k.mT).unflatten(0, (-1, bias.shape[0])) + bias
        weights = F.dropout(scores.softmax(-1), dropout, dropout > 0).flatten(0, 1)
        y = weights.to(v.dtype) @ v
    else:
        repeats = 1 if bias.shape[0] == 1 else q.shape[0] // bias.shape[0]
        mask = bias.to(q.dtype).repeat(repeats, 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=1.0)
    return y.transpose(1, 2).flatten(2)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


class PositionBias(nn.Module):
    """Maps the offset of two positions of a window to one score per head: squash(MLP(log-spaced offset)) (section 3.3).

    Args:
        side: of a window, positions.
        pretrained: side of a window in pre-training, 0 for the same as now.
        num_heads: h.
        squash: applied to the MLP's output.
    """

    undecayed = frozenset({"mlp"})

    def __init__(self, side: int, pretrained: int, num_heads: int, *, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.side, self.pretrained, self.squash = side, pretrained, squash
        self.mlp = nn.Sequential(nn.Linear(2, BIAS_HIDDEN), nn.ReLU(), nn.Linear(BIAS_HIDDEN, num_heads, bias=False))
        self.coordinates = nn.Buffer(torch.empty((2 * side - 1) ** 2, 2), persistent=False)
        self.index = nn.Buffer(torch.empty(side**4, dtype=torch.int64), persistent=False)
        self._known = Known()
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Compute what does not depend on weights (again, after `to_empty`)."""
        self._known.forget()
        self.coordinates.copy_(relative_coordinates(self.side, self.pretrained))
        self.index.copy_(relative_index(self.side))

    def forward(self) -> Float[Tensor, "h N N"]:
        """Return the scores; in inference on a CPU, those of the call before while weights hold the same numbers."""
        of = [*self.mlp.parameters(), self.coordinates]
        if self.training or torch.is_grad_enabled() or not known_here(of):
            return self._scores()
        return self._known.value(self._scores, of)

    def _scores(self) -> Float[Tensor, "h N N"]:
        table_hM = self.squash(self.mlp(self.coordinates)).t()
        return table_hM.index_select(1, self.index).view(-1, self.side**2, self.side**2)


def bounded(x: Tensor) -> Tensor:
    """Squash a position bias into (0, 16), as SwinV2 does."""
    return 16.0 * torch.sigmoid(x)


def unbounded(x: Tensor) -> Tensor:
    """Take a position bias as it is."""
    return x


@dataclass(frozen=True)
class AttentionConfig:
    """What window attention is made of.

    Attributes:
        width: C, channels.
        num_heads: h.
        window: side of a window, positions.
        pretrained_window: side of a window in pre-training, 0 for the same as now.
        kernel: (num_heads, head_width) -> module from (qkv, bias, dropout) to heads side by side.
        squash: applied to the position bias.
        qkv_bias: whether queries and values have a bias.
        key_bias: whether keys have a bias too, where queries and values have one.
        dropout: on attention weights and output.
    """

    width: int
    num_heads: int
    window: int
    pretrained_window: int
    kernel: Callable[[int, int], nn.Module]
    squash: Callable[[Tensor], Tensor]
    qkv_bias: bool = True
    key_bias: bool = False
    dropout: float = 0.0


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with position bias."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        width, self.dropout = config.width, config.dropout
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias and config.key_bias)
        separate = config.qkv_bias and not config.key_bias
        self.q_bias = nn.Parameter(torch.zeros(width)) if separate else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if separate else None
        self.kernel = config.kernel(config.num_heads, width // config.num_heads)
        self.position_bias = PositionBias(
            config.window, config.pretrained_window, config.num_heads, squash=config.squash
        )
        self.proj = nn.Linear(width, width)

    def initialize(self, std: float) -> None:
        if self.q_bias is not None and self.v_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def forward(self, x: Float[Tensor, "B G N C"], mask: Float[Tensor, "G N N"] | None) -> Float[Tensor, "B G N _"]:
        B, G, N, C = x.shape
        qkv = linear(x, self.qkv.weight, self._bias()).view(B * G, N, 3 * C)
        bias = self.position_bias()[None]  # [1, h, N, N]; with a mask one for each window
        bias = bias if mask is None else bias + mask[:, None]
        rate = self.dropout if self.training else 0.0
        return F.dropout(apply(self.proj, self.kernel(qkv, bias, rate).view(B, G, N, C)), rate, self.training)

    def _bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
