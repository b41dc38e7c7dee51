import pytest
import torch
from torch import nn

from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.mtlora import MTLoRA, TaskBlock
from synchromesh.adapt.split import SplitFFN
from synchromesh.adapt.task_trunk import blocks_of
from synchromesh.models.focalnet import FocalNetConfig
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.pvt import PVTConfig, PVTVersion
from synchromesh.models.spectrum import SpectrumNetConfig
from synchromesh.moe.capacity import Dropless
from tests.adapt.conftest import backbone, moved

SETTINGS = MTLoRA(tasks=("a", "b"), rank=3, task_rank=2, scale=2.0, task_scale=0.5)


def adapted(trunk: nn.Module, settings: MTLoRA = SETTINGS) -> nn.Module:
    moved(adapt(trunk, "backbone", settings).trained().values())
    return trunk.backbone


def test_no_gradient_of_a_task_reaches_the_factors_of_another(trunk: nn.Module):
    seen = adapted(trunk)
    found = seen.of_tasks(torch.randn(2, 3, 32, 32).double())["a"]
    sum(part.square().sum() for part in (found.last, *found.maps)).backward()
    of = {name: p for name, p in seen.named_parameters() if p.requires_grad}
    own = {task: [p for name, p in of.items() if f"own.{task}." in name or f".{task}_" in name] for task in ("a", "b")}
    assert len(own["a"]) == len(own["b"]) == 2 * 3 * 2
    assert all(p.grad is not None and p.grad.any() for p in own["a"])
    assert all(p.grad is None or not p.grad.any() for p in own["b"])
    assert all(p.grad is None for p in seen.parameters() if not p.requires_grad)
    shared = [p for name, p in of.items() if "stages.0" in name and not any(p is q for q in own["a"] + own["b"])]
    assert sum(bool(p.grad is not None and p.grad.any()) for p in shared) > 4


@pytest.mark.parametrize("with_shared", [False, True])
def test_the_stream_of_a_task_is_the_formula(with_shared: bool):
    model = nn.Module()
    model.backbone = backbone()
    settings = MTLoRA(tasks=("a",), rank=3, task_rank=2, scale=2.0, task_scale=0.5, with_shared=with_shared)
    task_block = blocks_of(adapted(model, settings).trunk)[1][-1]
    assert isinstance(task_block, TaskBlock)
    block, x = task_block.block, torch.randn(2, 4, 4, 16).double()
    task_block.keeps = True
    shared, (own,) = task_block(x), task_block.taken()
    proj, up, down = block.attention.proj, block.ffn.up, block.ffn.down

    def layer(streams, y, y_a):
        frozen = streams.layer(y)
        both = frozen + 2.0 * y @ streams.shared.down.T @ streams.shared.up.T
        factors = streams.own["a"]
        base = both if with_shared else frozen
        return both, base + 0.5 * y_a @ factors.down.T @ factors.up.T

    block.attention.proj = nn.Identity()
    attended = block.mix(x)  # what the projection sees, put back in place: it treats each position by itself
    block.attention.proj = proj
    p, p_a = layer(proj, attended, attended)
    h, h_a = x + block.norm1(p), x + block.norm1(p_a)
    u, u_a = layer(up, h, h_a)
    v, v_a = layer(down, nn.functional.gelu(u), nn.functional.gelu(u_a))
    torch.testing.assert_close(shared, h + block.norm2(v))
    torch.testing.assert_close(own, h_a + block.norm2(v_a))


def test_what_learns_is_counted_by_hand():
    model = nn.Module()
    model.backbone = backbone()
    adaptation = adapt(model, "backbone", MTLoRA(tasks=("a", "b"), rank=3, task_rank=2, also=()))

    def sizes(d: int) -> dict[str, int]:
        return {"qkv": d + 3 * d, "proj": 2 * d, "up": 5 * d, "down": 5 * d}

    shared = 3 * (sum(sizes(8).values()) + 2 * sum(sizes(16).values()) + 32 + 16)
    own = 2 * 2 * sum(sizes(d)[name] for d in (8, 16) for name in ("proj", "up", "down"))
    assert sum(p.numel() for p in adaptation.trained().values()) == shared + own
    others = adapt(backboned(), "backbone", SETTINGS).trained()
    norms = [name for name in others if "norm" in name or "embed" in name]
    assert len(norms) == 2 * (2 + 6 + 1 + 1)


def backboned() -> nn.Module:
    model = nn.Module()
    model.backbone = backbone()
    return model


def test_streams_are_not_kept_unasked_and_know_no_mask():
    seen = adapted(backboned())
    x = torch.randn(1, 3, 32, 32).double()
    seen(x)
    blocks = [blocks[-1] for blocks in blocks_of(seen.trunk)]
    assert [block.taken() for block in blocks] == [(), ()]
    with pytest.raises(ValueError, match="mask"):
        seen(x, None, torch.ones(1, 32, 32, dtype=torch.bool))


def test_a_training_step_on_the_tasks_changes_no_frozen_number():
    seen = adapted(backboned()).train()
    before = {name: p.clone() for name, p in seen.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in seen.parameters() if p.requires_grad], lr=0.1)
    for task in seen.of_tasks(torch.randn(2, 3, 32, 32).double()).values():
        task.last.square().sum().backward(retain_graph=True)
    optimizer.step()
    assert all(torch.equal(p, seen.get_parameter(name)) for name, p in before.items())


SIZES = {"image_size": 32, "depths": (1, 2), "drop_path": 0.0}
EXPERTS = ExpertsConfig(num_experts=4, k=2, blocks=((0,), (1,)), capacity=Dropless(), dropout=0.0)
PVT = {"widths": (8, 16), "num_heads": (1, 2), "reductions": (2, 1), "mlp_ratios": (2.0, 2.0)}
BUILD = {
    "SwinV2": lambda experts: backbone(experts=experts is not None),
    "FocalNet": lambda experts: FocalNetConfig(
        **SIZES, embed_dim=8, focal_levels=(2, 2), focal_windows=(3, 3), experts=experts
    ).build(),
    "SpectrumNet": lambda experts: SpectrumNetConfig(**SIZES, embed_dim=8, experts=experts).build(),
    "PVT v2": lambda experts: PVTConfig(**SIZES, **PVT, version=PVTVersion.V2, experts=experts).build(),
}
KINDS = [(name, experts) for name in BUILD for experts in (None, EXPERTS) if (name, experts) != ("PVT v2", None)]


def made(name: str, experts: ExpertsConfig | None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.backbone = BUILD[name](experts).double().eval()
    return model


@pytest.mark.parametrize(
    ("name", "experts"), KINDS, ids=lambda value: value if isinstance(value, str) else str(value is not None)
)
def test_streams_begin_as_the_frozen_backbone_and_learn_apart(name: str, experts: ExpertsConfig | None) -> None:
    model, images = made(name, experts), torch.randn(2, 3, 32, 32).double()
    frozen = model.backbone(images)
    adaptation = adapt(model, "backbone", MTLoRA(("a", "b"), rank=2, task_rank=2))
    for seen in (model.backbone(images), *model.backbone.of_tasks(images).values()):
        for wanted, got in zip(frozen.maps, seen.maps, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    moved(adaptation.trained().values())
    found = model.backbone.of_tasks(images)
    assert not torch.allclose(found["a"].maps[-1], found["b"].maps[-1])
    sum(part.square().sum() for part in found["a"].maps).backward()
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {
        task: [p for name, p in learns.items() if f"own.{task}." in name or f".{task}_" in name] for task in ("a", "b")
    }
    assert own["a"]
    assert all(p.grad is not None and p.grad.any() for p in own["a"])
    assert all(p.grad is None or not p.grad.any() for p in own["b"])


def test_what_streams_cannot_pass_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got ConvFeedForward in the last block .* give these blocks experts"):
        adapt(made("PVT v2", None), "backbone", MTLoRA(("a", "b")))
    model = nn.Module()
    model.backbone = PVTConfig(**SIZES, **PVT, version=PVTVersion.V1).build()
    with pytest.raises(ValueError, match="class token"):
        adapt(model, "backbone", MTLoRA(("a", "b")))


def test_a_backbone_whose_blocks_were_split_is_refused() -> None:
    model = nn.Module()
    model.backbone = backbone()
    adapt(model, "backbone.stages.1.blocks.1.ffn", SplitFFN(4, 2))
    with pytest.raises(ValueError, match=r"stages\.1\.blocks\.1\.ffn is adapted already, .* merge it first"):
        adapt(model, "backbone", SETTINGS)


@pytest.mark.parametrize("learns", [False, True])
def test_a_merged_backbone_learns_what_it_did_before(trunk: nn.Module, learns: bool) -> None:
    trunk.backbone.requires_grad_(learns)
    names = {name for name, _ in trunk.backbone.named_parameters()}
    adapt(trunk, "backbone", SETTINGS).merge()
    assert {name for name, _ in trunk.backbone.named_parameters()} == names
    assert {parameter.requires_grad for parameter in trunk.backbone.parameters()} == {learns}
