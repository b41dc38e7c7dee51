import pytest
import torch
from torch import nn

from synchromesh.compat.tutel.gates import CosineTopKGate, LinearTopKGate, build_gates
from synchromesh.testing.compare import assert_close

D, E = 6, 4


class Custom(nn.Module):
    def __init__(self, model_dim, num_global_experts, top_k):
        super().__init__()
        self.top_k, self.own = top_k, nn.Linear(model_dim, num_global_experts)

    def forward(self, x):
        return self.own(x)


class WithoutChoices(nn.Linear):
    def __init__(self, model_dim, num_global_experts):
        super().__init__(model_dim, num_global_experts)


def built(gate_type, seed=None):
    return build_gates(gate_type, model_dim=D, num_experts=E, seed=seed, capacity_factor=1.5)


def test_each_gate_has_its_own_seed_and_settings():
    gates = built([{"type": "top", "k": 9}, {"type": "cosine_top", "proj_dim": 8, "gate_noise": 0.5}], seed=3)
    torch.manual_seed(3)
    assert_close("first", gates[0].wg.weight, nn.Linear(D, E, bias=False).weight)
    torch.manual_seed(4)
    assert_close("second", gates[1].cosine_projector.weight, nn.Linear(D, 8).weight)
    torch.randn(8, E)
    assert_close("directions", gates[1].sim_matrix, 0.01 * torch.randn(8, E))
    assert [(gate.top_k, gate.gate_noise, gate.capacity_factor) for gate in gates] == [(4, 0.0, 1.5), (1, 0.5, 1.5)]
    assert list(gates.state_dict()) == [
        "0.wg.weight",
        "1.temperature",
        "1.sim_matrix",
        "1.cosine_projector.weight",
        "1.cosine_projector.bias",
    ]
    assert gates[1].temperature.item() == pytest.approx(torch.tensor(2.0).log().item())


def test_the_temperature_of_a_cosine_gate_has_a_floor():
    gate = CosineTopKGate(D, E)
    with torch.no_grad():
        gate.temperature.fill_(50.0)
    assert gate(torch.randn(5, D)).abs().max() <= 100.1


@pytest.mark.parametrize("gate", [LinearTopKGate, CosineTopKGate])
def test_a_gate_of_float32_stays_one(gate):
    model = nn.Sequential(gate(D, E, fp32_gate=True), nn.Linear(D, E)).bfloat16()
    assert {p.dtype for p in model[0].parameters()} == {torch.float32}
    assert model[1].weight.dtype == torch.bfloat16
    assert model[0](torch.randn(3, D, dtype=torch.bfloat16)).dtype == torch.float32
    plain = gate(D, E).double()
    assert plain(torch.randn(3, D)).dtype == torch.float64


def test_custom_gates_and_names_of_old():
    (gate,) = built({"type": "custom", "module": Custom, "top_k": 2})
    assert (gate.top_k, gate.gate_noise, gate.capacity_factor) == (2, 0.0, 1.5)
    with pytest.warns(UserWarning, match="write .'type': 'top', 'k': 2."):
        assert built("Top2Gate")[0].top_k == 2


def test_dictionaries_are_left_as_they_are():
    settings = {"type": "top", "k": 2}
    built(settings)
    assert settings == {"type": "top", "k": 2}


@pytest.mark.parametrize(
    ("gate_type", "said"),
    [
        ({"type": "best"}, "of type 'best', wanted 'top', 'cosine_top'"),
        ({"k": 2}, "of type None, wanted"),
        ({"type": "custom"}, "'custom' with a 'module'"),
        ({"type": "custom", "module": WithoutChoices}, "WithoutChoices has no top_k"),
        ({"type": "top", "k": 0}, "k of the gate is 0"),
        ({"type": "top", "proj_dim": 8}, r"gate_type holds \['proj_dim'\]"),
        ("Top2", "gate_type is 'Top2', wanted a dict"),
        ([], r"gate_type is \[\], wanted a dict such as"),
        ({"type": "top", "capacity_factor": "a"}, "capacity_factor is 'a', wanted a number"),
    ],
)
def test_wrong_gates_are_refused(gate_type, said):
    with pytest.raises(ValueError, match=said):
        built(gate_type)
