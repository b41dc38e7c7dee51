"""What scripts do with `tutel.moe`, in the shapes of Tutel's own tests."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from synchromesh.compat.tutel import moe
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

HUGE = 2048


@dataclass(frozen=True)
class Hello:
    """Arguments of the program that Tutel measures itself by."""

    top: int = 2
    number: int = 2
    dim: int = 32
    tokens: int = 24
    batch: int = 4
    factor: float = 1.0
    lr: float = 1e-2
    parallel: str = "adaptive:1"
    overlap: int = 1
    two_level: bool = False
    kind: str = "ffn"


def losses_of(hello, steps):
    """Return the first losses: each step but the last trains."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    settings = {"type": hello.kind, "count_per_node": hello.number, "hidden_size_per_expert": hello.dim}
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": hello.top, "capacity_factor": hello.factor},
        experts={**settings, "activation_fn": lambda x: F.relu(x)},
        model_dim=hello.dim,
        scan_expert_func=lambda name, param: setattr(param, "skip_allreduce", True),
        seeds=(1, rank + 1, 1),
        a2a_ffn_overlap_degree=hello.overlap,
        parallel_type=hello.parallel,
        use_2dh=hello.two_level,
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=hello.lr)
    torch.manual_seed(0)
    x = torch.randn(hello.batch, hello.tokens, hello.dim)
    y = torch.LongTensor(hello.batch).random_(1)
    shared = [p for p in layer.parameters() if not hasattr(p, "skip_allreduce")]
    losses = []
    for step in range(steps):
        with torch.set_grad_enabled(step < steps - 1):
            loss = F.nll_loss(F.log_softmax(layer(x).sum(2), 1), y)
        losses.append(loss.item())
        if step == steps - 1:
            return losses
        optimizer.zero_grad()
        loss.backward()
        for p in shared if world > 1 else []:
            p.grad /= world
            dist.all_reduce(p.grad)
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("top", "number", "wanted"),
    [(1, 1, [29.985]), (1, 2, [22.076, 21.388]), (2, 2, [24.080])],
)
def test_losses_are_the_published_ones(top, number, wanted):
    """Those that Tutel keeps for its own regression tests, to all their digits; a training step takes long on a CPU."""
    hello = Hello(top=top, number=number, dim=HUGE, tokens=1024, batch=16, lr=1e-5)
    assert [round(loss, 3) for loss in losses_of(hello, len(wanted))] == wanted


def ranks_losses(hellos, steps):
    return [losses_of(hello, steps) for hello in hellos]


BASE = Hello(number=2)
SHARED = Hello(number=-2, factor=0.0)


@pytest.mark.parametrize("world", [1, 2])
def test_every_way_to_run_a_layer_gives_the_same_losses(world):
    """Degrees of overlap, kinds of exchange, data and model parallelism, whole and shared experts."""
    groups = [
        [BASE, *(dataclasses.replace(BASE, overlap=degree) for degree in (2, 3, 4))],
        [BASE, dataclasses.replace(BASE, two_level=True), dataclasses.replace(BASE, two_level=True, overlap=2)],
        [dataclasses.replace(BASE, parallel=kind) for kind in ("adaptive:0", "adaptive:1", "data", "model", "auto")],
    ]
    if world > 1:
        kinds = ("adaptive:0", "adaptive:1", "adaptive:2", "data", "model", "auto")
        groups += [
            [dataclasses.replace(SHARED, parallel=kind, kind=own) for kind in kinds] for own in ("ffn", "llama_ffn")
        ]
    for group in groups:
        results = ranks_losses(group, 5) if world == 1 else run_ranks(ranks_losses, world, group, 5)[0]
        for hello, losses in zip(group, results, strict=True):
            assert_close(str(hello), torch.tensor(losses), torch.tensor(results[0]))


def test_names_are_there():
    assert moe.top_k_routing is moe.extract_critical
    assert moe.moe_layer.global_expert_count(2) == 2
    assert all(hasattr(moe, name) for name in moe.__all__)
