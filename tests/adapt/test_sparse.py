import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from synchromesh import (
    GatedMLPExperts,
    Grid,
    MLPExperts,
    MoE,
    Sharded,
    StaticSparsity,
    TopKRouter,
    count_entries,
    densify,
    distribute,
    parallelize,
    whole_state,
)
from synchromesh.adapt.adaptation import adapt
from synchromesh.parallel.store import model_tensors, read_tensors, write_tensors
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    experts = MoE(TopKRouter(8, 4, k=2), MLPExperts(4, 8, hidden=6))
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), experts, nn.Linear(8, 3)).double()


def masked(sparsity: float = 0.75, seed: int = 0) -> nn.Sequential:
    model = network()
    adapt(model, "*", StaticSparsity(sparsity, seed))
    return model


MATRICES = ("0.weight", "2.experts.up", "2.experts.down", "3.weight")


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in MATRICES}


def batches(count: int):
    for seed in range(count):
        yield torch.randn(16, 5, generator=torch.Generator().manual_seed(seed)).double()


def learned(model: nn.Module, optimizer, steps: int = 3) -> None:
    for x in batches(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def optimizers():
    yield "adamw", lambda ps: torch.optim.AdamW(ps, lr=0.05, weight_decay=0.3)
    yield "sgd", lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.1)
    yield "nesterov", lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True)
    yield "rmsprop", lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.5)


OPTIMIZERS = dict(optimizers())


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.9])
def test_every_matrix_and_every_expert_has_its_share_of_zeros_to_one_entry(sparsity):
    model = masked(sparsity)
    for name, weight in matrices(model).items():
        for own in weight if "experts" in name else [weight]:
            assert int((own == 0).sum()) == round(sparsity * own.numel()), name
    assert int((model[2].router.weight == 0).sum()) == 0
    sizes = [own.numel() for weight in matrices(model).values() for own in weight.unbind(0) if weight.ndim == 3]
    sizes += [weight.numel() for weight in matrices(model).values() if weight.ndim == 2]
    counted = count_entries(model)
    assert counted.all == sum(sizes)
    assert counted.kept == sum(size - round(sparsity * size) for size in sizes)


def test_masks_differ_between_matrices_experts_and_seeds_and_are_drawn_again_alike():
    first, again, other = masked(), masked(), masked(seed=1)
    zeros = {name: weight == 0 for name, weight in matrices(first).items()}
    for name, weight in matrices(again).items():
        assert torch.equal(weight == 0, zeros[name])
    assert not torch.equal(matrices(other)["0.weight"] == 0, zeros["0.weight"])
    assert not torch.equal(zeros["2.experts.up"][0], zeros["2.experts.up"][1])
    assert not torch.equal(zeros["2.experts.up"], zeros["2.experts.down"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masked_entries_stay_exactly_zero_below_the_mask_too(optimizer):
    model = masked()
    zeros = {name: weight == 0 for name, weight in matrices(model).items()}
    before = {name: weight.detach().clone() for name, weight in matrices(model).items()}
    own = optimizer(model.parameters())
    learned(model, own)
    for name, weight in matrices(model).items():
        assert torch.equal(weight == 0, zeros[name])
        assert not torch.equal(weight, before[name])
    for name, original in model.named_parameters():
        if name.endswith("original"):
            mask = model.get_buffer(name.replace("original", "0.mask"))
            assert not original.detach()[~mask].any(), "it would come back when the mask goes"
            for state in own.state[original].values():
                assert not torch.is_tensor(state) or state.shape != mask.shape or not state[~mask].any()


class Lacking(nn.Module):
    """A linear layer whose absent entries are no numbers at all: the others are one vector, put into place."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.shape, self.places = weight.shape, weight.flatten().nonzero()[:, 0]
        self.entries = nn.Parameter(weight.detach().flatten()[self.places].clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.entries.new_zeros(self.shape.numel()).scatter(0, self.places, self.entries)
        return F.linear(x, weight.view(self.shape), self.bias)


def test_training_is_that_of_a_model_that_lacks_the_entries():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    adapt(model, nn.Linear, StaticSparsity(0.6))
    lacks = nn.Sequential(Lacking(model[0].weight, model[0].bias), nn.Tanh(), Lacking(model[2].weight, model[2].bias))
    for one in (model, lacks):
        learned(one, torch.optim.AdamW(one.parameters(), lr=0.03, weight_decay=0.2), steps=5)
    for x in batches(2):
        torch.testing.assert_close(model(x), lacks(x), rtol=1e-12, atol=1e-12)


def test_going_dense_changes_no_output_and_lets_every_entry_learn():
    model = masked()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    learned(model, optimizer)
    zeros = {name: weight == 0 for name, weight in matrices(model).items()}
    x, parameters = next(batches(1)), [p for group in optimizer.param_groups for p in group["params"]]
    wanted = model(x)
    assert densify(model, optimizer) == list(MATRICES)
    assert torch.equal(model(x), wanted)
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    assert [p for p in optimizer.state if p.ndim >= 2 and p.shape in {m.shape for m in matrices(model).values()}] == []
    assert model.state_dict().keys() == network().state_dict().keys()
    learned(model, optimizer, steps=1)
    for name, weight in matrices(model).items():
        assert weight.detach()[zeros[name]].any()
    with pytest.raises(ValueError, match="densify found no masked tensor in Sequential: it is dense already"):
        densify(model)


def test_merging_is_going_dense_and_undoing_brings_the_dropped_numbers_back():
    model, x = network(), next(batches(1))
    first = model(x)
    adaptation = adapt(model, "*", StaticSparsity(0.5))
    sparse, undone = model(x), copy.deepcopy(adaptation)
    assert not torch.allclose(sparse, first)
    assert torch.equal(undone.model(x), sparse)
    assert torch.equal(undone.undo()(x), first)
    assert torch.equal(adaptation.merge()(x), sparse)
    assert model.state_dict().keys() == network().state_dict().keys()
    assert type(model[0]) is nn.Linear


def test_masks_go_through_a_file_and_weights_without_masks_are_refused():
    model = masked()
    learned(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = masked(seed=7)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = next(batches(1))
    assert torch.equal(other(x), model(x))
    learned(other, torch.optim.AdamW(other.parameters(), lr=0.05))
    assert all(torch.equal(w == 0, matrices(model)[name] == 0) for name, w in matrices(other).items())
    with pytest.raises(RuntimeError, match=r"0\.parametrizations\.weight\.0\.mask"):
        other.load_state_dict(network().state_dict())


def test_gated_experts_are_masked_too():
    torch.manual_seed(0)
    model = nn.Sequential(MoE(TopKRouter(8, 4, k=2), GatedMLPExperts(4, 8, hidden=6, bias=True)))
    adapt(model, "*", StaticSparsity(0.5))
    experts = model[0].experts
    assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in (experts.gate, experts.up, experts.down))


def test_a_sparsity_that_is_none_is_refused():
    for sparsity in (-0.1, 1.0, 75.0):
        with pytest.raises(ValueError, match=r"wanted the share of entries that are 0, 0 <= it < 1, such as 0\.75"):
            StaticSparsity(sparsity)
    with pytest.raises(ValueError, match="left all 1 chosen modules as they are: 1"):
        adapt(network(), nn.LayerNorm, StaticSparsity())


def test_a_matrix_that_is_shared_with_what_is_not_masked_is_refused():
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight
    with pytest.raises(ValueError, match=r"weight of a chosen Linear is shared with embedding\.weight"):
        adapt(model, nn.Linear, StaticSparsity(0.5))
    assert model["head"].weight is model["embedding"].weight


def on_ranks(first: str, plan: Plan | None, folder: str) -> dict:
    """Mask before or after the ranks take their parts; learn; show the whole, as a state dict and as a checkpoint."""
    grid = Grid.from_group(dist.group.WORLD)
    model = network()
    if first == "mask":
        adapt(model, "*", StaticSparsity(0.75))
        run = parallelize(model, grid, strategy=lambda: Sharded(grid, plan=plan))
    else:
        distribute(model, grid, strategy=lambda: Sharded(grid, plan=plan))
        adapt(model, "*", StaticSparsity(0.75))
        run = parallelize(model, grid)
    optimizer = torch.optim.AdamW(run.parameters(), lr=0.05, weight_decay=0.1)
    for x in batches(2):
        optimizer.zero_grad()
        run(x.chunk(grid.size)[grid.rank]).square().sum().mul(grid.size).backward()
        optimizer.step()
    with whole_state(model):
        state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    write_tensors(Path(folder), "weights", model_tensors(model, grid), grid)
    densify(model, optimizer)
    return state


@pytest.mark.parametrize(("world", "first", "plan"), [(2, "mask", None), (2, "ranks", Plan(2)), (8, "mask", None)])
def test_ranks_hold_their_part_of_the_mask_of_the_whole(world, first, plan, tmp_path):
    model = masked()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    for x in batches(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for state in run_ranks(on_ranks, world, first, plan, str(tmp_path)):
        for name, wanted in model.state_dict().items():
            got = torch.tensor(state[name], dtype=wanted.dtype)
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)  # routers compute in float32
    other = masked(seed=7)
    alone = Grid(None)
    read_tensors(tmp_path, model_tensors(other, alone), alone)
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "settings", "select", "tensors"),
    [
        ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}, ("*.attn.*", "*.mlp.*"), 4),
        (
            "Bert",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
            ("*.attention.*", "*.dense"),
            6,
        ),
    ],
    ids=["gpt2", "bert"],
)
def test_matrices_of_transformers_models_stay_sparse_until_densify_changes_nothing(kind, settings, select, tensors):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(vocab_size=32, **settings))
    blocks = (model.h if kind == "GPT2" else model.encoder).double()
    names, ids = list(model.state_dict()), torch.randint(0, 32, (2, 5))
    adapt(blocks, select, StaticSparsity(0.75))
    optimizer = torch.optim.AdamW(model.double().parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model(input_ids=ids).last_hidden_state[..., :3].sum().backward()
        optimizer.step()
    entries = count_entries(model)
    assert entries.kept * 4 == entries.all
    model.eval()
    sparse = model(input_ids=ids).last_hidden_state
    dense = densify(model, optimizer)
    assert len(dense) == tensors
    assert sum(int((model.get_parameter(name) != 0).sum()) for name in dense) == entries.kept
    assert torch.equal(model(input_ids=ids).last_hidden_state, sparse)
    assert sorted(model.state_dict()) == sorted(names)


def test_what_lies_over_a_mask_is_not_taken_away_with_it():
    model = nn.Sequential(nn.Linear(8, 8))
    adapt(model, "0", StaticSparsity(0.5))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"0\.weight has Identity over its mask"):
        densify(model)


def test_a_second_mask_is_refused_and_not_left_out_in_silence():
    model = nn.Sequential(nn.Linear(8, 8))
    adapt(model, "0", StaticSparsity(0.5))
    with pytest.raises(
        ValueError, match="0 is masked or adapted already, wanted plain weights to mask: merge or densify"
    ):
        adapt(model, "0", StaticSparsity(0.9))
