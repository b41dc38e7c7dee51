import torch
from torch import nn

from synchromesh import MLPExperts, MoE, TopKRouter
from synchromesh.models.twin import Momentum, Twin
from synchromesh.training.summary import model_size


def test_a_twin_that_follows_adds_nothing_to_a_models_size_and_shared_parameters_count_once() -> None:
    student = nn.Sequential(nn.Linear(8, 8), MoE(TopKRouter(8, 4, k=1), MLPExperts(4, 8, hidden=16)))
    tied = nn.Linear(8, 8, bias=False)
    tied.weight = student[0].weight
    model = nn.ModuleDict({"student": student, "tied": tied, "twin": Twin(student, Momentum())})
    size = model_size(model)
    experts = 4 * 2 * 8 * 16 + sum(p.numel() for n, p in student[1].experts.named_parameters() if "bias" in n)
    assert size.parameters == sum(p.numel() for p in student.parameters())
    assert size.active == size.parameters - experts * 3 // 4
    assert torch.equal(model["twin"].copied[0].weight, student[0].weight)
