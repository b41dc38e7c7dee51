"""What scripts do with `tutel.moe`, in the shapes of Tutel's own tests."""

import copy
import dataclasses
import io
import os
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from synchromesh import load_stats, record_load
from synchromesh.compat.tutel import moe
from synchromesh.testing.compare import TOLERANCE, assert_close, relative_rms
from synchromesh.testing.distributed import run_ranks
from synchromesh.testing.programs import run_program

HUGE = 2048


@dataclass(frozen=True)
class Hello:
    """Arguments of the program that Tutel measures itself by."""

    top: int = 2
    number: int = 2
    dim: int = 32
    tokens: int = 24
    batch: int = 4
    factor: float = 1.0
    lr: float = 1e-2
    parallel: str = "adaptive:1"
    overlap: int = 1
    two_level: bool = False
    kind: str = "ffn"


def losses_of(hello, steps):
    """Return the first losses: each step but the last trains."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    settings = {"type": hello.kind, "count_per_node": hello.number, "hidden_size_per_expert": hello.dim}
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": hello.top, "capacity_factor": hello.factor},
        experts={**settings, "activation_fn": lambda x: F.relu(x)},
        model_dim=hello.dim,
        scan_expert_func=lambda name, param: setattr(param, "skip_allreduce", True),
        seeds=(1, rank + 1, 1),
        a2a_ffn_overlap_degree=hello.overlap,
        parallel_type=hello.parallel,
        use_2dh=hello.two_level,
    )
    optimizer = torch.optim.SGD(layer.parameters(), lr=hello.lr)
    torch.manual_seed(0)
    x = torch.randn(hello.batch, hello.tokens, hello.dim)
    y = torch.LongTensor(hello.batch).random_(1)
    shared = [p for p in layer.parameters() if not hasattr(p, "skip_allreduce")]
    losses = []
    for step in range(steps):
        with torch.set_grad_enabled(step < steps - 1):
            loss = F.nll_loss(F.log_softmax(layer(x).sum(2), 1), y)
        losses.append(loss.item())
        if step == steps - 1:
            return losses
        optimizer.zero_grad()
        loss.backward()
        for p in shared if world > 1 else []:
            p.grad /= world
            dist.all_reduce(p.grad)
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("top", "number", "wanted"),
    [(1, 1, [29.985]), (1, 2, [22.076, 21.388]), (2, 2, [24.080])],
)
def test_losses_are_the_published_ones(top, number, wanted):
    """Those that Tutel keeps for its own regression tests, to all their digits; a training step takes long on a CPU."""
    hello = Hello(top=top, number=number, dim=HUGE, tokens=1024, batch=16, lr=1e-5)
    assert [round(loss, 3) for loss in losses_of(hello, len(wanted))] == wanted


def ranks_losses(hellos, steps):
    return [losses_of(hello, steps) for hello in hellos]


BASE = Hello(number=2)
SHARED = Hello(number=-2, factor=0.0)


@pytest.mark.parametrize("world", [1, 2])
def test_every_way_to_run_a_layer_gives_the_same_losses(world):
    """Degrees of overlap, kinds of exchange, data and model parallelism, whole and shared experts."""
    groups = [
        [BASE, *(dataclasses.replace(BASE, overlap=degree) for degree in (2, 3, 4))],
        [BASE, dataclasses.replace(BASE, two_level=True), dataclasses.replace(BASE, two_level=True, overlap=2)],
        [dataclasses.replace(BASE, parallel=kind) for kind in ("adaptive:0", "adaptive:1", "data", "model", "auto")],
    ]
    if world > 1:
        kinds = ("adaptive:0", "adaptive:1", "adaptive:2", "data", "model", "auto")
        groups += [
            [dataclasses.replace(SHARED, parallel=kind, kind=own) for kind in kinds] for own in ("ffn", "llama_ffn")
        ]
    hellos = [hello for group in groups for hello in group]
    losses = ranks_losses(hellos, 3) if world == 1 else run_ranks(ranks_losses, world, hellos, 3)[0]
    found = iter(losses)
    for group in groups:
        first, *others = (next(found) for _ in group)
        for hello, own in zip(group[1:], others, strict=True):
            assert_close(str(hello), torch.tensor(own), torch.tensor(first))


def test_names_are_there():
    assert moe.top_k_routing is moe.extract_critical
    assert moe.moe_layer.global_expert_count(2) == 2
    assert all(hasattr(moe, name) for name in moe.__all__)


D, H, E = 8, 16, 4


def layer(gate=None, experts=None, **kwargs):
    gate = {"type": "top", "k": 2, "capacity_factor": 0.5} if gate is None else gate
    settings = {"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H, **(experts or {})}
    return moe.moe_layer(gate, D, settings, seeds=(1, 1, 1), **kwargs)


def dropped(own, x, **kwargs):
    with record_load(own) as loads:
        own(x, **kwargs)
    return int(loads[""].dropped)


def test_zero_means_zero():
    own, x = layer(), torch.randn(5, 7, D)
    assert dropped(own, x) > 0
    assert dropped(own, x, capacity_factor=0) == 0
    y = own(x, top_k=0)
    assert (y == 0).all()
    (y.sum() + y.l_aux).backward()
    assert all((p.grad == 0).all() for p in own.parameters())
    assert dropped(own, x, top_k=1, capacity_factor=0) == 0
    assert own.dispatch_count.sum() == 35


def test_a_priority_drops_nothing_where_the_capacity_is_what_is_needed():
    """Tutel computes a capacity that is too small here, and drops."""
    own, x = layer(batch_prioritized_routing=True), torch.randn(64, D)
    assert dropped(own, x, capacity_factor=0) == 0
    assert dropped(own, x, capacity_factor=-99.0) == 0


def test_the_loss_stands_on_the_output_and_in_the_layer():
    own = layer(result_func=lambda y: (y, y.l_aux))
    y, l_aux = own(torch.randn(5, 7, D))
    assert y.shape == (5, 7, D)
    assert own.l_aux is l_aux is y.l_aux
    copy.deepcopy(own)
    restored = io.BytesIO()
    torch.save(own.state_dict(), restored)
    assert load_stats(own)[""].tokens_per_expert.sum() == 70


def test_parameters_are_marked_and_iterated():
    marked = []
    own = layer(scan_expert_func=lambda name, param: marked.append(name))
    names = ["batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias"]
    assert marked == [name for name, _ in own.get_parameter_iterator("local_experts")] == names
    assert [name for name, _ in own.get_parameter_iterator("gate")] == ["0.wg.weight"]
    assert all(p._tutel_expert for p in own.experts.parameters())
    assert not any(hasattr(p, "_tutel_expert") for p in own.gates.parameters())


def test_each_call_may_choose_its_gate():
    own = layer(gate=[{"type": "top", "k": 1}, {"type": "cosine_top", "k": 3}])
    x = torch.randn(20, D)
    own(x)
    assert own.dispatch_count.sum() == 20
    own(x, gate_index=1)
    assert own.dispatch_count.sum() == 60


def test_settings_of_a_call_stay():
    own = layer()
    own(torch.randn(9, D), a2a_ffn_overlap_degree=3, adaptive_r=0)
    own(torch.randn(9, D))
    assert (own.a2a_ffn_overlap_degree, own.adaptive_degree) == (3, 0)


def test_blocks_round_the_capacity_up_without_gradients():
    own, x = layer(), torch.randn(64, D)
    rows = 2 * int(0.5 * 16)
    loads = torch.zeros(E, dtype=torch.int64)
    with torch.no_grad():
        own(x)
        loads = own.dispatch_count
        assert dropped(own, x, megablocks_size=15) == (loads - 30).clamp(min=0).sum()
    assert dropped(own, x, megablocks_size=15) == (loads - rows).clamp(min=0).sum()


def test_dtypes_follow_tutel():
    x, own = torch.randn(4, 6, D), layer(gate={"type": "top", "fp32_gate": True})
    wanted = own(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = own(x)
    assert y.dtype == torch.float32
    assert relative_rms(y, wanted) < 2 * TOLERANCE[torch.bfloat16]
    y = own.bfloat16()(x)
    assert (y.dtype, own.gates[0].wg.weight.dtype) == (torch.float32, torch.float32)
    assert relative_rms(y, wanted) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    own = layer(gate={"type": "top", "k": 2, "gate_noise": 1.0})
    x, grads = torch.randn(20, D), []
    for checkpointed in (False, True):
        own.zero_grad()
        start = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(own, start, use_reentrant=reentrant) if checkpointed else own(start)
        y.square().sum().backward()
        grads.append([start.grad, *(p.grad.clone() for p in own.parameters())])
    for got, wanted in zip(*grads, strict=True):
        assert_close("gradient", got, wanted)
    if not reentrant:  # whose first forward has no gradients, as evaluation
        assert load_stats(own)[""].tokens_per_expert.sum() == 80


def test_variables_of_the_environment_are_obeyed(monkeypatch):
    monkeypatch.setenv("SKIP_EXPERT", "1")
    monkeypatch.setenv("CAP_FACTOR", "0")
    monkeypatch.setenv("BATCH_PRIO", "1")
    own, x = layer(gate={"type": "top", "k": 2}), torch.randn(20, D)
    assert own.batch_prioritized_routing
    assert_close("skipped experts", own(x), x)
    monkeypatch.setenv("SKIP_MOE", "1")
    assert layer()(x) is x


def test_dictionaries_are_left_as_they_are():
    gate, experts = {"type": "top", "k": 2}, {"type": "ffn", "count_per_node": 2, "hidden_size_per_expert": H}
    before = copy.deepcopy((gate, experts))
    moe.moe_layer(gate, D, experts)
    moe.moe_layer(gate, D, experts)
    assert (gate, experts) == before


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: moe.moe_layer({"type": "top"}, 7, {}), "model_dim is 7, wanted an even number"),
        (lambda: moe.moe_layer({"type": "top"}, D, None), "experts are None, wanted a dict"),
        (lambda: layer(top_k=2), r"unknown arguments \['top_k'\]"),
        (lambda: layer(parallel_type="expert"), "wanted 'adaptive:r'"),
        (lambda: layer(a2a_ffn_overlap_degree=0), "a2a_ffn_overlap_degree is 0, wanted at least 1"),
        (lambda: layer(experts={"num_experts_per_device": -2}), "so that 2 devices share an expert, on 1 devices"),
        (lambda: layer().get_parameter_iterator("all"), "param_type is 'all', wanted 'gate' or 'local_experts'"),
        (lambda: layer()(torch.randn(5, D + 2)), "wanted last dims of 8"),
        (lambda: layer()(torch.randn(D)), "got an input of 1 dims"),
        (lambda: layer()(torch.randn(5, D), adaptive_r=2), "r is 2, wanted one of"),
        (lambda: layer(is_gshard_loss=False)(torch.randn(5, D)), "got gate_noise 0.0"),
    ],
)
def test_wrong_use_is_refused(build, said):
    with pytest.raises(ValueError, match=said):
        build()


WRONG = """
import torch
from synchromesh.compat.tutel.moe import moe_layer

def layer(gate={"type": "top"}, dim=8, **options):
    return moe_layer(gate, dim, {"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 4}, **options)

x = torch.randn(3, 8)
for build, said in (
    (lambda: layer()(x, gate_index=3), "gate_index is 3, wanted 0 to 0"),
    (lambda: layer()(x, gate_index=0.0), "gate_index is 0.0, wanted a whole number"),
    (lambda: layer()(x, top_k=2.0), "top_k is 2.0, wanted a whole number"),
    (lambda: layer()(x, capacity_factor="a"), "capacity_factor is 'a', wanted a number"),
    (lambda: layer(dim="8"), "model_dim is '8', wanted an even number"),
    (lambda: layer(gate=None), "gate_type is None, wanted a dict"),
    (lambda: layer(parallel_type=None), "parallel_type is None, wanted 'adaptive:r'"),
):
    try:
        build()
    except ValueError as error:
        assert str(error).startswith(said), error
    else:
        raise AssertionError(said)
"""


def test_wrong_types_are_refused():
    """In a process of its own, without the checks of types that tests run with."""
    done = run_program("-c", WRONG)
    assert done.returncode == 0, done.stderr


def test_what_has_no_meaning_any_more_is_said():
    with pytest.warns(UserWarning, match="samples are never padded"):
        layer(pad_samples=True)


def uneven():
    """Ranks of different numbers of tokens: none, few, many; what each dropped, and whether gradients are all there."""
    return [dropped_of(dist.get_rank(), inequivalent) for inequivalent in (False, True)]


def dropped_of(rank, inequivalent):
    own = layer(experts={"num_experts_per_device": 1}, gate={"type": "top", "k": 1, "capacity_factor": 1.0})
    x = torch.zeros([0, 8, 32, 8][rank], D) + 1  # all tokens go to one expert
    lost = dropped(own, x.requires_grad_(), inequivalent_tokens=inequivalent)
    own(x, inequivalent_tokens=inequivalent).sum().backward()
    return lost, all(p.grad is not None for p in own.parameters())


def test_uneven_ranks_do_not_hang():
    without, agreed = zip(*run_ranks(uneven, 4), strict=True)
    assert without == ((0, True), (6, True), (24, True), (6, True))
    assert agreed == ((0, True), (0, True), (24, True), (0, True))


def in_groups():
    """Experts in pairs of ranks, at every degree: the same numbers as in a job of two."""
    rank = dist.get_rank()
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    found = []
    for number in (1, -2):
        settings = {"type": "ffn", "num_experts_per_device": number, "hidden_size_per_expert": H}
        torch.manual_seed(rank // 2)
        own = moe.moe_layer(
            {"type": "top", "capacity_factor": 0}, D, settings, group=group, seeds=(1, 1 + rank % 2, rank)
        )
        assert own.group is group
        for degree in own.valid_rs:
            own.zero_grad()
            x = torch.randn(6, D, generator=torch.Generator().manual_seed(rank % 2))
            y = own(x, adaptive_r=degree)
            y.square().sum().backward()
            found.append([y.sum().item(), own.experts.batched_fc1_w.grad.norm().item()])
    return found


def test_a_group_is_a_world_of_its_own():
    first, second, third, fourth = run_ranks(in_groups, 4)
    assert first == third
    assert second == fourth
    for found in (first, second):
        for got, wanted in zip((found[1], found[3], found[4]), (found[0], found[2], found[2]), strict=True):
            assert got == pytest.approx(wanted)


def on_nodes():
    """Two nodes of two ranks: an exchange in two levels, and what it gives."""
    rank = dist.get_rank()
    os.environ.update(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    found = []
    for two_level in (False, True):
        own = layer(experts={"num_experts_per_device": 1}, use_2dh=two_level, a2a_ffn_overlap_degree=2)
        x = torch.randn(9, D, generator=torch.Generator().manual_seed(rank))
        found.append(own(x).detach().numpy())
        assert load_stats(own)[""].plan.two_level == two_level
    return found


def test_an_exchange_may_take_two_levels():
    for flat, two_level in run_ranks(on_nodes, 4):
        assert_close("two levels", torch.from_numpy(two_level), torch.from_numpy(flat))


def adapting():
    """What 'auto' runs, and whether it is right, until a degree is named."""
    rank = dist.get_rank()
    fixed, auto = (layer(experts={"num_experts_per_device": -2}, parallel_type=kind) for kind in ("adaptive:1", "auto"))
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(rank))
    for _ in range(12):
        for own in (fixed, auto):
            own.zero_grad()
            own(x).square().sum().backward()
        for got, wanted in zip(auto.parameters(), fixed.parameters(), strict=True):
            assert_close("gradient under 'auto'", got.grad, wanted.grad)
    plans = {str(plan) for _, plan in auto._strategy.record}
    auto(x, adaptive_r=2)
    return len(plans), str(load_stats(auto)[""].plan), auto.adaptive_degree


def test_auto_tries_plans_and_changes_nothing_else():
    for tried, last, degree in run_ranks(adapting, 2):
        assert tried > 1
        assert (last, degree) == ("g=1", 2)


def frozen():
    """Gradients of what is not frozen: a bias, or all experts, at every degree."""
    rank, found = dist.get_rank(), []
    own = layer(experts={"num_experts_per_device": -2})
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(rank))
    for names in ([], ["batched_fc2_bias"], ["batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias"]):
        for name, p in own.get_parameter_iterator("local_experts"):
            p.requires_grad_(name not in names)
        for degree in own.valid_rs:
            own.zero_grad()
            start = x.clone().requires_grad_()
            own(start, adaptive_r=degree).square().sum().backward()
            grads = {"x": start.grad, **{name: p.grad for name, p in own.named_parameters() if p.grad is not None}}
            assert len(grads) == 6 - len(names)
            found.append({name: grad.numpy() for name, grad in grads.items()})
    return found


def test_frozen_parameters_leave_the_others_as_they_are():
    for all_grads, *others in run_ranks(frozen, 2):
        for grads in others:
            for name, grad in grads.items():
                if name != "gates.0.wg.weight":  # of one expert: nothing but rounding
                    assert_close(name, torch.from_numpy(grad), torch.from_numpy(all_grads[name]))
