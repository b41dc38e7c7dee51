"""Pretexts on four ranks: losses, gradients, statistics and twins are those of one process, under each kind of plan."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from synchromesh import Grid, parallelize
from synchromesh.data.images import Preprocess
from synchromesh.data.view_pairs import ViewData
from synchromesh.models.collapse import CollapseWatch
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.dense_agreement import PixelContrast, Propagation
from synchromesh.models.heads.dense_twins import Siamese
from synchromesh.models.heads.graded_ranking import GradedRanking
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.twin import Momentum
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.layer import MoE, routing_options
from synchromesh.parallel.grid_module import BatchNorm
from synchromesh.parallel.sharded import Sharded
from synchromesh.tasks.dense_twins import TwoViews, ViewTwins
from synchromesh.tasks.mixed_ae import Groups, MixedAE
from synchromesh.tasks.simmim import CropData
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.task import Batch, Run, Task
from synchromesh.types import Plan, Workload

SIDE, PARTS = 16, (0, 2, 2, 4, 5)  # the second of the four ranks has nothing, the others two, two, and one
SIZE = Preprocess(image_size=SIDE, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


def experts(blocks: tuple[tuple[int, ...], ...]) -> ExpertsConfig:
    gate = LinearGate(noise=0.0)
    return ExpertsConfig(
        num_experts=4, k=2, blocks=blocks, router=gate, capacity=Dropless(), losses=(), dropout=0.0, down_bias=True
    )


SWIN = SwinV2Config(
    embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=2, window_size=4, drop_path=0.0, init_std=0.2,
    experts=experts(((), (0,))),
)  # fmt: skip
VIT = ViTConfig(
    patch_size=4, width=8, depth=2, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY, init_std=0.2,
    experts=experts(((1,),)),
)  # fmt: skip


def twins(agreement: Any) -> Task:
    siamese = Siamese(width=8, hidden=8, momentum=Momentum(0.5))
    return ViewTwins(ViewData(preprocess=SIZE), siamese, agreement)


TASKS: dict[str, tuple[Task, BackboneConfig]] = {
    "propagation": (twins(Propagation()), SWIN),
    "contrast": (twins(PixelContrast()), SWIN),
    "ranking": (twins(GradedRanking(prototypes=4)), SWIN),
    "mixed": (
        MixedAE(
            CropData(preprocess=SIZE), ViTDecoderConfig(width=8, depth=1, num_heads=2, cross=False), patch=4,
            mixtures=2, projection=8,
        ),
        VIT,
    ),
}  # fmt: skip


def batch(task: Task, part: slice) -> Batch:
    """Some of five samples."""
    generator = torch.Generator().manual_seed(3)
    count = PARTS[-1]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator).double()[part]

    if isinstance(task, MixedAE):
        sources = torch.stack([torch.randperm(16, generator=generator) % 4 for _ in range(count)])
        mixtures = torch.stack((sources, (sources + 1) % 4), 1)[part]
        return Groups(drawn(4, 3, SIDE, SIDE), mixtures)
    views = torch.tensor([[0.0, 0, 20, 20, 0], [4.0, 2, 16, 18, 0]]).expand(count, 2, 5)[part]
    places = torch.zeros(count, 2, SIDE, SIDE)[part]
    return TwoViews(drawn(3, SIDE, SIDE), drawn(3, SIDE, SIDE), views[:, 0], views[:, 1], places)


def model_of(task: Task, backbone: BackboneConfig) -> nn.Module:
    torch.manual_seed(0)
    model = task.build(task.sized(backbone), {}).double()
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.router.scores = dataclasses.replace(layer.router.scores, dtype=torch.float64)
    return model


def loss_of(task: Task, model: nn.Module, run: nn.Module, part: slice) -> Tensor:
    """The sum over a part of the samples, over what the whole batch counts."""
    counts = task.counts(batch(task, slice(None)))
    terms = task.loss(Run(model, run), batch(task, part))
    return torch.stack([term.weight * term.total / counts[name] for name, term in terms.items()]).sum()


def kinds_of_plan(grid: Grid) -> Iterator[Plan]:
    """A plan of each kind: all sizes and places of gather groups, and each other choice once, twice where it can be."""
    strategy = Sharded(grid)
    work = Workload(100, 2, SWIN.width(1), 64, 4, torch.float64, True)
    legal = [plan for plan, reason in strategy.legal_plans(work, Dropless()).items() if reason is None]
    seen: set[tuple[str, Any]] = set()
    for plan in legal:
        kinds = {("groups", (plan.gather, plan.near))}
        kinds |= {(name, getattr(plan, name)) for name in ("chunks", "two_level", "ragged", "regather", "deduplicate")}
        if kinds - seen:
            seen |= kinds
            yield plan
    assert {kind for kind in seen if kind[0] == "groups"} >= {("groups", (gather, True)) for gather in (1, 2, 4)}
    assert all((name, True) in seen for name in ("two_level", "regather", "deduplicate"))


def statistics(model: nn.Module) -> list[Tensor]:
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    watches = [module.last for module in model.modules() if isinstance(module, CollapseWatch)]
    return [*(part for norm in norms for part in (norm.running_mean, norm.running_var)), *watches]


def compare(what: str, model: nn.Module, whole: nn.Module, grid: Grid, *, grads: bool) -> None:
    got, wanted = [], []
    for (name, own), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        if grads and other.grad is None:
            continue
        one, right = (own.grad, other.grad) if grads else (own.detach(), other.detach())
        assert one is not None, name
        got.append(one.flatten())
        wanted.append((right.chunk(grid.size)[grid.rank] if ".experts." in name else right).flatten())
    assert_close(what, torch.cat(got), torch.cat(wanted))


def equal(name: str) -> None:
    grid = Grid.from_group(dist.group.WORLD, ranks_per_node=2)
    task, backbone = TASKS[name]
    model = model_of(task, backbone)
    whole = copy.deepcopy(model)
    right = loss_of(task, whole, whole, slice(None))
    right.backward()
    run = parallelize(model, grid, strategy=lambda: Sharded(grid))
    assert any(isinstance(module, MoE) and isinstance(module.strategy, Sharded) for module in model.modules())
    part, number = slice(PARTS[grid.rank], PARTS[grid.rank + 1]), 0
    for number, plan in enumerate(kinds_of_plan(grid), 1):
        run.zero_grad()
        with routing_options(model, plan=plan):
            own = loss_of(task, model, run, part)
            (own * grid.size).backward()
        total = own.detach().clone()
        dist.all_reduce(total)
        assert_close(f"loss of {name}, {plan}", total, right.detach())
        compare(f"gradients of {name}, {plan}", model, whole, grid, grads=True)
        if number == 1:
            for one, other in zip(statistics(model), statistics(whole), strict=True):
                assert_close(f"statistics of {name}", one, other)
    assert number >= 6
    for one in (model, whole):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(1.5)
        task.after_step(one)
    compare(f"{name} after a step of the twin", model, whole, grid, grads=False)


def all_equal() -> None:
    for name in TASKS:
        equal(name)


def test_four_ranks_learn_what_one_process_does_under_each_kind_of_plan() -> None:
    run_ranks(all_equal, 4)
