import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.polyhistor import Polyhistor, PolyhistorLite, Sizes
from synchromesh.models.swin_v2 import SwinV2Config
from tests.adapt.conftest import backbone, moved

SIZES = Sizes(embedding=6, rank=2, ratio=4)
WIDTHS = (8, 8, 16, 16, 16, 16)  # after attention and feed-forward of three blocks


def adapted(factory) -> nn.Module:
    model = nn.Module()
    model.backbone = backbone()
    adapt(model, "backbone", factory(tasks=("a", "b"), sizes=SIZES))
    moved(p for p in model.parameters() if p.requires_grad)
    return model.backbone


@pytest.mark.parametrize(
    ("factory", "wanted"),
    [
        (Polyhistor, 6 * (2 + 6) + 2 * 6 * 2 * (8 + 2) + 2 * 6 * 2 * (16 + 4)),
        (PolyhistorLite, 6 * (2 + 2) + 2 * 6 * 2 * (8 + 2) + 2 * (1 + 1 + 4 + 4 + 4 + 4)),
    ],
)
def test_the_number_of_parameters_is_the_formula(factory, wanted: int):
    found = adapted(factory)
    assert sum(p.numel() for p in found.parameters() if p.requires_grad) == wanted
    assert factory(tasks=("a", "b"), sizes=SIZES).parameters(WIDTHS) == wanted


def test_adapters_are_those_of_the_built_matrices():
    found = adapted(PolyhistorLite).matrices
    for place, width in enumerate(WIDTHS):
        rows = torch.randn(2, 3, 5, width).double()
        got = found.adapted(rows, place)
        for task, (name, own) in enumerate(found.of_tasks.items()):
            assert name == "ab"[task]
            e, maps = own + found.of_places[place % 2], found.emitter.maps
            down = (e @ maps["down_rows"]).view(8, 2) @ (e @ maps["down_columns"]).view(2, 2)
            up = (e @ maps["up_rows"]).view(2, 2) @ (e @ maps["up_columns"]).view(2, 8)
            down = torch.kron(found.kernels[f"down_{place}"], down)
            up = torch.kron(found.kernels[f"up_{place}"], up)
            torch.testing.assert_close(got[task], F.gelu(rows[task] @ down) @ up)
    found = adapted(Polyhistor).matrices
    rows = torch.randn(2, 7, 16).double()
    e, maps = found.of_tasks["b"] + found.of_places[3], found.emitters["16"].maps
    down = (e @ maps["down_rows"]).view(16, 2) @ (e @ maps["down_columns"]).view(2, 4)
    up = (e @ maps["up_rows"]).view(4, 2) @ (e @ maps["up_columns"]).view(2, 16)
    torch.testing.assert_close(found.adapted(rows, 3)[1], F.gelu(rows[1] @ down) @ up)


def test_kernels_are_shared_by_tasks_and_templates_by_layers():
    found = adapted(PolyhistorLite)
    x = torch.randn(2, 3, 32, 32).double()
    matrices = found.matrices
    found.of_tasks(x)["a"].last.square().sum().backward()
    assert matrices.of_tasks["a"].grad.any()
    assert not matrices.of_tasks["b"].grad.any()  # what is a task's own hears of no other
    assert all(kernel.grad.any() for kernel in matrices.kernels.values())
    first = {name: kernel.grad.clone() for name, kernel in matrices.kernels.items()}
    found.of_tasks(x)["b"].last.square().sum().backward()
    assert all((kernel.grad - first[name]).any() for name, kernel in matrices.kernels.items())
    for place in (0, 2, 4):  # one layer's loss moves the template of all layers of its kind
        matrices.zero_grad()
        matrices.adapted(torch.randn(2, 3, WIDTHS[place]).double(), place).square().sum().backward()
        assert all(own.grad.any() for own in matrices.emitter.maps.values())
        assert matrices.of_places.grad.any(1).tolist() == [True, False]


def test_each_task_sees_its_own_part_of_the_batch():
    found = adapted(Polyhistor)
    x = torch.randn(3, 3, 32, 32).double()
    seen = found.of_tasks(x)
    for task in ("a", "b"):
        alone = torch.cat([found.of_tasks(one[None])[task].last for one in x])
        torch.testing.assert_close(seen[task].last, alone)
    assert (seen["a"].last - seen["b"].last).abs().max() > 1e-3


def test_widths_that_cannot_be_are_refused():
    model = nn.Module()
    model.backbone = backbone()
    with pytest.raises(ValueError, match="multiple of the ratio 3"):
        adapt(model, "backbone", Polyhistor(tasks=("a",), sizes=Sizes(ratio=3)))
    with pytest.raises(ValueError, match="multiples of the smallest one, 8"):
        PolyhistorLite(tasks=("a",), sizes=SIZES).matrices((8, 12), torch.Generator())
    with pytest.raises(ValueError, match="rank"):
        Sizes(rank=0)


def test_a_backbone_that_computes_blocks_again_is_refused():
    model = nn.Module()
    model.backbone = SwinV2Config(image_size=32, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=2).build()
    for stage in model.backbone.stages:
        stage.checkpointed = True
    with pytest.raises(ValueError, match="wanted checkpointed=False"):
        adapt(model, "backbone", Polyhistor(("a", "b")))
