"""Experts of transformers models on several ranks, by any plan: the numbers of one process with all experts.

Ranks take seconds to import transformers, so each start of them runs all there is to run on so many.
"""

import copy
import io
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from synchromesh import Grid, Plan, Sharded, Tuned, adaptive_layers, clip_grad_norm, load_stats, parallelize
from synchromesh.compat.huggingface import full_state_dict, parallelize_experts
from synchromesh.testing.compare import assert_close, relative_rms
from synchromesh.testing.distributed import run_ranks

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", "qwen3_vl_moe"]
# Float64 models still turn and score tokens in float32, whose rounding stays where that is the same in both.
EXACT = 1e-7


def load(folder):
    vision = AutoConfig.from_pretrained(folder).model_type == "qwen3_vl_moe"
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return auto.from_pretrained(folder, experts_implementation="eager").double()


def batch_of(model, rank):
    """Prompts of another length on each rank, with an image where the model sees."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, 60, (1 + rank % 2, 7 + 2 * rank), generator=generator)
    if model.config.model_type != "qwen3_vl_moe":
        return {"input_ids": ids, "labels": ids}
    ids[:, 1:5] = 60
    pixels = torch.randn(16 * len(ids), 96, generator=generator, dtype=torch.float64)
    image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * len(ids))}
    return {"input_ids": ids, "labels": ids, "mm_token_type_ids": (ids == 60).long(), **image}


def step(run, model, batch):
    model.zero_grad()
    loss = run(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach()


def assert_near(name, got, wanted):
    assert got.shape == wanted.shape, name
    assert relative_rms(got, wanted) <= EXACT, f"{name}: {relative_rms(got, wanted)}"


def assert_step_equal(run, model, whole, grid):
    """One step on ranks against the mean of the ranks' losses in one process, which is this one."""
    loss = step(run, model, batch_of(model, grid.rank))
    batches = [batch_of(model, rank) for rank in range(grid.size)]
    whole.zero_grad()
    losses = [whole(**batch, use_cache=False).loss for batch in batches]
    torch.stack(losses).mean().backward()
    assert_near("loss", loss, losses[grid.rank].detach())
    grads = copy.deepcopy(model)
    for into, parameter in zip(grads.parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None
        into.data = parameter.grad
    got = full_state_dict(grads, grid)
    for name, parameter in whole.named_parameters() if grid.rank == 0 else ():
        assert_near(f"gradient of {name}", got[name], parameter.grad)


def step_of(folder, plan):
    grid = Grid.from_group(dist.group.WORLD)
    whole = load(folder)
    model = copy.deepcopy(whole)
    names = parallelize_experts(model, grid, strategy=lambda: Sharded(grid, plan=plan))
    assert names == [name for name in names if name.endswith("mlp.experts")]
    held = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert held * grid.size == sum(p.numel() for n, p in whole.named_parameters() if ".experts." in n)
    assert_step_equal(parallelize(model, grid), model, whole, grid)
    got, wanted = full_state_dict(model, grid), whole.state_dict()
    if grid.rank == 0:
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def train_adaptively(folder):
    grid = Grid.from_group(dist.group.WORLD)
    whole = load(folder)
    model = copy.deepcopy(whole)
    parallelize_experts(model, grid)
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    run = parallelize(model, grid)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, whole)]
    for _ in range(10):
        assert_step_equal(run, model, whole, grid)
        norm = clip_grad_norm(model, grid, 0.5)
        assert_near("norm", norm, torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5).float())
        for optimizer in optimizers:
            optimizer.step()
    layers = adaptive_layers(model)
    assert all(isinstance(layer, Tuned) and len(layer.record) > 1 for layer in layers.values())
    assert load_stats(model).keys() == layers.keys()


def generate_and_save(folder, target):
    grid = Grid.from_group(dist.group.WORLD)
    whole = load(folder)
    model = copy.deepcopy(whole)
    parallelize_experts(model, grid, strategy=lambda: Sharded(grid))
    prompt = batch_of(model, grid.rank)["input_ids"]
    often = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(prompt)
    got = model.generate(prompt, attention_mask=mask, **often)
    assert torch.equal(got, whole.generate(prompt, attention_mask=mask, **often))
    for part in ({}, {"state_dict": model.state_dict()}):
        with pytest.raises(ValueError, match="this rank's part of the experts, to save; wanted all of them"):
            model.save_pretrained(target, **part)
    model.save_pretrained(target, state_dict=full_state_dict(model, grid), is_main_process=grid.rank == 0)
    dist.barrier()
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64, experts_implementation="eager")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def shown_to_torch(folder, target):
    grid, options = Grid.from_group(dist.group.WORLD), StateDictOptions(full_state_dict=True)
    whole = load(folder)
    model = copy.deepcopy(whole)
    parallelize_experts(model, grid, strategy=lambda: Sharded(grid))
    state = get_model_state_dict(model, options=options)
    again = copy.deepcopy(whole)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    parallelize_experts(again, grid, strategy=lambda: Sharded(grid))
    if grid.size > whole.config.num_local_experts:  # slices of an expert have names that transformers does not know
        for unknown in (whole.state_dict(), state):
            with pytest.raises(RuntimeError, match="Missing key"):
                (again if unknown is not state else copy.deepcopy(whole)).load_state_dict(unknown)
        with pytest.raises(ValueError, match="wanted all of them"):
            model.save_pretrained(target, state_dict=state)
        return
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    for given in (whole.state_dict(), model.state_dict()):
        again.load_state_dict(given)
        ids = batch_of(whole, 0)["input_ids"]
        assert_near("logits", again(ids).logits, whole(ids).logits)
    with pytest.raises(ValueError, match="with whole_state"):
        torch.save(model.state_dict(), io.BytesIO())
    again = copy.deepcopy(whole)
    parallelize_experts(again, grid, strategy=lambda: Sharded(grid))
    for layer in again.model.layers:
        fully_shard(layer)
    fully_shard(again)
    assert_near("logits under FSDP2", again(ids).logits, whole(ids).logits)


def refused(folder):
    grid = Grid.from_group(dist.group.WORLD)
    with pytest.raises(ValueError, match="no experts module of transformers"):
        parallelize_experts(torch.nn.Linear(2, 2), grid)
    with pytest.raises(ValueError, match="3 experts on 2 ranks"):
        parallelize_experts(load(folder), grid)
    with pytest.raises(ValueError, match="got a model in DistributedDataParallel"):
        parallelize_experts(torch.nn.parallel.DistributedDataParallel(load(folder)), grid)


def all_of(cases):
    for function, *arguments in cases:
        sys.stderr.write(f"{function.__name__} {arguments}\n")  # a rank that fails shows it
        function(*arguments)


def test_two_ranks(saved, tmp_path):
    plans = [Plan(), Plan(gather=2), Plan(chunks=2)]
    steps = [(step_of, saved(family), plans[number % 3]) for number, family in enumerate(FAMILIES)]
    cases = [
        *steps,
        (train_adaptively, saved("qwen3_moe")),
        (generate_and_save, saved("mixtral"), tmp_path),
        (refused, saved("mixtral", num_local_experts=3)),
    ]
    run_ranks(all_of, 2, cases)


def test_four_ranks(saved, tmp_path):
    few, many = saved("gpt_oss", num_local_experts=2), saved("mixtral", num_local_experts=8)
    cases = [
        *((step_of, few, plan) for plan in (Plan(), Plan(gather=2, regather=True), Plan(gather=4))),
        *((step_of, many, plan) for plan in (Plan(gather=2, near=False, chunks=2), Plan(gather=4, regather=True))),
        (step_of, saved("mixtral", num_local_experts=2), Plan(gather=1, chunks=2)),
        (generate_and_save, few, tmp_path),
        (shown_to_torch, few, tmp_path),
        (shown_to_torch, many, tmp_path),
    ]
    run_ranks(all_of, 4, cases)


def test_a_grid_of_one_rank_runs_here_and_a_copy_runs_its_own_weights(build, inputs):
    model, grid = build("mixtral"), Grid(None)
    batch = inputs(model)
    model.set_experts_implementation("eager")
    wanted = model(**batch).logits
    assert len(parallelize_experts(model, grid)) == 2
    assert_close("logits", model(**batch).logits, wanted)
    state = full_state_dict(model, grid)
    assert state.keys() == model.state_dict().keys()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.model.layers[0].mlp.experts.parameters():
            parameter.zero_()
    assert_close("logits", model(**batch).logits, wanted)
    assert not torch.equal(copied(**batch).logits, wanted)
    with pytest.raises(ValueError, match="spread already"):
        parallelize_experts(model, grid)
