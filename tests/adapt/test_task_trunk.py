import pytest
import torch
from torch import nn

from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.mtlora import MTLoRA
from synchromesh.adapt.polyhistor import Polyhistor, PolyhistorLite, Sizes
from tests.adapt.conftest import backbone, moved

FACTORIES = {
    "mtlora": MTLoRA(tasks=("a", "b"), rank=3, task_rank=2, also=()),
    "polyhistor": Polyhistor(tasks=("a", "b"), sizes=Sizes(6, 2, 4)),
    "lite": PolyhistorLite(tasks=("a", "b"), sizes=Sizes(6, 2, 4)),
}


@pytest.mark.parametrize("way", FACTORIES)
def test_at_first_every_task_and_none_see_what_the_frozen_backbone_sees(trunk: nn.Module, way: str):
    x = torch.randn(2, 3, 32, 32).double()
    wanted = trunk.backbone(x)
    adapt(trunk, "backbone", FACTORIES[way])
    for seen in (trunk.backbone(x), *trunk.backbone.of_tasks(x).values()):
        got, known = ((one.last, one.pooled, *one.maps) for one in (seen, wanted))
        for one, other in zip(got, known, strict=True):
            if way != "mtlora":  # whose experts see other numbers of rows in one product
                torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
            else:
                assert torch.equal(one, other)
    assert trunk.backbone.widths == (8, 16)
    assert trunk.backbone.strides == (4, 8)
    assert trunk.backbone.multiply_adds() > 0
    assert len(list(trunk.backbone.feed_forwards())) == 3


@pytest.mark.parametrize("way", FACTORIES)
def test_merge_is_what_all_tasks_share_and_undo_the_backbone_itself(trunk: nn.Module, way: str):
    x, before = torch.randn(2, 3, 32, 32).double(), trunk.backbone
    keys = set(before.state_dict())
    adaptation = adapt(trunk, "backbone", FACTORIES[way])
    moved(adaptation.trained().values())
    shared = trunk.backbone(x).last
    assert (trunk.backbone.of_tasks(x)["a"].last - shared).abs().max() > 1e-3
    adaptation.merge()
    assert set(trunk.backbone.state_dict()) == keys
    torch.testing.assert_close(trunk.backbone(x).last, shared)
    again = nn.Module()
    again.backbone = before
    adapt(again, "backbone", FACTORIES[way]).undo()
    assert again.backbone is before


@pytest.mark.parametrize("way", FACTORIES)
def test_states_are_kept_and_an_empty_batch_runs(way: str):
    one, other = nn.Module(), nn.Module()
    for model in (one, other):
        model.backbone = backbone(experts=True)
        adapt(model, "backbone", FACTORIES[way])
    moved(p for p in one.parameters() if p.requires_grad)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 32, 32).double()
    for task, seen in one.backbone.of_tasks(x).items():
        torch.testing.assert_close(other.backbone.of_tasks(x)[task].last, seen.last)
    assert all(seen.last.shape[0] == 0 for seen in one.backbone.of_tasks(x[:0]).values())


def test_names_of_tasks_and_backbones_are_checked():
    model = nn.Module()
    model.backbone = backbone()
    for tasks in ((), ("a", "a"), ("a b",)):
        with pytest.raises(ValueError, match="wanted one name or more"):
            adapt(model, "backbone", MTLoRA(tasks=tasks))
    with pytest.raises(ValueError, match="select 'backbone'"):
        adapt(model, "*.ffn", MTLoRA(tasks=("a",)))
    assert type(model.backbone).__name__ == "SwinV2"
