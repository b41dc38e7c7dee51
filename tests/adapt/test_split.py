import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from synchromesh import Adaptation, FullySharded, Grid, MoE, Sharded, parallelize, record_load, routing_options
from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.grouping import RandomGroups
from synchromesh.adapt.split import SplitFeedForward, SplitFFN
from synchromesh.adapt.upcycle import Upcycle
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.testing.compare import check
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan


def model_of(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), block).double()


def split(block: nn.Module, k: int = 4, **options) -> SplitFeedForward:
    return SplitFFN(num_experts=4, k=k, **options)("mlp", block)


def learned(model: nn.Module, steps: int = 3, after=lambda: None) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for seed in range(steps):
        x = torch.randn(11, 8, generator=torch.Generator().manual_seed(seed)).double()
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def test_all_experts_together_are_the_dense_block(block):
    check(lambda x: split(block)(x), lambda x: block(x), {"x": torch.randn(3, 7, 8).double()})
    x = torch.randn(50, 8).double()
    assert (split(block)(x) - block(x)).abs().max() < 1e-12
    assert (split(block, grouping=RandomGroups(3))(x) - block(x)).abs().max() < 1e-12


def test_every_gradient_of_all_experts_is_that_of_the_dense_block(block):
    experts, x = split(block), torch.randn(20, 8).double()
    for module in (experts, block):
        module(x).square().sum().backward()
    wanted = {name: p.grad for name, p in block.named_parameters()}
    with torch.no_grad():
        for parameter in experts.trained():
            parameter.copy_(parameter.grad)
    for name, parameter in experts.merged().named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_token_gets_the_sum_of_its_experts_and_the_bias_once(block, k):
    experts, x = split(block, k=k), torch.randn(9, 8).double()
    first = block.gate_proj if hasattr(block, "gate_proj") else block[0]
    groups = experts.order.view(4, -1)
    gate = torch.stack([first.weight[own].mean(0) for own in groups])
    torch.testing.assert_close(experts.moe.router.weight, gate)
    down = block.down_proj if hasattr(block, "down_proj") else block[2]
    for token, y in zip(x, experts(x), strict=True):
        hidden = torch.cat([groups[e] for e in (gate @ token).topk(k).indices])
        only = copy.deepcopy(block)
        masked = only.down_proj if hasattr(only, "down_proj") else only[2]
        with torch.no_grad():
            masked.weight.copy_(torch.zeros_like(down.weight).index_copy(1, hidden, down.weight[:, hidden]))
        torch.testing.assert_close(y, only(token[None])[0])


def test_merging_gives_the_block_bit_for_bit_and_what_it_learned(block):
    model = model_of(block)
    before = copy.deepcopy(model.state_dict())
    adaptation = adapt(model, "1", SplitFFN(num_experts=4, k=2))
    copied = copy.deepcopy(adaptation)
    for name, tensor in copied.merge().state_dict().items():
        assert torch.equal(tensor, before[name]), name
    learned(model, after=adaptation.after_step)
    x = torch.randn(9, 8).double()
    with routing_options(model, k=4):
        wanted = model(x)
    merged = adaptation.merge()
    torch.testing.assert_close(merged(x), wanted, rtol=1e-12, atol=1e-12)
    assert type(merged[1]) is type(block)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())


def test_the_gate_follows_the_rows_and_learns_nothing(block):
    model = model_of(block)
    adaptation = adapt(model, "1", SplitFFN(num_experts=4, k=2))
    assert not any("router" in name for name in adaptation.trained())
    learned(model, after=adaptation.after_step)
    experts = model[1].moe.experts
    rows = experts.gate if hasattr(experts, "gate") else experts.up
    torch.testing.assert_close(model[1].moe.router.weight, rows.mean(1).detach())


def test_training_of_all_experts_is_training_of_the_block(block):
    dense, model = model_of(copy.deepcopy(block)), model_of(copy.deepcopy(block))
    model[0].load_state_dict(dense[0].state_dict())
    adaptation = adapt(model, "1", SplitFFN(num_experts=4, k=4))
    learned(dense)
    learned(model, after=adaptation.after_step)
    for name, tensor in adaptation.merge().state_dict().items():
        torch.testing.assert_close(tensor, dense.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_a_split_has_no_new_parameters(block):
    experts = split(block)
    assert sum(p.numel() for p in experts.parameters()) == sum(p.numel() for p in block.parameters())
    assert set(experts.parameters()) == set(experts.trained())


def test_what_was_frozen_stays_so(block):
    block.requires_grad_(False)
    assert list(split(block).trained()) == []


def test_a_gate_that_is_not_finite_makes_its_token_nan_alone():
    torch.manual_seed(0)
    experts, x = split(nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), k=2), torch.randn(5, 8)
    x[2] = torch.nan
    assert experts(x).isnan().any(1).tolist() == [False, False, True, False, False]


def test_what_cannot_be_split_is_said():
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.conv, self.fc2 = nn.Linear(8, 24), nn.Conv1d(24, 24, 3, padding=1), nn.Linear(24, 8)

        def forward(self, x):
            return self.fc2(self.conv(self.fc1(x).mT).mT)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 8)

        def forward(self, x):
            return x + self.fc2(torch.relu(self.fc1(x)))

    class Wants(Residual):
        def forward(self, x, mask):
            return x * mask

    with pytest.raises(ValueError, match=r"a \(Convolved\) cannot be read: got other parameters in it, conv.weight"):
        adapt(nn.ModuleDict({"a": Convolved()}), "a", SplitFFN())
    with pytest.raises(ValueError, match=r"a \(Residual\) cannot be read: its output is not down"):
        adapt(nn.ModuleDict({"a": Residual()}), "a", SplitFFN())
    with pytest.raises(ValueError, match=r"a \(Wants\) cannot be read: called with 5 rows"):
        adapt(nn.ModuleDict({"a": Wants()}), "a", SplitFFN())
    with pytest.raises(ValueError, match=r"a \(MultiheadAttention\) is no feed-forward block"):
        adapt(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), "a", SplitFFN())
    block = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    with pytest.raises(
        ValueError, match="a has 24 hidden units to split into 5 experts, wanted a multiple: take 4 or 6"
    ):
        adapt(nn.ModuleDict({"a": block}), "a", SplitFFN(num_experts=5, k=2))
    with pytest.raises(ValueError, match="got k 9 of 8 experts"):
        SplitFFN(k=9)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return model_of(nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)))


def stepped(adaptation: Adaptation, run: nn.Module, rank: int, world: int, *, rows: int) -> None:
    """Take two steps on this rank's part of each batch."""
    optimizer = torch.optim.AdamW([p for p in adaptation.model.parameters() if p.requires_grad], lr=0.05)
    for seed in range(2):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).double()
        run(x.chunk(world)[rank]).square().sum().mul(world).backward()
        optimizer.step()
        optimizer.zero_grad()
        adaptation.after_step()


def in_one_process(rows: int) -> dict[str, torch.Tensor]:
    adaptation = adapt(small(), "1", SplitFFN(num_experts=4, k=2))
    stepped(adaptation, adaptation.model, 0, 1, rows=rows)
    return adaptation.merge().state_dict()


def assert_same(states: list[dict[str, list]], wanted: dict[str, torch.Tensor]) -> None:
    for state in states:
        for name, tensor in wanted.items():
            torch.testing.assert_close(torch.tensor(state[name], dtype=torch.float64), tensor, rtol=1e-9, atol=1e-9)


def on_ranks(plan: Plan | None) -> dict[str, list]:
    """Split, spread, learn from a part of each batch, merge: what every rank has in the end."""
    grid, model = Grid.from_group(dist.group.WORLD), small()
    adaptation = adapt(model, "1", SplitFFN(num_experts=4, k=2))
    run = parallelize(model, grid, strategy=lambda: Sharded(grid, plan=plan))
    stepped(adaptation, run, grid.rank, grid.size, rows=16)
    return {name: tensor.tolist() for name, tensor in adaptation.merge().state_dict().items()}


@pytest.mark.parametrize(("world", "plans"), [(2, (None, Plan(2))), (8, (Plan(1), Plan(8)))])
def test_ranks_learn_and_merge_what_one_process_does(world, plans):
    wanted = in_one_process(16)
    for plan in plans:
        assert_same(run_ranks(on_ranks, world, plan), wanted)


def on_sharded(spread: bool) -> dict[str, list]:
    """The same with what is shared cut by FSDP2: experts spread over ranks, or cut like all else."""
    grid, model = Grid.from_group(dist.group.WORLD), small()
    adaptation = adapt(model, "1", SplitFFN(num_experts=4, k=2))
    if spread:
        run = parallelize(model, grid, shared=FullySharded(), strategy=lambda: Sharded(grid))
    else:
        run = fully_shard(model)
    stepped(adaptation, run, grid.rank, grid.size, rows=16)
    return {f"1.{name}": own.tolist() for name, own in adaptation.changes[0].new.merged().state_dict().items()}


@pytest.mark.parametrize("spread", [True, False])
def test_fsdp2_around_a_split_learns_and_merges_what_one_process_does(spread):
    wanted = {name: tensor for name, tensor in in_one_process(16).items() if name.startswith("1.")}
    assert_same(run_ranks(on_sharded, 2, spread), wanted)


def test_one_call_splits_a_llama_and_a_vit_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    ).double().eval()  # fmt: skip
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=8,
            patch_size=4,
        )
    ).double().eval()  # fmt: skip
    ids, images = torch.randint(0, 32, (2, 5)), torch.randn(2, 3, 8, 8).double()
    for model, inputs in ((llama, {"input_ids": ids}), (vit, {"pixel_values": images})):
        wanted, state = model(**inputs).logits, copy.deepcopy(model.state_dict())
        adaptation = adapt(model, "*.mlp", SplitFFN(num_experts=8, k=8))
        assert len(adaptation.names) == 2
        assert (model(**inputs).logits - wanted).abs().max() < 1e-12
        with routing_options(model, k=2):
            model(**inputs).logits.sum().backward()
        assert all(p.grad is not None for p in adaptation.trained().values())
        merged = adaptation.merge().state_dict()
        assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
        assert not [module for module in model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("into", [SplitFFN(num_experts=4, k=2), Upcycle(num_experts=4, k=1)], ids=["split", "upcycled"])
def test_padding_in_a_backbone_reaches_no_adapted_expert(into):
    config = SwinV2Config(image_size=16, embed_dim=8, depths=(1,), num_heads=(1,), patch_size=2, window_size=4)
    backbone = config.build()
    adapt(backbone, "*.ffn", into)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, :8], mask[1, :, :4] = True, True
    with record_load(backbone) as loads:
        backbone(torch.randn(2, 3, 16, 16), mask=mask)
    (load,) = loads.values()
    kept = (8 * 16 + 16 * 4) // 4  # a token for each 2 x 2 pixels
    assert int(load.tokens_per_expert.sum()) == kept * into.k


@pytest.mark.parametrize("into", [SplitFFN(num_experts=8, k=8), Upcycle(num_experts=4, k=2)], ids=["split", "upcycled"])
def test_one_call_makes_experts_of_a_gpt2_whose_matrices_lie_the_other_way_round(into):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    model, ids = transformers.GPT2LMHeadModel(config).double().eval(), torch.randint(0, 32, (2, 5))
    wanted, state = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    adaptation = adapt(model, "*.mlp", into)
    assert len(adaptation.names) == 2
    assert (model(input_ids=ids).logits - wanted).abs().max() < 1e-12
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for name, p in adaptation.trained().items() if "router" not in name)
    merged = adaptation.merge().state_dict()
    assert list(merged) == list(state)
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items())
    assert torch.equal(model(input_ids=ids).logits, wanted)
