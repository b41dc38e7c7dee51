"""Backbones that tasks share go through torch.compile in one graph."""

import pytest
import torch

from synchromesh import MTLoRA, PolyhistorLite
from synchromesh.adapt.adaptation import adapt
from synchromesh.models.heads.multi_task import MultiTaskModel
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.testing.compare import relative_rms


@pytest.mark.parametrize(
    "factory", [MTLoRA(tasks=("a", "b")), PolyhistorLite(tasks=("a", "b"))], ids=["mtlora", "lite"]
)
def test_streams_of_tasks_compile_in_one_graph_and_learn_the_same(factory):
    torch.manual_seed(0)
    torch.compiler.reset()
    config = SwinV2Config(image_size=16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, drop_path=0.0)
    model = MultiTaskModel(config.build(), {"a": 2, "b": 1}, width=8).double()
    adapt(model, "backbone", factory)
    learned, x = [p for p in model.parameters() if p.requires_grad], torch.randn(2, 3, 16, 16).double()
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(0.1 * torch.randn_like(parameter))
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        said = run(x)
        loss = sum(one.square().sum() for one in said.values())
        results.append([*said.values(), *torch.autograd.grad(loss, learned, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        if one is None or other is None:
            assert one is None or not one.any()
            assert other is None or not other.any()
        else:
            assert relative_rms(other, one) < 1e-5  # maps are float32
