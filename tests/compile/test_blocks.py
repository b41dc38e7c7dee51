"""What `--compile` does to a model: its blocks, each by itself."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.losses import LoadBalance
from synchromesh.moe.record import aux_loss
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import parallelize
from synchromesh.parallel.sharded import Sharded
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.precision import compile_blocks, quiet_compiler
from synchromesh.types import Plan

EXPERTS = ExpertsConfig(
    num_experts=4, blocks=((), (0,)), dropout=0.0, router=LinearGate(noise=0.0), losses=(LoadBalance(0.01),)
)
TINY = SwinV2Config(
    image_size=16, in_channels=1, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=2, window_size=4,
    drop_path=0.0, experts=EXPERTS,
)  # fmt: skip


def built(config: SwinV2Config = TINY) -> nn.Module:
    torch.manual_seed(0)
    return Classifier(config.build(), 3)


def learnt(model: nn.Module) -> dict[str, Tensor]:
    logits = model(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1)))
    (logits.square().mean() + aux_loss(model)).backward()
    return {"logits": logits, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_blocks_give_the_eager_logits_losses_and_gradients(backend: str) -> None:
    model, compiled = built(), built()
    names = compile_blocks(compiled, backend)
    assert names == ["backbone.stages.0.blocks.0", "backbone.stages.1.blocks.0"]
    assert compiled.state_dict().keys() == model.state_dict().keys()
    with quiet_compiler():
        wanted, found = learnt(model), learnt(compiled)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="layers share a limit of graphs")  # a version, no text
def test_more_blocks_than_torchs_limit_are_all_compiled() -> None:
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = built(dataclasses.replace(TINY, depths=(11, 1), drop_path=0.2))  # each drops another share of paths
    names = compile_blocks(model, counting)
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 1, 16, 16))
    assert len(names) == 12
    assert len(graphs) >= len(names)


def test_a_model_without_layers_says_what_is_looked_for() -> None:
    with pytest.raises(ValueError, match="Linear has no layers to compile: its blocks need a `layer_depth`"):
        compile_blocks(nn.Linear(2, 2))


def on_ranks(plan: Plan, backend: str | None) -> list[float]:
    grid, model = Grid.from_group(dist.group.WORLD), built()
    run = parallelize(model, grid, strategy=lambda: Sharded(grid, plan=plan))
    if backend is not None:
        compile_blocks(model, backend)
    with quiet_compiler():
        logits = run(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(grid.rank)))
        (logits.square().mean() + aux_loss(model)).backward()
    return [*logits.flatten().tolist(), *(float(p.grad.norm()) for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("plan", [Plan(), Plan(2), Plan(chunks=2, deduplicate=True)], ids=str)
def test_compiled_blocks_share_their_experts_over_ranks(plan: Plan) -> None:
    wanted, found = (run_ranks(on_ranks, 2, plan, backend) for backend in (None, "aot_eager"))
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
