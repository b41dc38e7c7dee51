"""fused_mlp by Gluon's kernels, in the emulator: output and every gradient against the reference."""

import pytest
import torch
import torch.nn.functional as F

from synchromesh.kernels import REFERENCE, MLPWeights
from synchromesh.kernels.fused_mlp import gluon
from synchromesh.kernels.grouped_mm.choice import Cell, Choices, Kind, Measurement
from synchromesh.testing.cases import Case, evil_cases, network_parts
from synchromesh.testing.compare import check

NAMED = {case.name: case for case in evil_cases()}
CASES = [
    *((NAMED["zipf"], kind, F.silu) for kind in ("plain", "biased", "gated", "gated_biased", "joint_biased")),
    *((NAMED[name], "gated", F.silu) for name in ("no_token", "empty_experts", "some_pairs_dropped", "nan_token")),
    (NAMED["some_pairs_absent"], "plain", F.gelu),
    (NAMED["all_to_one_expert"], "gated_biased", F.silu),
    (Case("one_choice_dropped", torch.tensor([[0], [1], [0], [-1], [0], [1]]), 3, capacity=2), "biased", F.relu),
    (Case("two_tiles", torch.randint(2, (150, 2), generator=torch.Generator().manual_seed(0)), 2), "plain", F.relu),
]


def layer(kernels, rowmap, activation, joint):
    def y(x, weights, **mlp):
        return kernels(x, weights, rowmap, MLPWeights(**mlp, joint=joint), activation)

    return y


@pytest.fixture(params=["sm_90", "sm_100"])
def architecture(request, monkeypatch, emulator):
    from synchromesh.kernels.gluon import launch

    for module in (launch, gluon.gluon):
        monkeypatch.setattr(module, "architecture_of", lambda device: request.param)
    return emulator


@pytest.mark.usefixtures("architecture")
@pytest.mark.parametrize(
    ("routed", "kind", "activation"), CASES, ids=lambda one: getattr(one, "name", getattr(one, "__name__", str(one)))
)
def test_output_and_every_gradient(routed, kind, activation):
    torch.manual_seed(0)
    mlp = network_parts(kind, routed.num_experts, torch.bfloat16, width=16, hidden=40)
    inputs = {"x": routed.tokens(16, torch.bfloat16), "weights": routed.weights(torch.bfloat16), **mlp}
    joint = "joint" in kind
    got, wanted = (layer(k, routed.rowmap(), activation, joint) for k in (gluon.fused_mlp, REFERENCE.fused_mlp))
    check(got, wanted, inputs)


def test_inference_keeps_nothing(emulator):
    case = CASES[-1][0]
    mlp = network_parts("gated", 2, torch.bfloat16, width=16, hidden=40)
    x, weights = case.tokens(16, torch.bfloat16), case.weights()
    with torch.no_grad():
        got, wanted = (
            layer(kernels, case.rowmap(), F.silu, joint=False)(x, weights, **mlp)
            for kernels in (gluon.fused_mlp, REFERENCE.fused_mlp)
        )
    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)


def test_it_runs_by_itself_only_where_every_product_was_measured_fastest(monkeypatch):
    family = gluon.gluon
    monkeypatch.setattr(family, "architecture_of", lambda device: "sm_90")
    x, pairs, down = torch.zeros(40, 16, dtype=torch.bfloat16), torch.arange(80), torch.zeros(4, 40, 16)
    about = ("sm_90", "a GPU", "2.13.0", "3.6.0", "abc", "2026-01-01T00:00:00Z")
    cells = [Cell(kind, "bfloat16", 4, 16, 24, 24, 3e-3, 2e-3, 1e-3) for kind in Kind]
    assert not gluon.is_faster(x, pairs, down)
    monkeypatch.setattr(family, "shipped", lambda: Choices((Measurement(*about, tuple(cells)),)))
    assert gluon.is_faster(x, pairs, down)
    monkeypatch.setattr(family, "shipped", lambda: Choices((Measurement(*about, tuple(cells[:2])),)))
    assert not gluon.is_faster(x, pairs, down)
