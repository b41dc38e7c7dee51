"""Every size function: built, run, differentiated, copied, saved, loaded; the demo sizes compiled in one graph."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from synchromesh.models.heads.graded_ranking import ranked_precision
from synchromesh.models.mixtures import LinearGate
from synchromesh.models.swin_v2 import swin_v2_base, swin_v2_large, swin_v2_small, swin_v2_tiny
from synchromesh.models.swin_v2_moe import (
    DEMO,
    DEMO_EXPERTS,
    swin_v2_demo,
    swin_v2_moe_b,
    swin_v2_moe_demo,
    swin_v2_moe_s,
)
from synchromesh.moe.losses import LoadBalance
from synchromesh.testing.compare import TOLERANCE, assert_close, relative_rms

SMALL = {"demo": swin_v2_demo, "moe demo": swin_v2_moe_demo}
LARGE = {
    "tiny": swin_v2_tiny,
    "small": swin_v2_small,
    "base": swin_v2_base,
    "large": swin_v2_large,
    "moe small": swin_v2_moe_s,
    "moe base": swin_v2_moe_b,
}
Build = Callable[[], nn.Module]


STILL = dataclasses.replace(DEMO, drop_path=0.0)  # what is drawn at random differs between eager and compiled
STILL_EXPERTS = dataclasses.replace(DEMO_EXPERTS, router=LinearGate(noise=0.0), losses=(LoadBalance(0.01),))
WITHOUT_CHANCE = {
    "demo": lambda: swin_v2_demo(config=STILL),
    "moe demo": lambda: swin_v2_moe_demo(config=STILL, experts=STILL_EXPERTS),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of test size run fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images() -> Tensor:
    return torch.randn(4, 1, 28, 28)


@pytest.mark.parametrize("build", LARGE.values(), ids=LARGE)
def test_published_sizes_run_and_differentiate_without_memory(build: Build) -> None:
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        pixels = model.backbone.config.image_size
        features = model.backbone(torch.randn(2, 3, pixels, pixels))
        logits = model(torch.randn(2, 3, pixels, pixels))
        assert [m.shape[2] for m in features.maps] == [pixels // 4, pixels // 8, pixels // 16, pixels // 32]
        assert logits.shape == (2, model.head.out_features)
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("build", SMALL.values(), ids=SMALL)
def test_copies_and_saved_states_give_the_same_logits(build: Build) -> None:
    model = build().eval()
    x = images()
    wanted = model(x)
    wanted.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    other = build().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), wanted)


def results(model: nn.Module, run: Build, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = run(x)
    logits.float().square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"logits": logits.detach().float(), "gradients": gradients}


@pytest.mark.parametrize("build", WITHOUT_CHANCE.values(), ids=WITHOUT_CHANCE)
def test_one_compiled_graph_gives_the_same_logits_and_gradients(build: Build) -> None:
    model, x = build(), images()
    wanted = results(model, model, x, torch.float32)
    got = results(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, torch.float32)
    for name in wanted:
        assert_close(name, got[name], wanted[name])


def test_bf16_is_as_near_to_float32_compiled_as_eager() -> None:
    model, x = WITHOUT_CHANCE["demo"](), images()
    truth = results(model, model, x, torch.float32)
    eager = results(model, model, x, torch.bfloat16)
    compiled = results(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, torch.bfloat16)
    assert relative_rms(eager["logits"], truth["logits"]) < TOLERANCE[torch.bfloat16]
    for name in truth:
        assert relative_rms(compiled[name], truth[name]) < 2 * relative_rms(eager[name], truth[name])
        assert relative_rms(eager[name], truth[name]) < 2 * relative_rms(compiled[name], truth[name])


def test_experts_compile_in_one_graph_under_autocast() -> None:
    model, x = WITHOUT_CHANCE["moe demo"](), images()
    got = results(model, torch.compile(model, fullgraph=True, backend="aot_eager"), x, torch.bfloat16)
    assert all(tensor.isfinite().all() for tensor in got.values())


def test_inductor_takes_the_demo_in_one_graph() -> None:
    model = swin_v2_moe_demo().eval()
    x = images()
    with torch.no_grad():
        assert_close("logits", torch.compile(model, fullgraph=True)(x), model(x))


def test_a_ranking_in_parts_is_one_graph_compiled() -> None:
    scores, targets = torch.rand(2, 3, 5, requires_grad=True), torch.rand(2, 3, 5)
    wanted, *_ = torch.autograd.grad(ranked_precision(scores, targets, temperature=0.2).sum(), scores)
    compiled = torch.compile(ranked_precision, fullgraph=True, backend="aot_eager")
    got, *_ = torch.autograd.grad(compiled(scores, targets, temperature=0.2).sum(), scores)
    assert_close("gradient", got, wanted)
