"""Every layout that transformers' decorator describes, against a loop over pairs in float64."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from synchromesh.compat.huggingface.backend import experts_forward
from synchromesh.compat.huggingface.networks import Form, network_of, plain_activation, weights_from
from synchromesh.testing.cases import evil_cases
from synchromesh.testing.compare import check

E, D, H = 3, 8, 6
FORMS = [
    {},
    {"has_bias": True},
    {"is_transposed": True},
    {"is_transposed": True, "has_bias": True, "is_concatenated": False},
    {"is_concatenated": False},
    {"has_gate": False},
    {"has_gate": False, "has_bias": True, "is_transposed": True},
    {"has_post_expert_norm": True},
]
EVIL = [case for case in evil_cases() if case.capacity is None and not case.nan_tokens and len(case.expert_ids) < 99]


def named(form):
    return ", ".join(form) or "plain"


class Norm(nn.Module):
    """A norm with a weight, whose gradient sums over all rows it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D, dtype=torch.float64) + 0.5)

    def forward(self, x):
        return F.layer_norm(x, (D,)) * self.weight


class Learned(nn.Module):
    """An activation with a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return F.silu(x) + self.slope * x


def experts_of(form, *, act="silu", experts=E, gate=None):
    """A module such as a modelling file of transformers defines, with random weights."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            whole = Form(**form)
            self.num_experts, first = experts, (2 if whole.has_gate else 1) * H
            shapes = [(experts, first, D), (experts, D, H), (experts, first), (experts, D)]
            for name, shape in zip(whole.names, shapes, strict=False):
                shape = (experts, *reversed(shape[1:])) if whole.is_transposed and len(shape) == 3 else shape
                self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
            self.act_fn = Learned() if act == "learned" else ACT2FN[act]
            if whole.has_post_expert_norm:
                self.post_expert_norm = Norm()

        if gate is not None:
            _apply_gate = gate

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("the eager forward was called")

    torch.manual_seed(0)
    return use_experts_implementation(Experts, **form)(SimpleNamespace(_experts_implementation="synchromesh"))


def interleaved_gate(self, gate_up):
    return (gate_up[..., 1::2].clamp(-1, 1) + 1) * self.act_fn(gate_up[..., ::2].clamp(max=1.5))


def one_expert(module, e, x, weights):
    """The network of an expert, from what the decorator's flags mean."""
    form = Form.of(module)
    first, down, *biases = (weights[name][e] for name in form.names)
    hidden = x @ (first if form.is_transposed else first.T) + (biases[0] if biases else 0)
    if form.has_gate and type(module)._apply_gate.__name__ == "interleaved_gate":
        hidden = module._apply_gate(hidden)
    elif form.has_gate:
        gate, up = hidden.chunk(2, -1)
        hidden = module.act_fn(gate) * up
    else:
        hidden = module.act_fn(hidden)
    y = hidden @ (down if form.is_transposed else down.T) + (biases[1] if biases else 0)
    return module.post_expert_norm(y) if form.has_post_expert_norm else y


def by_pairs(module, ids, x, scale, **weights):
    y = []
    for t in range(len(x)):
        present = [k for k in range(ids.shape[1]) if 0 <= ids[t, k] < module.num_experts]
        y.append(0 * x[t] + sum(scale[t, k] * one_expert(module, int(ids[t, k]), x[t], weights) for k in present))
    used = 0 * (scale.sum() + sum(w.sum() for w in weights.values()))  # no gradient is a gradient of 0
    return (torch.stack(y) if y else x) + used


def by_backend(module, ids, x, scale, **weights):
    return torch.func.functional_call(module, weights, (x, ids, scale))


def check_module(module, ids, x, scale):
    own = {name: p.detach() for name, p in module.named_parameters()}

    def defined(x, scale, **weights):
        learned = {name: w for name, w in weights.items() if "." in name}
        with nn.utils.stateless._reparametrize_module(module, learned):
            return by_pairs(module, ids, x, scale, **weights)

    check(functools.partial(by_backend, module, ids), defined, {"x": x, "scale": scale, **own})


@pytest.fixture(autouse=True)
def _registered():
    from synchromesh.compat.huggingface import register

    register()


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu2", "learned"])
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_every_form_equals_the_definition(form, act):
    if not Form(**form).is_concatenated:
        module = experts_of(form, act=act, gate=interleaved_gate)
    else:
        module = experts_of(form, act=act)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    x, scale = torch.randn(5, D, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    check_module(module, ids, x, scale)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[7]], ids=named)
@pytest.mark.parametrize("case", EVIL, ids=lambda case: case.name)
def test_evil_cases_with_absent_pairs_in_both_spellings(form, case):
    """Expert parallelism of transformers marks a pair of another rank by the id E; memory is NaN under test."""
    gate = None if Form(**form).is_concatenated else interleaved_gate
    module = experts_of(form, act="learned", experts=case.num_experts, gate=gate)
    module._is_expert_parallel = True
    x, scale = case.tokens(D, torch.float64), case.weights(torch.float64).nan_to_num(0.0)
    for absent in (-1, case.num_experts):
        check_module(module, case.expert_ids.masked_fill(case.expert_ids < 0, absent), x, scale)


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_weights_are_read_where_they_lie(form):
    module = experts_of(form)
    owned = {p.untyped_storage().data_ptr() for p in module.parameters()}
    network = network_of(module)
    views = [*network.weights.tensors(), *(network.opening or ())]
    assert {view.untyped_storage().data_ptr() for view in views if view is not None} <= owned


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_weights_go_back_to_the_layout_they_came_from(form):
    module = experts_of(form)
    again = weights_from(module, network_of(module).weights)
    assert list(again) == Form(**form).names
    for name, weight in again.items():
        assert torch.equal(weight, getattr(module, name))


def test_known_activations_are_told_to_the_kernels():
    def activation(form, **more):
        return plain_activation(experts_of(form, **more), Form(**form))

    assert activation({}, act="silu") is F.silu
    assert activation({}, act="gelu") is F.gelu
    assert activation({"has_post_expert_norm": True}) is None
    assert activation({}, gate=interleaved_gate) is None


def test_a_module_of_an_early_release_says_less():
    module = experts_of({})
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm"):
        delattr(module, flag)
    assert Form.of(module) == Form()
    x = torch.randn(4, D, dtype=torch.float64)
    check_module(module, torch.tensor([[0], [1], [2], [0]]), x, torch.rand(4, 1, dtype=torch.float64))


def test_no_gradient_is_made_where_none_is_wanted():
    module = experts_of({}).requires_grad_(False)
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    experts_forward(
        module, x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.float64)
    ).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in module.parameters())
