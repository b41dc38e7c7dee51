"""Reading a feed-forward block of any model: which linear layers it is made of, and what lies between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from synchromesh.adapt.linear_layers import LinearLayer, is_linear
from synchromesh.moe.experts import Activation, GatedMLPExperts, MLPExperts, StackedExperts

KNOWN: tuple[Activation, ...] = (F.gelu, F.silu, F.relu, partial(F.gelu, approximate="tanh"))
ROWS = 5  # of the input that a block is tried on
DROPS_UNLIKE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class FeedForwardBlock:
    """A dense block y = down(act(up(x))), or down(act(gate(x)) * up(x)).

    Attributes:
        module: the block.
        up: name of its linear layer to the hidden width F.
        down: name of the one back to the width D.
        gate: name of the one that passes the activation, where there are two to the hidden width.
        activation: elementwise.
        dropout: probability, of the activated hidden rows.
        output_dropout: probability, of what comes out.
    """

    module: nn.Module
    up: str
    down: str
    gate: str | None
    activation: Activation
    dropout: float
    output_dropout: float

    @property
    def width(self) -> int:
        return self.linear(self.up).in_features

    @property
    def hidden(self) -> int:
        return self.linear(self.up).out_features

    @property
    def first(self) -> LinearLayer:
        """The linear layer whose rows say which tokens a hidden unit answers to: that before the activation."""
        return self.linear(self.gate or self.up)

    def linear(self, name: str) -> LinearLayer:
        return LinearLayer(self.module.get_submodule(name))

    def weights(self) -> dict[str, Tensor]:
        """Return the weights as those of one expert, by the names of `StackedExperts`: matrices [F, D], biases."""
        found = {"up": self.linear(self.up).weight, "down": self.linear(self.down).weight.mT}
        biases = {"up_bias": self.linear(self.up).bias, "down_bias": self.linear(self.down).bias}
        if self.gate is not None:
            found["gate"], biases["gate_bias"] = self.linear(self.gate).weight, self.linear(self.gate).bias
        return found | {name: bias for name, bias in biases.items() if bias is not None}

    def experts(self, num_experts: int, hidden: int, *, down_bias: bool) -> StackedExperts:
        """Return experts of the same kind, whose numbers are still to be set, on the block's device and in its dtype.

        Raises:
            ValueError: of a gated block, some linear layers have a bias and others none.
        """
        like, named = self.first.weight, self.weights()
        with torch.device("meta"):
            if self.gate is None:
                made: StackedExperts = MLPExperts(
                    num_experts, self.width, hidden=hidden, activation=self.activation, up_bias="up_bias" in named,
                    down_bias=down_bias, dropout=self.dropout,
                )  # fmt: skip
            else:
                made = GatedMLPExperts(
                    num_experts, self.width, hidden=hidden, activation=self.activation, bias=True, dropout=self.dropout
                )
                for name in ("gate_bias", "up_bias"):
                    if name not in named:
                        setattr(made, name, None)
                if not down_bias:
                    made.down_bias = None
        return made.to_empty(device=like.device).to(like.dtype)

    def skeleton(self) -> nn.Module:
        """Return the block without its numbers, to be filled by `filled`."""
        return copy.deepcopy(self.module).to("meta")

    def filled(self, skeleton: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a copy of a skeleton of this block with these weights, named as in `weights()`."""
        made = copy.deepcopy(skeleton).to_empty(device=weights["up"].device)
        named = {"up": self.up, "down": self.down, **({} if self.gate is None else {"gate": self.gate})}
        with torch.no_grad():
            for kind, path in named.items():
                linear = LinearLayer(made.get_submodule(path))
                linear.weight.copy_(weights[kind].mT if kind == "down" else weights[kind])
                if linear.bias is not None:
                    linear.bias.copy_(weights[f"{kind}_bias"])
        return made.to(weights["up"].dtype)


def read_feed_forward(module: nn.Module, name: str = "") -> FeedForwardBlock:
    """Return what a module is made of, if it is a feed-forward block; it is tried out, with other numbers.

    Args:
        module: with two linear layers in it, or three where one gates; what else is in it has no parameters.
        name: for errors.

    Raises:
        ValueError: it is no such block: another number of linear layers, a convolution or a norm between them, a
            forward that wants more than rows.
    """
    linears = {path: LinearLayer(part) for path, part in module.named_modules() if is_linear(part)}
    what = f"{name or 'the block'} ({type(module).__name__})"
    if any(parametrize.is_parametrized(linear.module) for linear in linears.values()):
        raise ValueError(
            f"{what} is masked or adapted already, wanted plain weights: densify, merge or undo that first"
        )
    pairs = list(_arranged(linears))
    if not pairs:
        sizes = [f"{path} {part.in_features} to {part.out_features}" for path, part in linears.items()]
        raise ValueError(
            f"{what} is no feed-forward block: got the linear layers {sizes}, wanted one to a hidden width and one "
            "back, or two there where one gates: select the block itself, such as `mlp`, not a layer around it; where "
            "these are neighbours in a model, as in BERT, `join_feed_forwards` makes one module of them"
        )
    own = {id(p) for part in linears.values() for p in part.module.parameters()}
    unlike = [
        f"{path} ({type(part).__name__})" for path, part in module.named_modules() if isinstance(part, DROPS_UNLIKE)
    ]
    if unlike:
        raise ValueError(f"{what} cannot be read: got the dropout {unlike[0]}, wanted `nn.Dropout`, as experts have")
    others = [path for path, parameter in module.named_parameters() if id(parameter) not in own]
    if others:
        raise ValueError(f"{what} cannot be read: got other parameters in it, {', '.join(others[:4])}, wanted none")
    trial, x = _trial(module)
    got = _tried(trial, x, what)
    for up, down, gate in pairs:
        for activation in (*KNOWN, *_callables(module)):
            found = FeedForwardBlock(module, up, down, gate, activation, *_dropouts(module, down))
            if _agree(got, _computed(trial, found, x)):
                return found
    raise ValueError(
        f"{what} cannot be read: its output is not down(act(up(x))), nor down(act(gate(x)) * up(x)), with an "
        "activation that is known or one of its own: what else it does would be lost"
    )


def _arranged(linears: Mapping[str, LinearLayer]) -> Iterator[tuple[str, str, str | None]]:
    """Yield the ways, (up, down, gate), in which linear layers can be a block."""
    names = list(linears)
    shape = {name: (part.in_features, part.out_features) for name, part in linears.items()}
    if len(names) not in (2, 3):
        return
    for down in reversed(names):
        firsts = [name for name in names if name != down]
        if all(shape[name] == shape[down][::-1] for name in firsts):
            if len(firsts) == 1:
                yield firsts[0], down, None
            else:
                yield firsts[1], down, firsts[0]
                yield firsts[0], down, firsts[1]


def _trial(module: nn.Module) -> tuple[nn.Module, Tensor]:
    """Return a copy with random numbers, so that no zero hides anything, and an input for it."""
    trial = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(
                spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
            )
    width = next(LinearLayer(part) for part in trial.modules() if is_linear(part)).in_features
    return trial, torch.randn(ROWS, width, generator=generator, dtype=torch.float64, device="cpu")


def _tried(trial: nn.Module, x: Float[Tensor, "R D"], what: str) -> Tensor:
    try:
        with torch.no_grad():
            got = trial(x)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError) as error:
        raise ValueError(f"{what} cannot be read: called with {ROWS} rows of its width it raised: {error}") from error
    if not isinstance(got, Tensor) or got.shape != x.shape:
        raise ValueError(f"{what} cannot be read: wanted rows of its width back, got {type(got).__name__}")
    return got


def _computed(trial: nn.Module, block: FeedForwardBlock, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            up, first = trial.get_submodule(block.up)(x), trial.get_submodule(block.gate or block.up)(x)
            hidden = block.activation(first.clone())  # some write in place
            if not _is_elementwise(block.activation, first, hidden):
                return None
            return trial.get_submodule(block.down)(hidden * up if block.gate else hidden)
    except (TypeError, ValueError, RuntimeError, IndexError):  # one of the block's callables that is no activation
        return None


def _is_elementwise(activation: Callable[[Tensor], Tensor], x: Float[Tensor, "R F"], y: Tensor) -> bool:
    """Tell whether hidden units are computed one by one: those of an expert are then what they were in the block."""
    turned, first = activation(x.flip(1)), activation(x[:, :1].clone())
    return y.shape == x.shape and torch.allclose(turned, y.flip(1)) and torch.allclose(first, y[:, :1])


def _agree(got: Tensor, wanted: Tensor | None) -> bool:
    return wanted is not None and wanted.shape == got.shape and torch.allclose(got, wanted, rtol=1e-9, atol=1e-9)


def _callables(module: nn.Module) -> list[Any]:
    """Return what of a block may be its activation."""
    parts = [part for part in module.modules() if part is not module and not list(part.parameters())]
    own = [value for value in vars(module).values() if callable(value) and not isinstance(value, type)]
    return [part for part in parts if not isinstance(part, nn.Dropout)] + own


def _dropouts(module: nn.Module, down: str) -> tuple[float, float]:
    """Return the probabilities before and after the last linear layer, by the order in which these were registered."""
    before, after, passed = 0.0, 0.0, False
    for path, part in module.named_modules():
        passed = passed or path == down
        if isinstance(part, nn.Dropout):
            before, after = (before, max(after, part.p)) if passed else (max(before, part.p), after)
    return before, after
