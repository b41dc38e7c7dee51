"""torch.export takes a layer and a SwinV2-MoE with any batch, AOTInductor compiles them, and nothing changes by it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export, load, save

from synchromesh import (
    BiasBalance,
    CosineRouter,
    Dropless,
    ExpertChoiceRouter,
    FixedCapacity,
    GatedMLPExperts,
    LoadBalance,
    Local,
    MLPExperts,
    MoE,
    NeededCapacity,
    Sigmoid,
    TokenRounding,
    TopKRouter,
    batch_prioritized,
)
from synchromesh.kernels import REFERENCE
from synchromesh.models.swin_v2 import SWIN_MOE, SWIN_V2, SwinV2Config
from synchromesh.models.swin_v2_moe import DEMO, DEMO_EXPERTS, swin_v2_moe, swin_v2_moe_demo
from synchromesh.testing.compare import assert_close

D, E = 16, 4
BATCH, LENGTH = Dim("batch"), Dim("length")
OURS = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, where a program is copied


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp(**how: object) -> MLPExperts:
    return MLPExperts(E, D, hidden=32, **how)


LAYERS = {
    "dropless": lambda: MoE(TopKRouter(D, E, k=2), mlp(), losses=(LoadBalance(0.01),)),
    "fixed": lambda: MoE(TopKRouter(D, E, k=2), mlp(), capacity=FixedCapacity(0.7)),
    "prioritised": lambda: MoE(TopKRouter(D, E), mlp(), capacity=FixedCapacity(1.25, priority=batch_prioritized)),
    "fixed beforehand": lambda: MoE(TopKRouter(D, E), mlp(), capacity=FixedCapacity(1.0, tokens=8)),
    "needed": lambda: MoE(TopKRouter(D, E), mlp(activation=torch.tanh), capacity=NeededCapacity(max_factor=0.7)),
    "gated, cosine": lambda: MoE(CosineRouter(D, E, k=2, dim=8), GatedMLPExperts(E, D, hidden=32)),
    "sigmoid, biased, shared": lambda: MoE(
        TopKRouter(D, E, k=2, scores=Sigmoid(), balance=BiasBalance(E)), mlp(), shared=nn.Linear(D, D)
    ),
    "expert choice": lambda: MoE(ExpertChoiceRouter(D, E, k=2), mlp()),
    "token rounding": lambda: MoE(TokenRounding(TopKRouter(D, E, k=2)), mlp()),
    "reference kernels": lambda: MoE(TopKRouter(D, E, k=2), mlp(), strategy=Local(kernels=REFERENCE)),
}


def exported(module: nn.Module, x: Tensor, *names: Dim) -> ExportedProgram:
    return export(module, (x,), dynamic_shapes=(dict(enumerate(names)),))


def foreign(program: ExportedProgram) -> list[str]:
    """The operators that only a process which imports synchromesh knows."""
    return [str(node.target) for node in program.graph.nodes if "synchromesh" in str(node.target)]


@pytest.mark.parametrize("learning", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_exported_layer_gives_the_eager_result_for_any_batch_and_length(layer, learning):
    """Without gradients too, where few tokens would go another way than many."""
    moe = LAYERS[layer]().eval()
    with torch.set_grad_enabled(learning):
        run = exported(moe, torch.randn(3, 5, D), BATCH, LENGTH).module()
        for batch, length in ((1, 1), (2, 7), (9, 30), (0, 5)):
            x = torch.randn(batch, length, D)
            assert_close(f"{batch} x {length}", run(x), moe(x))


@OURS
def test_a_saved_program_is_loaded(tmp_path):
    moe = LAYERS["dropless"]().eval()
    save(exported(moe, torch.randn(3, D), BATCH), tmp_path / "moe.pt2")
    x = torch.randn(11, D)
    assert_close("loaded", load(tmp_path / "moe.pt2").module()(x), moe(x))


STYLES = {"dropless, true style": (Dropless(), SWIN_V2), "fixed, released style": (FixedCapacity(0.7), SWIN_MOE)}


@pytest.mark.parametrize("kind", STYLES)
def test_an_exported_swin_v2_moe_gives_the_eager_logits_for_any_batch(kind):
    capacity, style = STYLES[kind]
    experts = dataclasses.replace(DEMO_EXPERTS, capacity=capacity, blocks=((), (1,)))
    model = swin_v2_moe_demo(config=dataclasses.replace(DEMO, style=style, depths=(1, 2)), experts=experts).eval()
    if style is SWIN_MOE:
        model.backbone.stages[1].blocks[1].ffn.distribute(Local(kernels=REFERENCE))
    program = exported(model, torch.randn(2, 1, 32, 32), BATCH)
    assert ("synchromesh.fused_mlp_cpu.default" in foreign(program)) == (style is SWIN_V2)
    run = program.module()
    for batch in (1, 5):
        images = torch.randn(batch, 1, 32, 32)
        assert_close(f"{batch} images", run(images), model(images))


def compiled(program: ExportedProgram, folder: Path):
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # of the host code around the kernels, for tests
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2"), inductor_configs=quick
    )
    return torch._inductor.aoti_load_package(path)


class Two(nn.Module):
    """A dropless layer and one of fixed capacity: one compilation."""

    def __init__(self) -> None:
        super().__init__()
        self.dropless, self.fixed = (
            MoE(TopKRouter(D, 2), MLPExperts(2, D, hidden=32), capacity=capacity, strategy=Local(kernels=REFERENCE))
            for capacity in (Dropless(), FixedCapacity(0.7, priority=batch_prioritized))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.dropless(x), self.fixed(x)


@OURS
def test_layers_of_torch_operators_alone_are_compiled_ahead_of_time(tmp_path):
    """What runs without Python: a layer on reference kernels, router and capacity included."""
    layers = Two().eval()
    program = exported(layers, torch.randn(6, D), BATCH)
    assert not foreign(program)
    run = compiled(program, tmp_path)
    for tokens in (1, 2, 100):
        x = torch.randn(tokens, D)
        for got, wanted in zip(run(x), layers(x), strict=True):
            assert_close(f"{tokens} tokens", got, wanted)


@OURS
def test_a_swin_v2_moe_compiled_ahead_of_time_gives_the_eager_logits(tmp_path):
    """One block with experts that drop nothing, one with a fixed capacity; windows are shifted."""
    sizes = SwinV2Config(
        image_size=32, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, drop_path=0.0, style=SWIN_MOE
    )
    model = swin_v2_moe(sizes, 5, experts=dataclasses.replace(DEMO_EXPERTS, num_experts=4, blocks=((0, 1),))).eval()
    model.backbone.stages[0].blocks[1].ffn.capacity = FixedCapacity(0.7, priority=batch_prioritized)
    run = compiled(exported(model, torch.randn(2, 3, 32, 32), BATCH), tmp_path)
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        assert_close(f"{batch} images", run(images), model(images))
