"""Polyhistor: one frozen backbone for several dense tasks, by adapters that hypernetworks emit (arXiv 2210.03265).

After attention and after the feed-forward of each block stands an adapter of each task, y + up(gelu(down(y))), whose
matrices are no parameters of their own: a hypernetwork makes them of a learned vector of the task and one of the place.

    Polyhistor       down = P Q of a low rank; the hypernetwork of a width emits P and Q, not the matrix
    Polyhistor-Lite  down = K ⊗ (P Q): one hypernetwork emits a small template of each task, and each layer has a kernel
                     K that enlarges it to its width and that all tasks share; the Kronecker product is never built

Tasks see the images one beside another in the batch, each with its adapters: as many passes as tasks.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh import seeds
from synchromesh.adapt.adaptation import Adapted
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.kronecker import kronecker_product
from synchromesh.adapt.task_trunk import TaskTrunk, blocks_of
from synchromesh.errors import at_least

PLACES = (("attention", "mixer"), ("ffn",))  # of a block, after which adapters stand; one of the names


@dataclass(frozen=True)
class Sizes:
    """Numbers of hypernetworks.

    Attributes:
        embedding: of the vectors of tasks and places.
        rank: of the matrices of adapters.
        ratio: width of a layer over the inner width of its adapters.
    """

    embedding: int = 64
    rank: int = 4
    ratio: int = 8

    def __post_init__(self) -> None:
        at_least("", self, embedding=1, rank=1, ratio=1)

    def inner(self, width: int, name: str) -> int:
        """Return the inner width of an adapter. Raises ValueError where the ratio does not divide the width."""
        if width % self.ratio:
            raise ValueError(f"{name} has width {width}, wanted a multiple of the ratio {self.ratio}")
        return width // self.ratio


class _Emitting(ModuleFactory):
    """What both kinds share."""

    tasks: tuple[str, ...]
    sizes: Sizes
    also: tuple[str, ...]
    seed: int

    def __call__(self, name: str, module: nn.Module) -> AdaptedTrunk:
        return AdaptedTrunk(module, self)

    @abstractmethod
    def matrices(self, widths: Sequence[int], generator: torch.Generator | None) -> Matrices:
        """Return what makes the matrices of adapters after layers of these widths."""

    @abstractmethod
    def parameters(self, widths: Sequence[int]) -> int:
        """Count the numbers that learn of adapters after layers of these widths, by formula."""


@final
@dataclass(frozen=True)
class Polyhistor(_Emitting):
    """Makes of a backbone a frozen one with adapters of each task, emitted by decomposed hypernetworks.

    For L layers with adapters, T tasks, embedding e, rank r and S different widths d of inner width h, there learn
    e (T + L) + sum over widths of 2 e r (d + h) numbers.

    Attributes:
        tasks: names of the tasks.
        sizes: of hypernetworks and adapters; the paper's are unknown to us.
        also: patterns of the names, in the backbone, of further parameters that learn.
        seed: of first numbers.
    """

    tasks: tuple[str, ...] = ("semantic", "saliency", "edges", "offsets")
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    also: tuple[str, ...] = ()
    seed: int = 0

    def matrices(self, widths: Sequence[int], generator: torch.Generator | None) -> Matrices:
        return ByWidth(self.tasks, widths, self.sizes, generator)

    def parameters(self, widths: Sequence[int]) -> int:
        size = self.sizes
        maps = sum(2 * size.embedding * size.rank * (d + size.inner(d, "a layer")) for d in set(widths))
        return size.embedding * (len(self.tasks) + len(widths)) + maps


@final
@dataclass(frozen=True)
class PolyhistorLite(_Emitting):
    """The same by one hypernetwork for templates of the smallest width d, and kernels that each layer has.

    For L layers of widths m d with adapters, T tasks, embedding e, rank r and inner width h, there learn
    e (T + 2) + 2 e r (d + h) + sum over layers of 2 m² numbers.

    Attributes:
        tasks: names of the tasks.
        sizes: of hypernetworks and adapters; the paper's are unknown to us.
        also: patterns of the names, in the backbone, of further parameters that learn.
        seed: of first numbers.
    """

    tasks: tuple[str, ...] = ("semantic", "saliency", "edges", "offsets")
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    also: tuple[str, ...] = ()
    seed: int = 0

    def matrices(self, widths: Sequence[int], generator: torch.Generator | None) -> Matrices:
        return ByTemplate(self.tasks, widths, self.sizes, generator)

    def parameters(self, widths: Sequence[int]) -> int:
        size, least = self.sizes, min(widths)
        maps = 2 * size.embedding * size.rank * (least + size.inner(least, "a layer"))
        return size.embedding * (len(self.tasks) + 2) + maps + sum(2 * (d // least) ** 2 for d in widths)


class Emitter(nn.Module):
    """A hypernetwork that emits two matrices of low rank: down [D, H] and up [H, D], which is zero at first.

    Four linear maps of an embedding e emit the factors, with 2 e r (D + H) numbers in all.
    """

    def __init__(self, width: int, inner: int, sizes: Sizes, draw: Draw) -> None:
        super().__init__()
        self.rank = sizes.rank
        self.maps = nn.ParameterDict(
            {
                "down_rows": draw(sizes.embedding, width * sizes.rank, std=width**-0.5),
                "down_columns": draw(sizes.embedding, sizes.rank * inner, std=sizes.rank**-0.5),
                "up_rows": nn.Parameter(torch.zeros(sizes.embedding, inner * sizes.rank)),
                "up_columns": draw(sizes.embedding, sizes.rank * width, std=sizes.rank**-0.5),
            }
        )

    def forward(self, embedding: Float[Tensor, "T e"]) -> tuple[Float[Tensor, "T D H"], Float[Tensor, "T H D"]]:
        made = {name: embedding @ each for name, each in self.maps.items()}
        down = made["down_rows"].unflatten(1, (-1, self.rank)) @ made["down_columns"].unflatten(1, (self.rank, -1))
        up = made["up_rows"].unflatten(1, (-1, self.rank)) @ made["up_columns"].unflatten(1, (self.rank, -1))
        return down, up


class Draw:
    """Draws first numbers: normal, of mean 0; none where there is no generator, as on the meta device."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def __call__(self, *shape: int, std: float = 1.0) -> nn.Parameter:
        if self.generator is None:
            return nn.Parameter(torch.empty(*shape))
        return nn.Parameter(torch.randn(*shape, generator=self.generator) * std)


class Matrices(nn.Module):
    """Makes what the adapter of each place does to rows of all tasks.

    Attributes:
        of_tasks: a vector of each task, by name.
        of_places: a vector of each place.
    """

    def __init__(self, tasks: Sequence[str], places: int, sizes: Sizes, draw: Draw) -> None:
        super().__init__()
        # A sum of two vectors, over the root of their length, so that emitted numbers are as large as the maps say.
        std = (2 * sizes.embedding) ** -0.5
        self.of_tasks = nn.ParameterDict({task: draw(sizes.embedding, std=std) for task in tasks})
        self.of_places = draw(places, sizes.embedding, std=std)

    def embeddings(self, place: int) -> Float[Tensor, "T e"]:
        return torch.stack(list(self.of_tasks.values())) + self.of_places[place]

    @abstractmethod
    def adapted(self, rows: Float[Tensor, "T *_ D"], place: int) -> Float[Tensor, "T *_ D"]:
        """Return up(gelu(down(rows))) of each task's rows, at a place."""


@final
class ByWidth(Matrices):
    """Polyhistor: a hypernetwork for each width; every place has a vector of its own."""

    def __init__(
        self, tasks: Sequence[str], widths: Sequence[int], sizes: Sizes, generator: torch.Generator | None
    ) -> None:
        draw = Draw(generator)
        super().__init__(tasks, len(widths), sizes, draw)
        self.widths = tuple(widths)
        self.emitters = nn.ModuleDict(
            {str(d): Emitter(d, sizes.inner(d, "a layer"), sizes, draw) for d in sorted(set(widths))}
        )

    def adapted(self, rows: Float[Tensor, "T *_ D"], place: int) -> Float[Tensor, "T *_ D"]:
        down, up = self.emitters[str(self.widths[place])](self.embeddings(place))
        flat = rows.flatten(1, -2)
        return (F.gelu(flat @ down.to(rows.dtype)) @ up.to(rows.dtype)).view_as(rows)


@final
class ByTemplate(Matrices):
    """Polyhistor-Lite: one hypernetwork; templates differ after attention and after feed-forwards, and by task."""

    def __init__(
        self, tasks: Sequence[str], widths: Sequence[int], sizes: Sizes, generator: torch.Generator | None
    ) -> None:
        draw, least = Draw(generator), min(widths)
        super().__init__(tasks, len(PLACES), sizes, draw)
        odd = [d for d in widths if d % least]
        if odd:
            raise ValueError(f"got layers of width {odd[0]}, wanted multiples of the smallest one, {least}")
        self.emitter = Emitter(least, sizes.inner(least, "the first stage"), sizes, draw)
        ratios = [d // least for d in widths]
        self.kernels = nn.ParameterDict(
            {f"{kind}_{place}": draw(m, m, std=m**-0.5) for place, m in enumerate(ratios) for kind in ("down", "up")}
        )

    def adapted(self, rows: Float[Tensor, "T *_ D"], place: int) -> Float[Tensor, "T *_ D"]:
        down, up = (each.to(rows.dtype) for each in self.emitter(self.embeddings(place % len(PLACES))))
        flat = rows.flatten(1, -2)
        inner = F.gelu(kronecker_product(flat, self.kernels[f"down_{place}"].to(rows.dtype), down))
        return kronecker_product(inner, self.kernels[f"up_{place}"].to(rows.dtype), up).view_as(rows)


class _Seen:
    """How many tasks the batch of this forward is for; 0 for none."""

    tasks: int = 0


@final
class WithAdapters(Adapted):
    """A layer, and after it the adapter of each task on its part of the batch.

    Args:
        layer: stays as it is.
        matrices: of adapters, held elsewhere.
        place: of the layer.
        seen: says for how many tasks a batch is.
    """

    def __init__(self, layer: nn.Module, matrices: Matrices, place: int, seen: _Seen) -> None:
        super().__init__()
        self.layer, self._matrices, self.place, self._seen = layer, (matrices,), place, seen

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        y = self.layer(*inputs, **named)
        if not self._seen.tasks:
            return y
        rows = y.unflatten(0, (self._seen.tasks, -1))
        return y + self._matrices[0].adapted(rows, self.place).flatten(0, 1)

    def merged(self) -> nn.Module:
        """Return the layer: what is learned is of tasks."""
        return self.layer


@final
class AdaptedTrunk(TaskTrunk):
    """A frozen backbone with adapters of each task.

    Attributes:
        matrices: what learns.
    """

    def __init__(self, backbone: nn.Module, settings: _Emitting) -> None:
        super().__init__(backbone, settings.tasks, settings.also)
        if any(getattr(part, "checkpointed", False) for part in self.trunk.modules()):
            raise ValueError(
                "got a backbone that computes blocks again in the backward, which adapters of tasks do not: wanted "
                "checkpointed=False"
            )
        weight = next(self.trunk.parameters())
        generator = None if weight.is_meta else seeds.named_generator(settings.seed, seeds.ADAPT, "polyhistor")
        places = [
            (block, _child(block, names)) for blocks in blocks_of(self.trunk) for block in blocks for names in PLACES
        ]
        widths = [block.get_submodule("norm1").get_parameter("weight").numel() for block, _ in places]
        with torch.device("cpu" if generator else "meta"):
            matrices = settings.matrices(widths, generator)
        self.matrices = matrices if generator is None else matrices.to(weight.device, weight.dtype)
        self._seen = _Seen()
        for place, (block, name) in enumerate(places):
            setattr(block, name, WithAdapters(block.get_submodule(name), self.matrices, place, self._seen))

    def of_tasks(self, images: Float[Tensor, "B C H W"]) -> dict[str, Any]:
        count = len(self.tasks)
        self._seen.tasks = count
        try:
            seen = self.trunk(images.repeat(count, 1, 1, 1))
        finally:
            self._seen.tasks = 0
        pooled, last = seen.pooled.chunk(count), seen.last.chunk(count)
        maps = [x.chunk(count) for x in seen.maps]
        return {
            task: dataclasses.replace(seen, pooled=pooled[i], last=last[i], maps=tuple(x[i] for x in maps))
            for i, task in enumerate(self.tasks)
        }


def _child(block: nn.Module, names: Sequence[str]) -> str:
    own = dict(block.named_children())
    found = next((name for name in names if name in own), None)
    if found is None:
        raise ValueError(f"got a {type(block).__name__}, wanted a block with a child {' or '.join(names)}")
    return found
