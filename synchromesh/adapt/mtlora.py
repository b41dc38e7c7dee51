"""MTLoRA: one frozen backbone for several dense tasks, by updates of low rank of all tasks and of each (2403.20320).

    images ── shared stream ──> blocks ── blocks ── last block of a stage ──> merge ──> next stage
              updates that all tasks share              └── one stream of each task ──> its map of this stage

The trunk runs once. Streams of tasks begin in the last block of a stage, with the shared input, and end in its map.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from synchromesh.adapt.adaptation import Adapted, adapt, matching, merge_all
from synchromesh.adapt.factories import ModuleFactory
from synchromesh.adapt.low_rank import LowRank, updated
from synchromesh.adapt.low_rank_experts import SHARED, LowRankMoE
from synchromesh.adapt.task_linear import TaskLinear
from synchromesh.adapt.task_trunk import TaskTrunk, blocks_of
from synchromesh.errors import at_least
from synchromesh.moe.layer import MoE


@final
@dataclass(frozen=True)
class MTLoRA(ModuleFactory):
    """Makes of a backbone a frozen one that learns updates of low rank: of all tasks everywhere, and of each task.

    Attributes:
        tasks: names of the tasks that have streams of their own.
        rank: of the updates that all tasks share; 64 in the paper's best setting.
        task_rank: of those of each task; 4 there.
        scale: of the first ones; 4 there.
        task_scale: of the others.
        with_shared: whether a task's output has the shared update too; not in the paper's default.
        linears: patterns of the names of linear layers that have updates.
        streamed: of these, in the last block of each stage, those that have updates of each task.
        also: patterns of the names, in the backbone, of further parameters that learn.
        per_expert: whether each expert has factors of its own.
        seed: of the first factors.

    Raises:
        ValueError: when called, for a backbone with a class token, or whose last blocks have a convolution in their
            feed-forward: streams of tasks cannot pass there side by side.
    """

    tasks: tuple[str, ...] = ("semantic", "saliency", "edges", "offsets")
    rank: int = 16
    task_rank: int = 4
    scale: float = 4.0
    task_scale: float = 4.0
    with_shared: bool = False
    linears: tuple[str, ...] = (
        "*.qkv", "*.q", "*.kv", "*.enter", "*.context", "*.proj", "*.ffn.up", "*.ffn.down", "*.reduction",
    )  # fmt: skip
    streamed: tuple[str, ...] = ("*.proj", "*.ffn.up", "*.ffn.down")
    also: tuple[str, ...] = ("embed.*", "*norm*")
    per_expert: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("", self, rank=1, task_rank=1)

    def __call__(self, name: str, module: nn.Module) -> SharedTrunk:
        return SharedTrunk(module, self)


@final
class SharedTrunk(TaskTrunk):
    """A frozen backbone with updates of low rank, and a stream of each task at the end of each stage."""

    def __init__(self, backbone: nn.Module, settings: MTLoRA) -> None:
        super().__init__(backbone, settings.tasks, settings.also)
        shared = LowRank(settings.rank, settings.scale, settings.per_expert, settings.seed)
        own = LowRank(settings.task_rank, settings.task_scale, settings.per_expert, settings.seed)
        last = {block for blocks in blocks_of(self.trunk) for block in blocks[-1:]}
        _check_streams(self.trunk, last)
        streams = _Streams(settings, shared, own)
        inside = {module for block in last for module in block.modules()}
        linears = matching(settings.linears)
        adapt(
            self.trunk,
            lambda name, module: isinstance(module, MoE) or (isinstance(module, nn.Linear) and linears(name, module)),
            lambda name, module: streams(name, module) if module in inside else shared(name, module),
        )
        adapt(self.trunk, lambda name, module: module in last, lambda name, block: TaskBlock(block, len(self.tasks)))

    def of_tasks(self, images: Float[Tensor, "B C H W"]) -> dict[str, Any]:
        blocks = [block for blocks in blocks_of(self.trunk) for block in blocks if isinstance(block, TaskBlock)]
        for block in blocks:
            block.keeps = True
        shared = self.trunk(images)
        found = [block.taken() for block in blocks]
        norm, seen = self.trunk.get_submodule("norm"), {}
        for place, task in enumerate(self.tasks):
            ends = [streams[place] for streams in found]
            last = norm(ends[-1])
            maps = tuple(x.permute(0, 3, 1, 2) for x in ends)
            seen[task] = dataclasses.replace(shared, pooled=last.mean((1, 2)), last=last, maps=maps)
        return seen


def _check_streams(trunk: nn.Module, last: Iterable[nn.Module]) -> None:
    """Raise ValueError where streams of tasks, side by side, would not be what each is alone."""
    adapted = [name for name, part in trunk.named_modules() if isinstance(part, Adapted)]
    if adapted:
        raise ValueError(
            f"{adapted[0]} is adapted already, wanted a plain backbone for streams of tasks: merge it first"
        )
    if any(name.endswith("class_token") for name, _ in trunk.named_parameters()):
        raise ValueError("got a backbone with a class token, wanted maps alone for streams of tasks: not PVT v1")
    ffns = [block.get_submodule("ffn") for block in last]
    mixing = [ffn for ffn in ffns if any(isinstance(part, nn.Conv2d) for part in ffn.modules())]
    if mixing:
        raise ValueError(
            f"got {type(mixing[0]).__name__} in the last block of a stage, wanted feed-forwards without a convolution, "
            "through which streams of tasks pass: give these blocks experts, or take another backbone than PVT v2"
        )


@dataclass(frozen=True)
class _Streams:
    """Makes what runs all streams of the layers of a block."""

    settings: MTLoRA
    shared: LowRank
    own: LowRank

    def __call__(self, name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, MoE):
            updates = {SHARED: self.shared.update, **dict.fromkeys(self.settings.tasks, self.own.update)}
            return LowRankMoE(
                module, updates, per_expert=self.shared.per_expert, with_shared=self.settings.with_shared,
                generator=self.shared.generator(name),
            )  # fmt: skip
        assert isinstance(module, nn.Linear)
        shared = self.shared.factors(name, module)
        if not matching(self.settings.streamed)(name, module):
            return updated(module, shared)
        own = {task: self.own.factors(f"{name}.{task}", module) for task in self.settings.tasks}
        return TaskLinear(module, shared, own, with_shared=self.settings.with_shared)


@final
class TaskBlock(Adapted):
    """The last block of a stage, which runs a stream of each task beside the shared one; it returns the shared one.

    Args:
        block: whose linear layers are made for streams.
        tasks: how many.

    Attributes:
        keeps: whether the next forward keeps the maps of tasks, for `taken`.
    """

    def __init__(self, block: nn.Module, tasks: int) -> None:
        super().__init__()
        self.block, self.streams = block, 1 + tasks
        self.keeps = False
        self._found: tuple[Tensor, ...] = ()

    def forward(
        self, x: Float[Tensor, "B H W C"], mask: Bool[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, "B H W C"]:
        """Run all streams of x, stacked along the batch where each is normalised, along the columns where layers run.

        Raises:
            ValueError: there is a mask.
        """
        if mask is not None:
            raise ValueError("got a mask of padded pictures, wanted none: streams of tasks do not know it")
        block: Any = self.block
        first, second = block.ends()
        x = x.repeat(self.streams, 1, 1, 1)
        x = block.residual(x, self._mix, block.norm1, first)
        x = block.residual(x, self._feed_forward, block.norm2, second)
        shared, *own = x.chunk(self.streams)
        self._found = tuple(own) if self.keeps else ()
        return shared

    def taken(self) -> tuple[Tensor, ...]:
        """Return the map of each task of the forward that kept them, once."""
        found, self._found, self.keeps = self._found, (), False
        return found

    def merged(self) -> nn.Module:
        block = copy.deepcopy(self.block)
        merge_all(block)
        return block

    @property
    def ffn(self) -> nn.Module:
        return self.block.get_submodule("ffn")

    def multiply_adds(self, *size: int) -> float:
        """Return those of the shared stream."""
        block: Any = self.block
        return block.multiply_adds(*size)

    def _mix(self, x: Float[Tensor, "S H W C"]) -> Float[Tensor, "S H W C"]:
        block: Any = self.block
        shared = x[: len(x) // self.streams]  # up to here all streams are the same
        return self._stacked(block.mix(shared))

    def _feed_forward(self, x: Float[Tensor, "S H W C"]) -> Float[Tensor, "S H W C"]:
        block: Any = self.block
        return self._stacked(block.ffn(torch.cat(x.chunk(self.streams), dim=-1)))

    def _stacked(self, x: Float[Tensor, "B H W SC"]) -> Float[Tensor, "S H W C"]:
        return torch.cat(x.chunk(self.streams, dim=-1))
