"""Tutel's experts, as parts of this library's identical layout: rank i owns part i of E * F hidden rows for ever.

Their parameters carry Tutel's names, shapes and first numbers, and are born cut. Tutel sums the gradients of an expert
over the ranks' losses where this library takes the mean; the parts make up for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from synchromesh.experts import Activation, Cut, Experts
from synchromesh.kernels import Kernels, MLPWeights
from synchromesh.types import Routing, RowMap


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer.

    Attributes:
        model_dim: D. num_experts: E. cut: this rank's of all ranks.
    """

    model_dim: int
    num_experts: int
    cut: Cut

    @property
    def local_experts(self) -> int:
        return max(1, self.num_experts // self.cut.count)

    @property
    def sharded_count(self) -> int:
        return max(1, self.cut.count // self.num_experts)


class TutelExperts(Experts):
    """Experts that are created as one rank's share.

    Attributes:
        splits: whether a part of an expert computes a part of its output; else experts are pooled whole.
        output_dim: width of what they return; rows are as wide as the wider of model_dim and output_dim, with zeros.
    """

    splits: bool = True
    output_dim: int

    def __init__(self, share: Share, output_dim: int | None = None) -> None:
        super().__init__()
        self.share, self.num_experts, self.cut = share, share.num_experts, share.cut
        self.model_dim, self.sharded_count = share.model_dim, share.sharded_count
        self.output_dim = output_dim or share.model_dim
        self.width = max(self.model_dim, self.output_dim)

    def hold(self, cut: Cut) -> None:
        if cut != self.cut:
            raise ValueError(f"got {cut}, these experts were created as {self.cut}: build the layer in its group")

    def fused(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "T D"] | None:
        return None

    def _summed(self, part: Tensor) -> Tensor:
        """Return a view of a parameter whose gradient is the sum over ranks, given their mean."""
        part = part.view(part.shape)
        if self.cut.count > 1 and part.requires_grad:
            part.register_hook(lambda grad: grad * self.cut.count)
        return part


class FFNExperts(TutelExperts):
    """y = act(x W1^T + b1) W2 + b2: Tutel's type 'ffn'.

    Parameters, of L local experts in s shards: `batched_fc1_w [L F/s D]`, `batched_fc2_w [L F/s O]`,
    `batched_fc1_bias [L F/s]`, `batched_fc2_bias [L ceil(O/s)]`, drawn as L pairs of nn.Linear of these sizes.

    Args:
        hidden_size_per_expert: F. activation_fn: relu unless given; it sees rows [R F], without padding.
        activation_fn_with_self: (rows, experts) -> rows, in its place. output_dim: O, D unless given.
        has_fc1_bias, has_fc2_bias: whether to have them. skip: return the rows as they came.

    Raises:
        ValueError: the shards do not divide F, or both activations are given.
    """

    output_parts = frozenset({"down_bias"})

    def __init__(
        self,
        share: Share,
        *,
        hidden_size_per_expert: int,
        activation_fn: Activation | None = None,
        activation_fn_with_self: Callable[[Tensor, FFNExperts], Tensor] | None = None,
        output_dim: int | None = None,
        has_fc1_bias: bool = True,
        has_fc2_bias: bool = True,
        skip: bool = False,
    ) -> None:
        super().__init__(share, output_dim)
        if hidden_size_per_expert % self.sharded_count:
            raise ValueError(
                f"hidden_size_per_expert is {hidden_size_per_expert}, wanted a multiple of the {self.sharded_count} "
                "ranks that share an expert"
            )
        if activation_fn is not None and activation_fn_with_self is not None:
            raise ValueError("experts hold activation_fn and activation_fn_with_self, wanted one of them")
        self.hidden, self.skip = hidden_size_per_expert, skip
        self.hidden_size_per_expert, self.hidden_size = hidden_size_per_expert, hidden_size_per_expert // self.sharded_count
        self._own, self._with_self = activation_fn or F.relu, activation_fn_with_self
        local, biases = share.local_experts, -(-self.output_dim // self.sharded_count)
        self.batched_fc1_w = nn.Parameter(torch.empty(local, self.hidden_size, self.model_dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(local, self.hidden_size, self.output_dim))
        self.batched_fc1_bias = nn.Parameter(torch.empty(local, self.hidden_size)) if has_fc1_bias else None
        self.batched_fc2_bias = nn.Parameter(torch.empty(local, biases)) if has_fc2_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each local expert, or shard of one, as two nn.Linear."""
        first, second = self.batched_fc1_bias, self.batched_fc2_bias
        with torch.no_grad():
            for expert in range(self.share.local_experts):
                fc1 = nn.Linear(self.model_dim, self.hidden_size, bias=first is not None)
                fc2 = nn.Linear(self.hidden_size, self.output_dim, bias=second is not None)
                self.batched_fc1_w[expert] = fc1.weight
                self.batched_fc2_w[expert] = fc2.weight.t()
                if first is not None:
                    first[expert] = fc1.bias
                if second is not None:
                    second[expert] = fc2.bias[: second.shape[1]]

    @property
    def vectors(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        sizes = {"up_bias": self.hidden, "down_bias": self.output_dim}
        return tuple(size for name, size in sizes.items() if name in self._named())

    def parts(self) -> dict[str, Tensor]:
        return {name: self._summed(parameter.flatten(0, 1)) for name, parameter in self._named().items()}

    def activation_fn(self, rows: Tensor) -> Tensor:
        """Activate hidden rows."""
        return self._own(rows) if self._with_self is None else self._with_self(rows, self)

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        if self.skip:
            return rows
        rows = rows[:, : self.model_dim].contiguous()
        hidden = self.activation_fn(kernels.grouped_mm(rows, weights["up"].mT, ends, weights.get("up_bias")))
        out = kernels.grouped_mm(hidden, weights["down"], ends, self._whole(weights).get("down_bias"))
        return F.pad(out, (0, self.width - self.output_dim))

    def fused(
        self, x: Float[Tensor, "T D"], routing: Routing, rowmap: RowMap, weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "T D"] | None:
        if self.skip or self._with_self is not None or self.model_dim != self.output_dim or not kernels.fuses(self._own):
            return None
        return kernels.fused_mlp(x, routing.weights, rowmap, MLPWeights(**self._whole(weights)), self._own)

    def _named(self) -> dict[str, nn.Parameter]:
        named = {
            "up": self.batched_fc1_w,
            "down": self.batched_fc2_w,
            "up_bias": self.batched_fc1_bias,
            "down_bias": self.batched_fc2_bias,
        }
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    def _whole(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cut what s shards of ceil(O/s) numbers hold beyond O."""
        bias = weights.get("down_bias")
        if bias is None or bias.shape[1] == self.output_dim:
            return dict(weights)
        return {**weights, "down_bias": bias[:, : self.output_dim].contiguous()}


class LlamaExperts(TutelExperts):
    """y = (act(x W1) * (x W2)) W3: Tutel's type 'llama_ffn'.

    Parameters: `W_fc1`, `W_fc2` ([L D F], cut into s flat pieces), `W_fc3` ([L F D], so too). Such a piece is no set of
    hidden rows, so an expert is always pooled whole.

    Args:
        hidden_size_per_expert: F. activation_fn: silu unless given.
    """

    matrices, splits = 3, False

    def __init__(self, share: Share, *, hidden_size_per_expert: int, activation_fn: Activation = F.silu) -> None:
        super().__init__(share)
        self.hidden, self.activation_fn = hidden_size_per_expert, activation_fn
        numbers = -(-share.local_experts * share.model_dim * hidden_size_per_expert // share.sharded_count)
        self.W_fc1 = nn.Parameter(torch.empty(numbers))
        self.W_fc2 = nn.Parameter(torch.empty(numbers))
        self.W_fc3 = nn.Parameter(torch.empty(numbers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all numbers from N(0, 0.01²)."""
        for parameter in (self.W_fc1, self.W_fc2, self.W_fc3):
            nn.init.normal_(parameter, 0, 0.01)

    def parts(self) -> dict[str, Tensor]:
        return {name: self._summed(p) for name, p in (("gate", self.W_fc1), ("up", self.W_fc2), ("down", self.W_fc3))}

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        gate, up, down = (weights[name][:, : self.model_dim * self.hidden] for name in ("gate", "up", "down"))
        shape = (self.model_dim, self.hidden)
        opened = self.activation_fn(kernels.grouped_mm(rows, gate.unflatten(1, shape), ends))
        hidden = opened * kernels.grouped_mm(rows, up.unflatten(1, shape), ends)
        return kernels.grouped_mm(hidden, down.unflatten(1, shape[::-1]), ends)


class CustomExperts(TutelExperts):
    """A module of the user's, called with its rows padded: [L, C, D] to [L, C, O]. It gathers its shards by itself.

    Args:
        call: padded rows of the experts at hand -> what the module makes of them.
        output_dim: O, where it is not D.
    """

    anchor: Tensor

    def __init__(self, share: Share, call: Callable[[Tensor], Tensor], output_dim: int | None = None) -> None:
        super().__init__(share, output_dim)
        self._call = call
        self.register_buffer("anchor", torch.zeros(share.local_experts), persistent=False)

    def parts(self) -> dict[str, Tensor]:
        return {"anchor": self.anchor}  # nothing else is pooled

    def compute(
        self, rows: Float[Tensor, "R D"], ends: Int[Tensor, " L"], weights: Mapping[str, Tensor], kernels: Kernels
    ) -> Float[Tensor, "R D"]:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        *groups, tail = rows[:, : self.model_dim].split([*sizes, len(rows) - sum(sizes)])
        padded = F.pad(pad_sequence(groups, batch_first=True), (0, 0, 0, int(max(sizes) == 0)))
        out = self._call(padded)
        wanted = (*padded.shape[:2], self.output_dim)
        if out.shape != wanted:
            raise ValueError(
                f"custom experts returned {tuple(out.shape)} for rows {tuple(padded.shape)}, wanted {wanted}; "
                "experts of another output width say so in an attribute output_dim"
            )
        out = torch.cat([*(one[:size] for one, size in zip(out, sizes, strict=True)), out.new_zeros(len(tail), out.shape[2])])
        return F.pad(out, (0, self.width - self.output_dim))


def build_experts(settings: Mapping[str, Any], share: Share, *, skip: bool = False) -> nn.Module:
    """Build the experts of a layer: of this file, or the user's module.

    Args:
        settings: as `moe_layer` takes them, without their number. skip: of ffn experts.

    Raises:
        ValueError: an unknown type, or settings that its experts do not know.
    """
    kind, rest = settings.get("type"), {name: value for name, value in settings.items() if name != "type"}
    if kind == "custom":
        return _custom(rest, share)
    kinds: dict[Any, Callable[..., nn.Module]] = {"ffn": FFNExperts, "llama_ffn": LlamaExperts}
    if kind not in kinds:
        raise ValueError(f"experts are of type {kind!r}, wanted 'ffn', 'llama_ffn', or 'custom' with a 'module'")
    known = [name for name in inspect.signature(kinds[kind]).parameters if name not in ("share", "skip")]
    unknown = sorted(set(rest) - set(known))
    if unknown or "hidden_size_per_expert" not in rest:
        raise ValueError(f"experts of type {kind!r} got {sorted(rest)}, wanted hidden_size_per_expert and any of {known}")
    return kinds[kind](share, **rest, **({"skip": skip} if kind == "ffn" else {}))


def _custom(settings: dict[str, Any], share: Share) -> nn.Module:
    module = settings.pop("module", None)
    if not callable(module):
        raise ValueError(f"custom experts got module={module!r}, wanted a class of torch.nn.Module")
    taken = inspect.signature(module).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    number = "local_experts" if "local_experts" in taken and "num_experts_per_device" not in taken else "num_experts_per_device"
    if number not in taken and not anything:
        raise ValueError(f"{module!r} takes no num_experts_per_device, wanted model_dim, num_experts_per_device and sharded_count")
    built = module(
        **settings, model_dim=share.model_dim, sharded_count=share.sharded_count, **{number: share.local_experts}
    )
    if not isinstance(built, nn.Module):
        raise ValueError(f"custom experts are a {type(built).__name__}, wanted a torch.nn.Module")
    return built
