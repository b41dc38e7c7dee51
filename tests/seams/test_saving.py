"""Other people's wrappers and trainers around spread experts: one-process values, or a sentence that says what to do.

docs/guarantees.md names these tests. What torch's own state dicts and checkpoints do is in tests/parallel.
"""

import copy
import io
import math
import os
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from synchromesh import (
    BiasBalance,
    Grid,
    MLPExperts,
    ModuleExperts,
    MoE,
    Sharded,
    TopKRouter,
    clip_grad_norm,
    distribute,
    expert_parameters,
    quantize_experts,
    whole_state,
)
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import RankError, rank_device, run_ranks

D, E, HALF, END = 8, 4, 2, 4
FULL = StateDictOptions(full_state_dict=True)
SENTENCE = "with whole_state"


def net(seed, *, modules=False, balance=None, **options):
    torch.manual_seed(seed)
    experts = ModuleExperts([nn.Linear(D, D) for _ in range(E)]) if modules else MLPExperts(E, D, hidden=16)
    router = TopKRouter(D, E, k=2, balance=balance)
    return nn.Sequential(nn.Linear(D, D), MoE(router, experts, **options), nn.Linear(D, D)).double().to(rank_device())


def spread(seed, **options):
    return net(seed, strategy=Sharded(ranks()), **options)


def ranks():
    return Grid.from_group(dist.group.WORLD)


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, D, generator=generator).double().to(rank_device())


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train_alone(model, optimizer, first, last, world, clip=None):
    """Train in one process on the mean of the ranks' losses."""
    for step in range(first, last):
        optimizer.zero_grad()
        for rank in range(world):
            (model(batch(step, rank)).square().mean() / world).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def train(run, optimizer, first, last, *, backward=torch.Tensor.backward, clip=None):
    for step in range(first, last):
        optimizer.zero_grad()
        backward(run(batch(step, dist.get_rank())).square().mean())
        if clip is not None:
            clip(run)
        optimizer.step()


def alone(steps, world, **options):
    model = net(0, **options)
    train_alone(model, adam(model), 0, steps, world)
    return model


def check(run, wanted):
    x = batch(99, 0)
    assert_close("y", run(x), wanted(x))


def wrapped_by_ddp(modules):
    world, model = dist.get_world_size(), spread(0, modules=modules)
    own = {name: p.detach().clone() for name, p in expert_parameters(model).items()}
    run = DistributedDataParallel(model)
    assert all(torch.equal(p, own[name]) for name, p in expert_parameters(model).items())  # not broadcast
    check(run, net(0, modules=modules))
    train(run, adam(run), 0, END)
    check(run, alone(END, world, modules=modules))
    with whole_state(run):
        state = run.state_dict()
    again = net(7, modules=modules)
    again.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    check(again, alone(END, world, modules=modules))


def wrapped_deep_inside():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"blocks": nn.ModuleList([spread(0), spread(0)])})

        def forward(self, x):
            return self.body["blocks"][1](self.body["blocks"][0](x))

    model, once = Outer(), net(0)
    for kind in ({}, {"find_unused_parameters": True}, {"broadcast_buffers": True, "gradient_as_bucket_view": True}):
        check(DistributedDataParallel(model, **kind), nn.Sequential(once, once))
    alone_in = DistributedDataParallel(spread(0)[1])  # the layer itself is the whole model
    check(alone_in, net(0)[1])


@pytest.mark.parametrize("modules", [False, True], ids=["stacked", "modules"])
def test_ddp_around_spread_experts_trains_as_one_process(modules, device):
    run_ranks(wrapped_by_ddp, 2, modules, device=device)


def test_ddp_finds_spread_experts_however_deep(device):
    run_ranks(wrapped_deep_inside, 2, device=device)


def buffers():
    model, wanted = spread(0, balance=BiasBalance(E)), net(0, balance=BiasBalance(E))
    run = DistributedDataParallel(model, broadcast_buffers=True)
    for step in range(2):
        run(batch(step, dist.get_rank())).square().mean().backward()
    check(run, wanted)
    eight, eight_wanted = spread(0).float(), net(0).float()
    quantize_experts(eight)
    quantize_experts(eight_wanted)
    run = DistributedDataParallel(eight, broadcast_buffers=True)
    x = batch(0, 0).float()
    for _ in range(2):
        assert_close("y", run(x), eight_wanted(x))


def test_broadcast_buffers_leaves_experts_of_eight_bits_to_their_ranks(device):
    run_ranks(buffers, 2, device=device)


def wrapped_by_fsdp2(modules):
    world = dist.get_world_size()
    for blocks in ((), (1,), (0, 1, 2)):
        model = spread(0, modules=modules)
        for block in blocks:
            fully_shard(model[block])
        fully_shard(model)
        assert isinstance(model[0].weight, DTensor)
        assert not any(isinstance(p, DTensor) for p in model[1].experts.parameters())
        optimizer = adam(model)  # of sharded parameters: a forward may leave them gathered
        check(model, net(0, modules=modules))
        train(model, optimizer, 0, END)
        wanted = alone(END, world, modules=modules)
        check(model, wanted)
        if not modules:
            state = get_model_state_dict(model, options=FULL)
            for name, tensor in wanted.state_dict().items():
                assert_close(name, state[name], tensor)
    bare = spread(0)
    fully_shard(bare[1].experts)  # which are spread already
    check(bare, net(0))


@pytest.mark.parametrize("modules", [False, True], ids=["stacked", "modules"])
def test_fully_shard_leaves_spread_experts_as_they_are_and_trains_as_one_process(modules, device):
    run_ranks(wrapped_by_fsdp2, 2, modules, device=device)


def by_the_library(run, clip):
    return clip_grad_norm(run, ranks(), clip)


def by_torch(run, clip, **options):
    return nn.utils.clip_grad_norm_(run.parameters(), clip, **options)


def clips(modules):
    world, bound = dist.get_world_size(), 0.01
    wanted = net(0, modules=modules)
    train_alone(wanted, adam(wanted), 0, END, world, bound)
    after = copy.deepcopy(wanted)
    train_alone(after, adam(after), END, END + 1, world, bound)
    for clip in (by_the_library, by_torch, partial(by_torch, foreach=False), partial(by_torch, foreach=True)):
        model = spread(0, modules=modules)
        run = DistributedDataParallel(model)
        train(run, adam(run), 0, END, clip=partial(clip, clip=bound))
        check(run, wanted)
        again = copy.deepcopy(model)  # its gradients speak for all ranks too
        train(DistributedDataParallel(again), adam(again), END, END + 1, clip=partial(clip, clip=bound))
        check(again, after)


@pytest.mark.parametrize("modules", [False, True], ids=["stacked", "modules"])
def test_clipping_is_right_whoever_clips(modules, device):
    run_ranks(clips, 2, modules, device=device)


def norm_and_gradients(run, **options):
    """Return the norm before and the gradients after clipping by torch, of two backwards."""
    for step in range(2):
        run(batch(step, dist.get_rank())).square().mean().backward()
    return float(by_torch(run, **options)), {name: p.grad for name, p in run.named_parameters()}


def clips_by_other_norms():
    world, rank, alone = dist.get_world_size(), dist.get_rank(), net(0)
    for every in range(world):
        for step in range(2):
            (alone(batch(step, every)).square().mean() / world).backward()
    for order in (1.0, 2.0, 3.0, math.inf):
        wanted = nn.utils.get_total_norm([p.grad for p in alone.parameters()], order)
        got, _ = norm_and_gradients(DistributedDataParallel(spread(0)), clip=1e9, norm_type=order)
        assert got == pytest.approx(float(wanted), rel=1e-10), order
    sharded = spread(0)
    fully_shard(sharded)
    wanted = float(by_torch(alone, 0.01))
    got, after = norm_and_gradients(sharded, clip=0.01)
    assert got == pytest.approx(wanted, rel=1e-10)
    for name, parameter in alone.named_parameters():
        grad = after[name]
        whole = parameter.grad if isinstance(grad, DTensor) else parameter.grad.chunk(world)[rank]
        assert_close(name, grad.full_tensor() if isinstance(grad, DTensor) else grad, whole)


def test_every_norm_counts_the_experts_of_all_ranks_beside_ddp_and_fsdp2(device):
    run_ranks(clips_by_other_norms, 2, device=device)


def unlike():
    """A model of modules of which ranks train other numbers of parameters."""
    torch.manual_seed(0)
    own = [
        nn.Linear(D, D),
        nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)),
        nn.Linear(D, D),
        nn.Linear(D, D),
    ]
    own[3].requires_grad_(False)
    layer = MoE(TopKRouter(D, E, k=2), ModuleExperts(own))
    return nn.Sequential(nn.Linear(D, D), layer, nn.Linear(D, D)).double().to(rank_device())


def trained_part(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def clips_unlike_numbers():
    alone, model, world = unlike(), unlike(), dist.get_world_size()
    for rank in range(world):
        (alone(batch(0, rank)).square().mean() / world).backward()
    wanted = float(nn.utils.clip_grad_norm_(trained_part(alone), 1e9))
    distribute(model, ranks(), strategy=lambda: Sharded(ranks()))
    run = DistributedDataParallel(model)
    for foreach in (None, True, False):
        run.zero_grad()
        run(batch(0, dist.get_rank())).square().mean().backward()
        got = nn.utils.clip_grad_norm_(trained_part(run), 1e9, foreach=foreach)
        assert float(got) == pytest.approx(wanted, rel=1e-10)


def test_ranks_with_other_numbers_of_gradients_meet_once():
    run_ranks(clips_unlike_numbers, 2)


def handles_gradients():
    """What users do with gradients before they clip."""
    world, alone = dist.get_world_size(), net(0)
    for rank in range(world):
        (alone(batch(0, rank)).square().mean() / world / 2).backward()
    wanted = float(nn.utils.get_total_norm([p.grad for p in alone.parameters()]))
    for handled in (
        lambda grad: grad / 2,
        lambda grad: grad.clone().mul_(0.5),
        lambda grad: grad.mul(0.5).to(grad.dtype),
    ):
        run = DistributedDataParallel(spread(0))
        run(batch(0, dist.get_rank())).square().mean().backward()
        for parameter in run.parameters():
            parameter.grad = handled(parameter.grad)
        assert float(by_torch(run, 1e9)) == pytest.approx(wanted, rel=1e-10)
    experts = run.module[1].experts
    part = nn.utils.clip_grad_norm_(experts.parameters(), 1e9, foreach=True)
    assert float(part) == pytest.approx(float(nn.utils.get_total_norm([p.grad for p in alone[1].experts.parameters()])))
    grad = next(experts.parameters()).grad
    assert float(torch.linalg.vector_norm(grad)) == float(grad.norm())  # of this rank, whoever asks alone
    with pytest.raises(ValueError, match=r"store `gradient.detach\(\)`"):
        torch.save(grad, io.BytesIO())
    torch.save(grad.detach(), io.BytesIO())


def test_gradients_that_users_scale_and_copy_still_speak_for_all():
    run_ranks(handles_gradients, 2)


def nothing_else():
    model = spread(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    with pytest.raises(ValueError, match="DistributedDataParallel would have nothing to do"):
        DistributedDataParallel(model)


def test_ddp_around_experts_alone_is_refused_in_a_sentence():
    run_ranks(nothing_else, 2)


def scales():
    """One rank's experts overflow: no rank steps, and all scale down."""
    run = DistributedDataParallel(spread(0))
    optimizer, scaler = adam(run), torch.amp.GradScaler(rank_device().type, init_scale=8.0)
    before = {name: p.detach().clone() for name, p in run.named_parameters()}
    scaler.scale(run(batch(0, dist.get_rank())).square().mean()).backward()
    if dist.get_rank() == 1:
        next(iter(expert_parameters(run).values())).grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(p, before[name]) for name, p in run.named_parameters())
    optimizer.zero_grad()
    wanted = net(0)
    train_alone(wanted, adam(wanted), 0, 1, dist.get_world_size(), 0.01)
    scaler.scale(run(batch(0, dist.get_rank())).square().mean()).backward()
    scaler.unscale_(optimizer)
    by_torch(run, 0.01)
    scaler.step(optimizer)
    check(run, wanted)


def scales_beside_fsdp2():
    run, wanted = spread(0), net(0)
    fully_shard(run)
    optimizer, scaler = torch.optim.SGD(run.parameters(), lr=0.1), torch.amp.GradScaler(rank_device().type)
    scaler.scale(run(batch(0, dist.get_rank())).square().mean()).backward()
    scaler.unscale_(optimizer)
    by_torch(run, 0.01)
    scaler.step(optimizer)
    train_alone(wanted, torch.optim.SGD(wanted.parameters(), lr=0.1), 0, 1, dist.get_world_size(), 0.01)
    check(run, wanted)


def test_a_scaler_steps_on_all_ranks_or_on_none(device):
    run_ranks(scales, 2, device=device)
    run_ranks(scales_beside_fsdp2, 2, device=device)


def accelerated(folder):
    accelerator = accelerate_here()
    world = dist.get_world_size()
    model = spread(0)
    run, optimizer = accelerator.prepare(model, adam(model))
    assert isinstance(run, DistributedDataParallel)
    train(run, optimizer, 0, HALF, backward=accelerator.backward)
    for store in (accelerator.save_state, lambda where: accelerator.save_model(run, where)):
        with pytest.raises(ValueError, match=SENTENCE):
            store(folder / "refused")
    with whole_state(run):
        accelerator.save_state(folder / "state")
        accelerator.save_model(run, folder / "model")
        gathered = accelerator.get_state_dict(run)
    dist.barrier()
    from safetensors.torch import load_file

    for state in (load_file(folder / "model" / "model.safetensors"), gathered):
        again = net(7)
        again.load_state_dict(state)
        check(again, alone(HALF, world))
    other = accelerate_here()
    fresh = spread(7)
    other_run, other_optimizer = other.prepare(fresh, adam(fresh))
    with whole_state(other_run):
        other.load_state(folder / "state")
    train(other_run, other_optimizer, HALF, END, backward=other.backward)
    check(other_run, alone(END, world))


def accelerate_here():
    from accelerate import Accelerator

    in_a_job()
    return Accelerator(cpu=True)


def in_a_job():
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "none", "MASTER_PORT": "1"}
    os.environ["ACCELERATE_USE_CPU"] = "true"


def test_accelerate_trains_as_one_process_and_stores_all_experts_or_none(tmp_path):
    pytest.importorskip("accelerate")
    run_ranks(accelerated, 2, tmp_path)


class Regression(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return {"loss": self.body(x).square().mean()}


def trained_by_transformers(folder, saves):
    from transformers import Trainer, TrainingArguments

    in_a_job()
    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    model = Regression(spread(0).float())
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=END,
        per_device_train_batch_size=6,
        optim="adamw_torch",
        learning_rate=0.01,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=0.01,
        save_strategy="steps" if saves else "no",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
    )
    rows = [{"x": row} for step in range(END) for row in torch.stack([batch(step, r) for r in range(world)], 1)]
    flat = [{"x": pair} for row in rows for pair in row["x"].float()]
    trainer = Trainer(model, arguments, train_dataset=flat)
    trainer.train()
    one = Regression(net(0).float())
    with whole_state(model):
        one.load_state_dict(model.state_dict())
    x = batch(99, 0).float()
    assert_close("y", model.body(x), one.body(x))
    state = torch.nn.utils.parameters_to_vector(one.parameters())
    every = [torch.empty_like(state) for _ in range(world)]
    dist.all_gather(every, state)
    assert all(torch.equal(each, state) for each in every)  # shared parameters did not drift
    assert not torch.equal(one.body(x), net(0).float()(x))


def test_a_trainer_trains_and_its_own_saving_is_refused(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run_ranks(trained_by_transformers, 2, tmp_path, False)
    with pytest.raises(RankError, match=SENTENCE):
        run_ranks(trained_by_transformers, 2, tmp_path, True)


def lightning_module(body):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = body

        def training_step(self, step):
            return self.body(batch(0, dist.get_rank())).square().mean()

        def configure_optimizers(self):
            return adam(self)

    return Module()


def lightning_trainer(steps, folder):
    import lightning
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Ranks(LightningEnvironment):
        creates_processes_externally = True
        set_world_size = set_global_rank = lambda self, number: None

        def world_size(self):
            return dist.get_world_size()

        def global_rank(self):
            return dist.get_rank()

        local_rank = global_rank

    return lightning.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DDPStrategy(cluster_environment=Ranks()),
        max_steps=steps,
        logger=False,
        gradient_clip_val=0.01,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder),
    )


def trained_by_lightning(folder, refused):
    warnings.simplefilter("ignore")
    world, steps = dist.get_world_size(), torch.utils.data.DataLoader(range(100), batch_size=None)

    def wanted(last):
        model = net(0)
        optimizer = adam(model)
        for _ in range(last):  # one batch again and again: where a resumed epoch goes on is Lightning's choice
            train_alone(model, optimizer, 0, 1, world, 0.01)
        return model

    module, trainer = lightning_module(spread(0)), lightning_trainer(HALF, folder)
    trainer.fit(module, steps)
    check(module.body, wanted(HALF))
    if refused:
        trainer.save_checkpoint(folder / "refused.ckpt")
    with whole_state(module):
        trainer.save_checkpoint(folder / "whole.ckpt")
    stored = torch.load(folder / "whole.ckpt", weights_only=False)["state_dict"]
    again = net(7)
    again.load_state_dict({name.removeprefix("body."): tensor for name, tensor in stored.items()})
    check(again, wanted(HALF))
    other = lightning_module(spread(7))
    lightning_trainer(END, folder).fit(other, steps, ckpt_path=folder / "whole.ckpt", weights_only=False)
    check(other.body, wanted(END))


def test_lightning_trains_and_resumes_as_one_process_and_stores_all_experts_or_none(tmp_path):
    pytest.importorskip("lightning")
    run_ranks(trained_by_lightning, 2, tmp_path, False)
    with pytest.raises(RankError, match=SENTENCE):
        run_ranks(trained_by_lightning, 2, tmp_path, True)


def copies():
    model = spread(0)
    twin = copy.deepcopy(model)
    check(twin, net(0))
    with pytest.raises(ValueError, match=SENTENCE):
        torch.save(twin, io.BytesIO())
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    wanted = torch.optim.swa_utils.AveragedModel(net(0), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    other, other_wanted = spread(7), net(7)
    for own, source in ((averaged, (model, other)), (wanted, (net(0), other_wanted))):
        for one in source:
            own.update_parameters(one)
    check(averaged, wanted)
    state = get_model_state_dict(averaged.module, options=FULL)
    again = net(3)
    again.load_state_dict(state)
    check(again, wanted)


def test_deep_copies_and_averages_hold_their_part_and_a_pickled_model_is_refused(device):
    run_ranks(copies, 2, device=device)
