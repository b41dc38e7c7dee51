"""Every Gluon kernel as it is launched, in the emulator, against loops over experts."""

import pytest
import torch

from synchromesh.kernels.activations import KNOWN
from synchromesh.testing.compare import assert_close

launch = pytest.importorskip("synchromesh.kernels.gluon.launch", reason="this Triton has no Gluon")
LOADS = {  # rows of each expert, and of the tail
    "uneven": ([70, 0, 131, 3], 9),
    "whole_tiles": ([128, 256], 0),
    "first_and_last_empty": ([0, 5, 0], 4),
    "all_empty": ([0, 0], 3),
}
SEEDS = [(0, 0.0), (1, 0.5), (2, 1.0)]  # copies and products end as late as can be, at any time, at once


def load_of(name):
    counts, tail = LOADS[name]
    return torch.tensor(counts).cumsum(0).int(), sum(counts) + tail


def rows_of(ends, num_rows, width, dtype=torch.bfloat16):
    rows = torch.randn(num_rows, width)
    rows[int(ends[-1]) :] = torch.nan
    return rows.to(dtype)


def fresh(*shape, dtype=torch.bfloat16):
    return torch.full(shape, torch.nan, dtype=dtype)


def ranges(ends):
    return [(e, slice(0 if e == 0 else int(ends[e - 1]), int(end))) for e, end in enumerate(ends)]


def multiplied(rows, weight, ends):
    out = torch.zeros(len(rows), weight.shape[2])
    for e, own in ranges(ends):
        out[own] = rows[own].float() @ weight[e].float()
    return out


def each_once(written, ends):
    kept = int(ends[-1])
    return bool((written[:kept] == 1).all()) and not written[kept:].any()


@pytest.fixture(params=["sm_90", "sm_100"])
def architecture(request, monkeypatch):
    monkeypatch.setattr(launch, "architecture_of", lambda device: request.param)
    return request.param


PRODUCTS = [("uneven", kind) for kind in ("biased", "second", "scattered_second")]
PRODUCTS += [(load, kind) for load in LOADS for kind in ("plain", "biased_scattered_scaled")]


@pytest.mark.parametrize("turned", [False, True], ids=["rows_of_k", "columns_of_k"])
@pytest.mark.parametrize(("load", "kind"), PRODUCTS)
@pytest.mark.usefixtures("architecture")
def test_products(emulator, tiled, load, turned, kind):
    torch.manual_seed(0)
    ends, num_rows = load_of(load)
    experts = len(ends)
    a, a2 = (rows_of(ends, num_rows, 72) for _ in range(2))
    w, w2 = (torch.randn(experts, 72, 136).bfloat16() / 8 for _ in range(2))
    if turned:
        w, w2 = (each.mT.contiguous().mT for each in (w, w2))
    bias = torch.randn(experts, 136).bfloat16() if "biased" in kind else None
    scale = torch.rand(num_rows + 1, 1) if "scaled" in kind else None
    tokens = torch.randperm(num_rows).int()
    tokens[int(ends[-1]) :] = -1
    second = (a2, w2) if "second" in kind else None
    scatter = launch.Scatter(tokens, scale) if "scattered" in kind else None
    out = launch.product(a, w, tiled(ends), out=fresh(num_rows, 136), bias=bias, second=second, scatter=scatter)
    wanted, kept = multiplied(a, w, ends), slice(0, int(ends[-1]))
    for e, own in ranges(ends):
        wanted[own] += 0 if bias is None else bias[e].float()
    if second is not None:
        wanted += multiplied(a2, w2, ends)
    if scale is not None:
        wanted *= scale[tokens]
    order = torch.arange(num_rows)[kept] if scatter is None else tokens[kept].long()
    assert_close("rows", out[order], wanted[kept].bfloat16())
    written = emulator.written["out"]
    assert each_once(torch.cat([written[order], written[~torch.isin(torch.arange(num_rows), order)]]), ends)


@pytest.mark.parametrize(("seed", "haste"), SEEDS)
@pytest.mark.usefixtures("architecture")
def test_a_ring_that_goes_round_many_times(emulator, tiled, seed, haste):
    emulator.seed, emulator.haste = seed, haste
    ends = torch.tensor([200, 230], dtype=torch.int32)
    a, w = rows_of(ends, 230, 704), torch.randn(2, 704, 264).bfloat16() / 26
    out = launch.product(a, w, tiled(ends), out=fresh(230, 264))
    assert_close("rows", out, multiplied(a, w, ends).bfloat16())


@pytest.mark.parametrize(("seed", "haste"), SEEDS)
@pytest.mark.usefixtures("architecture")
def test_sums_of_rows_while_many_items_follow_each_other(emulator, seed, haste):
    """Experts of no row, of one and of many, in turn: sums are stored while the next are multiplied."""
    emulator.seed, emulator.haste = seed, haste
    ends = torch.tensor([1, 1, 131, 133, 133, 200], dtype=torch.int32)
    left, right = rows_of(ends, 202, 264), rows_of(ends, 202, 72)
    out = launch.weight_gradient(left, right, ends, out=fresh(6, 264, 72))
    wanted = torch.stack([left[own].float().T @ right[own].float() for _, own in ranges(ends)])
    assert_close("gradient", out, wanted.bfloat16())


@pytest.mark.parametrize(("seed", "haste"), SEEDS)
@pytest.mark.usefixtures("architecture")
def test_opening_tiles_that_follow_each_other(emulator, tiled, seed, haste):
    emulator.seed, emulator.haste = seed, haste
    ends = torch.tensor([200, 330], dtype=torch.int32)
    x, (up, gate) = torch.randn(330, 200).bfloat16(), torch.randn(2, 2, 136, 200).bfloat16() / 14
    hidden = launch.opening(x, up, gate, tiled(ends), torch.arange(330).int(), "relu", hidden=fresh(330, 136))
    h, g = (multiplied(x, each.mT, ends) for each in (up, gate))
    assert_close("hidden", hidden, (g.relu() * h).bfloat16())


OPENINGS = [(kind, "silu", save) for kind in ("plain", "biased", "gated", "gated_biased") for save in (True, False)]
OPENINGS += [("gated", activation, True) for activation in KNOWN if activation != "silu"]


@pytest.mark.parametrize(("kind", "activation", "save"), OPENINGS)
@pytest.mark.usefixtures("architecture")
def test_opening(emulator, tiled, activation, kind, save):
    torch.manual_seed(0)
    counts, choices = [70, 0, 131, 3], 3
    ends = torch.tensor(counts).cumsum(0).int()
    num_rows, kept = sum(counts) + 6, sum(counts)
    x = torch.randn(num_rows // choices, 72).bfloat16()
    pairs = torch.randperm(num_rows // choices * choices)[:num_rows]
    pairs[kept:] = -1
    up, gate = (torch.randn(4, 136, 72).bfloat16() / 8 for _ in range(2))
    biases = tuple(torch.randn(4, 136).bfloat16() if "biased" in kind else None for _ in range(2))
    gated = "gated" in kind
    pre = (fresh(num_rows, 136), fresh(num_rows, 136)) if save else None
    hidden = launch.opening(
        x, up, gate if gated else None, tiled(ends), (pairs // choices).int(), activation,
        hidden=fresh(num_rows, 136), biases=(biases[0], biases[1] if gated else None), pre=pre,
    )  # fmt: skip
    rows = x[pairs.clamp(min=0) // choices]
    wanted = [multiplied(rows, each.mT, ends) for each in (up, gate)]
    for one, bias in zip(wanted, biases, strict=True):
        for e, own in ranges(ends):
            one[own] += 0 if bias is None else bias[e].float()
    h, g = wanted
    act = KNOWN[activation].function
    assert_close("hidden", hidden[:kept], (act(g) * h if gated else act(h))[:kept].bfloat16())
    assert each_once(emulator.written["hidden"], ends)
    for one, got in zip(wanted[: 1 + gated], pre or (), strict=False):
        assert_close("pre-activations", got[:kept], one[:kept].bfloat16())


GRADIENTS = [("uneven", layout) for layout in ("turned", "part_of_a_joint_one")]
GRADIENTS += [(load, "contiguous") for load in LOADS]


@pytest.mark.parametrize(("load", "layout"), GRADIENTS)
@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "in_order"])
@pytest.mark.usefixtures("architecture")
def test_weight_gradients(emulator, load, layout, gathered):
    torch.manual_seed(0)
    ends, num_rows = load_of(load)
    experts = len(ends)
    left, choices = rows_of(ends, num_rows, 136), 2
    pairs = torch.randperm(num_rows + num_rows % 2)[:num_rows]
    pairs[int(ends[-1]) :] = -1
    right = rows_of(ends, num_rows, 72)
    if gathered:
        right = torch.randn((num_rows + 1) // 2, 72).bfloat16()
    out = fresh(experts, 136, 72)
    if layout == "turned":
        out = fresh(experts, 72, 136).mT
    if layout == "part_of_a_joint_one":
        out = fresh(experts, 2 * 136, 72)[:, 136:]
    got = launch.weight_gradient(left, right, ends, out=out, tokens=(pairs // choices).int() if gathered else None)
    assert got.data_ptr() == out.data_ptr()
    source = right[pairs.clamp(min=0) // choices] if gathered else right
    wanted = torch.stack([left[own].float().T @ source[own].float() for _, own in ranges(ends)])
    assert_close("gradient", out, wanted.bfloat16())
    assert layout == "turned" or (emulator.written["out"] == 1).all()


@pytest.mark.usefixtures("architecture")
def test_an_infinite_row_stays_with_its_expert(emulator):
    ends = torch.tensor([70, 100], dtype=torch.int32)
    left, right = rows_of(ends, 100, 128), rows_of(ends, 100, 128)
    left[80], right[90] = torch.inf, torch.nan
    out = launch.weight_gradient(left, right, ends, out=fresh(2, 128, 128))
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()


def test_no_rows_and_no_launch(emulator, tiled):
    ends = torch.zeros(2, dtype=torch.int32)
    empty, w = fresh(0, 16), torch.randn(2, 16, 24).bfloat16()
    assert launch.product(empty, w, tiled(ends), out=fresh(0, 24)).shape == (0, 24)
    assert not launch.weight_gradient(empty, empty, ends, out=fresh(2, 16, 16)).any()
    assert not emulator.written


def test_matrices_with_gaps_are_laid_out_first():
    odd = torch.randn(2, 16, 31)[:, :, :24].bfloat16()
    narrow = torch.randn(2, 16, 20).bfloat16()[:, :, :16]
    for w in (odd, narrow):
        assert torch.equal(launch.laid_out(w), w)
    assert launch.laid_out(narrow).is_contiguous()
    whole = torch.randn(2, 16, 24).bfloat16()
    assert launch.laid_out(whole) is whole
    assert launch.laid_out(whole.mT).data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("width", [136, 264])
@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (True, "gelu"), (False, "relu")])
@pytest.mark.usefixtures("architecture")
def test_closing_backward(emulator, tiled, gated, activation, width):
    torch.manual_seed(0)
    counts, choices = [70, 0, 131, 3], 3
    ends, kept = torch.tensor(counts).cumsum(0).int(), sum(counts)
    num_rows = kept + 6
    grad, down = torch.randn(num_rows // choices, 72).bfloat16(), torch.randn(4, width, 72).bfloat16() / 8
    pairs = torch.randperm(num_rows // choices * choices)[:num_rows]
    pairs[kept:] = -1
    weights = torch.rand(num_rows // choices, choices)
    u, g = (rows_of(ends, num_rows, width) for _ in range(2))
    got = launch.closing_gradient(
        grad, down, weights, tiled(ends), (pairs, (pairs // choices).int()), activation, (u, g if gated else None)
    )
    up, gate = (each.float().requires_grad_() for each in (u, g))
    s = weights.view(-1)[pairs.clamp(min=0), None]
    act = KNOWN[activation].function
    value = act(gate) * up if gated else act(up)
    d = multiplied(grad[pairs.clamp(min=0) // choices], down.mT, ends)
    (value[:kept] * d[:kept] * s[:kept]).sum().backward()
    hidden, d_up, d_gate, partial = got
    assert_close("hidden", hidden[:kept], (value * s)[:kept].detach().bfloat16())
    d = d.detach()
    assert up.grad is not None
    assert_close("gradient of up", d_up[:kept], up.grad[:kept].bfloat16())
    assert_close("weights", partial.sum(0)[:kept].bfloat16(), (value * d)[:kept].sum(1).detach().bfloat16())
    assert (d_gate is None) == (not gated)
    if d_gate is not None and gate.grad is not None:
        assert_close("gradient of gate", d_gate[:kept], gate.grad[:kept].bfloat16())
    assert each_once(emulator.written["hidden"], ends)
    assert (emulator.written["partial"][:, :kept] == 1).all()
