"""Selective checkpoints: whatever a policy saves of a layer and whatever it recomputes, the gradients are the same."""

import random
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from synchromesh import (
    BiasBalance,
    ExpertChoiceRouter,
    FixedCapacity,
    GatedMLPExperts,
    Grid,
    InBackward,
    LoadBalance,
    MLPExperts,
    ModuleExperts,
    MoE,
    Plan,
    Sharded,
    TopKRouter,
    aux_loss,
    load_stats,
    routing_options,
)
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import rank_device, run_ranks

D, E, T = 8, 4, 24
SAVE, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def everything(_context, _op, *_args, **_kwargs):
    return SAVE


def products(_context, op, *_args, **_kwargs):
    return SAVE if "mm" in str(op) or "mlp" in str(op) else AGAIN


def communication(_context, op, *_args, **_kwargs):
    return SAVE if "c10d" in str(op) else AGAIN


def all_but_ours(_context, op, *_args, **_kwargs):
    return AGAIN if "synchromesh" in str(op) else SAVE


class AtRandom:
    """Saves some calls of an operation and not others."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def __call__(self, _context, _op, *_args, **_kwargs):
        return SAVE if self.rng.random() < 0.5 else AGAIN


POLICIES = {
    "everything": lambda: everything,
    "products": lambda: products,
    "communication": lambda: communication,
    "all but ours": lambda: all_but_ours,
    **{f"at random {seed}": partial(AtRandom, seed) for seed in range(4)},
}
LAYERS = {
    "dropless": lambda: MoE(TopKRouter(D, E, k=2), GatedMLPExperts(E, D, hidden=16), losses=(LoadBalance(0.1),)),
    "capacity": lambda: MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16), capacity=FixedCapacity(1.0)),
    "noise": lambda: MoE(TopKRouter(D, E, k=1, noise=0.5), MLPExperts(E, D, hidden=16)),
    "bias balance": lambda: MoE(TopKRouter(D, E, k=2, balance=BiasBalance(E)), MLPExperts(E, D, hidden=16)),
    "expert choice": lambda: MoE(ExpertChoiceRouter(D, E), MLPExperts(E, D, hidden=16)),
    "modules": lambda: MoE(TopKRouter(D, E, k=2), ModuleExperts([nn.Linear(D, D) for _ in range(E)])),
    "loss in backward": lambda: MoE(
        TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16), losses=(LoadBalance(0.1),), losses_in_backward=InBackward()
    ),
}


def selective(run, policy, *args, **options):
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **options)


def step(net, x, run):
    """Return the gradients of a step, and the load that the layers took note of."""
    net.zero_grad()
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    (run(x).square().mean() + aux_loss(net)).backward()
    load = {f"load of {name}": stats.tokens_per_expert for name, stats in load_stats(net).items()}
    return {"x": x.grad} | {name: p.grad.clone() for name, p in net.named_parameters()} | load


def compare(net, x, policy, **options):
    wanted, got = step(net, x, net), step(net, x, partial(selective, net, policy, **options))
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_the_same_gradients_and_load_whatever_is_saved(layer, policy):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, D), LAYERS[layer](), nn.Linear(D, D)).double()
    x = torch.randn(T, D).double()
    compare(net, x, POLICIES[policy]())
    with routing_options(net, mask=torch.arange(T) % 3 > 0):
        compare(net, x, POLICIES[policy](), preserve_rng_state=layer != "noise")


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_experts_are_checkpointed(wrap):
    torch.manual_seed(0)
    net = MoE(TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16)).double().eval()
    wrap(net.experts, "up")
    x = torch.randn(T, D).double()
    wanted, got = step(net, x, net), step(net, x, lambda x: checkpoint(net, x, use_reentrant=False))
    for name, tensor in wanted.items():
        assert_close(name, got[name], tensor)


@pytest.mark.parametrize("policy", ["everything", "products", "at random 0"])
def test_a_backbone_has_the_same_gradients_whatever_is_saved(policy):
    experts = ExpertsConfig(blocks=((), (0,)), num_experts=4, dropout=0.0)
    config = SwinV2Config(
        image_size=16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, drop_path=0.0, experts=experts
    )
    torch.manual_seed(0)
    net = config.build().double()

    def pooled(run, images):
        return run(images).pooled

    x = torch.randn(2, 3, 16, 16).double()
    wanted = step(net, x, partial(pooled, net))
    got = step(net, x, lambda images: selective(partial(pooled, net), POLICIES[policy](), images))
    for name, tensor in wanted.items():
        assert_close(name, got[name], tensor)


def on_ranks(names):
    grid = Grid.from_group(dist.group.WORLD)
    for plan in (Plan(), Plan(gather=2), Plan(chunks=2)):
        torch.manual_seed(0)
        layer = MoE(
            TopKRouter(D, E, k=2), MLPExperts(E, D, hidden=16), losses=(LoadBalance(0.1),),
            strategy=Sharded(grid, plan=plan),
        )  # fmt: skip
        net = nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, D)).double().to(rank_device())
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(dist.get_rank())).double().to(rank_device())
        for name in names:
            compare(net, x, POLICIES[name]())


def test_ranks_have_the_same_gradients_whatever_is_saved(device):
    run_ranks(on_ranks, 2, list(POLICIES), device=device)
