"""transformers spreads the experts itself, over any of its meshes; this library runs them."""

import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from synchromesh import Adaptive, MoE, Plan, Sharded
from synchromesh.compat.huggingface import register
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks


def gathered(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step_on(folder, sizes, strategy, steps):
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # as transformers wants to be told
    register(strategy=strategy)
    whole = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation="synchromesh",
        distributed_config=DistributedConfig(ep_implementation="synchromesh", **sizes),
    )
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    assert len(layers) == 2
    assert all(layer.experts.num_experts == 4 and layer.strategy.grid.size == sizes["ep_size"] for layer in layers)
    shared = sizes.get("tp_size", 1)  # ranks that hold one batch
    generators = [torch.Generator().manual_seed(at // shared) for at in range(world)]
    batches = [torch.randint(3, 60, (2, 7 + 2 * (at // shared)), generator=g) for at, g in enumerate(generators)]
    model.train()
    for _ in range(steps):
        model.zero_grad()
        loss = model(batches[rank], labels=batches[rank], use_cache=False).loss
        loss.backward()
    losses = [whole(batch, labels=batch, use_cache=False).loss for batch in batches]
    torch.stack(losses).mean().backward()
    assert_close("loss", loss.detach(), losses[rank].detach())
    for (name, parameter), (same, wanted) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert name == same
        assert_close(f"gradient of {name}", gathered(parameter.grad), wanted.grad)
    if strategy is Adaptive:
        assert all(len(layer.strategy.record) > 1 for layer in layers)


def pooled(grid):
    return Sharded(grid, plan=Plan(gather=2))


def exchanged(grid):
    return Sharded(grid, plan=Plan(chunks=2))


def all_of(cases):
    for case in cases:
        step_on(*case)


def test_a_step_on_two_ranks_equals_one_process(saved):
    cases = [
        (saved("mixtral"), {"fsdp_size": 2, "ep_size": 2}, exchanged, 1),
        (saved("gpt_oss"), {"tp_size": 2, "ep_size": 2}, pooled, 1),
        (saved("qwen3_moe"), {"fsdp_size": 2, "ep_size": 2}, Adaptive, 9),
    ]
    run_ranks(all_of, 2, cases)


def test_a_step_on_four_ranks_equals_one_process(saved):
    cases = [
        (saved("mixtral"), {"fsdp_size": 4, "ep_size": 2}, pooled, 1),
        (saved("gpt_oss"), {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}, exchanged, 1),
    ]
    run_ranks(all_of, 4, cases)
