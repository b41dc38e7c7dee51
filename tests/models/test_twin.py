import copy
import math

import pytest
import torch
from torch import nn

from synchromesh import Dropless, MLPExperts, MoE, TopKRouter
from synchromesh.models.twin import Momentum, Twin, TwinGates, gate_names, noted_routings

WIDTH, EXPERTS = 8, 4


def student(seed=0):
    torch.manual_seed(seed)
    layer = MoE(
        TopKRouter(WIDTH, EXPERTS, k=2), MLPExperts(EXPERTS, WIDTH, hidden=16), capacity=Dropless()
    ).double()  # fmt: skip
    return nn.Sequential(nn.Linear(WIDTH, WIDTH).double(), layer)


def changed(module):
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("gates", list(TwinGates))
def test_a_twin_moves_by_its_momentum_and_its_gates_by_their_rule(gates):
    module = student()
    twin = Twin(module, Momentum(0.75), gates)
    before = copy.deepcopy(dict(twin.copied.named_parameters()))
    changed(module)
    twin.follow(module)
    new = dict(module.named_parameters())
    for name, parameter in twin.copied.named_parameters():
        at_once = name in gate_names(module) and gates is not TwinGates.AVERAGED
        wanted = new[name] if at_once else 0.75 * before[name] + 0.25 * new[name]
        torch.testing.assert_close(parameter.detach(), wanted.detach(), rtol=0, atol=1e-14)


def test_momentum_one_never_moves_and_zero_is_the_student():
    module = student()
    still, same = Twin(module, Momentum(1.0)), Twin(module, Momentum(0.0))
    first = copy.deepcopy(still.copied.state_dict())
    changed(module)
    for twin in (still, same):
        twin.follow(module)
    assert all(torch.equal(value, first[name]) for name, value in still.copied.state_dict().items())
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in same.copied.state_dict().items())


def test_momentum_reaches_its_end_by_half_a_cosine():
    momentum = Momentum(0.9, 1.0, 4)
    assert [momentum.at(step) for step in (0, 2, 4, 9)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert momentum.at(1) == pytest.approx(1 - 0.1 * (1 + math.cos(math.pi / 4)) / 2)


def test_a_twin_has_no_gradient_and_a_student_keeps_its_own():
    module = student()
    twin = Twin(module, Momentum())
    x = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    assert not twin(x).requires_grad
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_twin_that_follows_sends_each_token_where_the_student_sent_it():
    module = student()
    twin = Twin(module, Momentum(0.5), TwinGates.FOLLOWED)
    with torch.no_grad():  # gates of its own would send tokens elsewhere
        for name, parameter in twin.copied.named_parameters():
            if name in gate_names(module):
                parameter.neg_()
    x = torch.randn(16, WIDTH, dtype=torch.float64)
    with noted_routings(module) as routings:
        module(x)
    with noted_routings(twin.copied) as seen:
        got = twin(x, routings=routings)
    torch.testing.assert_close(got, module(x).detach(), rtol=0, atol=1e-14)
    assert not torch.equal(twin.copied(x), got)
    assert torch.equal(routings["1"].expert_ids, next(iter(routings.values())).expert_ids)
    assert not routings["1"].weights.requires_grad
    assert set(seen) == {"1"}


def test_a_twin_that_follows_wants_to_be_told():
    with pytest.raises(ValueError, match="noted_routings"):
        Twin(student(), Momentum(), TwinGates.FOLLOWED)(torch.randn(2, WIDTH, dtype=torch.float64))


def test_a_twin_of_a_dense_model_needs_no_routings():
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    assert torch.equal(Twin(module, Momentum(), TwinGates.FOLLOWED)(x), module(x))


def test_a_saved_twin_moves_on_as_if_it_had_not_stopped():
    module = student()
    through, stopped = (Twin(module, Momentum(0.5, 1.0, 5)) for _ in range(2))
    changed(module)
    for twin in (through, stopped):
        twin.follow(module)
    resumed = Twin(student(3), Momentum(0.5, 1.0, 5))
    resumed.load_state_dict(stopped.state_dict())
    changed(module)
    for twin in (through, resumed):
        twin.follow(module)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in through.state_dict().items())


@pytest.mark.parametrize("wrong", [{"start": -0.1}, {"start": 0.9, "end": 0.8}, {"end": 1.1}, {"steps": -1}])
def test_a_momentum_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="wanted 0 <= start"):
        Momentum(**wrong)
