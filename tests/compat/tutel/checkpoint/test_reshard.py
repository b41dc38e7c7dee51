"""State dicts go from any number of ranks to any other, and each rank gets the slices that its layer holds."""

import pytest
import torch

from synchromesh.compat.tutel import net
from synchromesh.compat.tutel.checkpoint.reshard import expert_counts, gather, scatter
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

E, H, D = 4, 8, 6
P = "blocks.1.moe."


def whole(prefix=P):
    torch.manual_seed(0)
    own = {
        "_num_global_experts": torch.tensor(E),
        "gates.0.wg.weight": torch.rand(E, D),
        "experts.batched_fc1_w": torch.rand(E, H, D),
        "experts.batched_fc2_w": torch.rand(E, H, D),
        "experts.batched_fc1_bias": torch.rand(E, H),
        "experts.batched_fc2_bias": torch.rand(E, D),
    }
    return {"head.weight": torch.rand(3, 3), **{prefix + key: value for key, value in own.items()}}


def of_rank(state, rank, ranks):
    """Write down what a rank holds, slice by slice."""
    own = dict(state)
    if ranks <= E:
        part = slice(rank * E // ranks, (rank + 1) * E // ranks)
        return {**own, **{key: value[part] for key, value in state.items() if ".experts." in key}}
    shards = ranks // E
    expert, shard = rank // shards, rank % shards
    rows, wide = H // shards, -(-D // shards)
    hidden = slice(shard * rows, (shard + 1) * rows)
    for name in ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias"):
        own[f"{P}experts.{name}"] = state[f"{P}experts.{name}"][expert : expert + 1, hidden]
    filled = torch.cat([state[f"{P}experts.batched_fc2_bias"][expert], torch.zeros(wide * shards - D)])
    own[f"{P}experts.batched_fc2_bias"] = filled[None, shard * wide : (shard + 1) * wide]
    return own


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key
        assert got[key].untyped_storage().nbytes() == got[key].nbytes or ".experts." not in key


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_each_rank_holds_its_slices_and_all_together_the_whole(ranks):
    parts = list(scatter(whole(), ranks))
    assert len(parts) == ranks
    for rank, part in enumerate(parts):
        assert_same(part, of_rank(whole(), rank, ranks))
    again = gather(parts)
    assert again.keys() == whole().keys()
    assert all(torch.equal(again[key], value) for key, value in whole().items())


def test_what_all_share_is_the_first_ranks():
    parts = list(scatter(whole(), 2))
    parts[1]["head.weight"] = torch.zeros(3, 3)
    assert torch.equal(gather(parts)["head.weight"], whole()["head.weight"])


def old_format(state):
    """Biases with a dim of one in the middle, and no number of experts."""
    kept = {key: value for key, value in state.items() if not key.endswith("_num_global_experts")}
    return {key: value[:, None] if key.endswith("_bias") else value for key, value in kept.items()}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_old_files_become_new_ones(ranks):
    parts = [old_format(of_rank(whole(), rank, ranks)) for rank in range(ranks)]
    with pytest.raises(ValueError, match=r"'blocks\.1\.moe\.' has experts .* --default_num_global_experts"):
        gather(parts)
    found = gather(parts, E)
    assert found.keys() == whole().keys()
    assert all(torch.equal(found[key], value) for key, value in whole().items())
    assert_same(next(scatter(old_format(whole()), ranks, E)), of_rank(whole(), 0, ranks))


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("hidden", [8, 3])
def test_flat_tensors_of_gated_experts_are_cut_expert_by_expert(ranks, hidden):
    numbers = 1 + torch.arange(E * 6 * hidden)  # 18 numbers of an expert do not divide by 4
    state = {"_num_global_experts": torch.tensor(E), "gates.0.wg.weight": torch.rand(E, 6), "experts.W_fc1": numbers}
    parts = list(scatter(state, ranks))
    shards, local = max(1, ranks // E), max(1, E // ranks)
    wide = -(-local * 6 * hidden // shards)
    for rank, part in enumerate(parts):
        of_experts = numbers.chunk(E // local)[rank // shards]
        filled = torch.cat([of_experts, torch.zeros(wide * shards - len(of_experts), dtype=torch.int64)])
        assert torch.equal(part["experts.W_fc1"], filled[rank % shards * wide :][:wide])
    assert torch.equal(gather(parts)["experts.W_fc1"], numbers)


@pytest.mark.parametrize("gate", ["gates.1.wg.weight", "gates.0.cosine_projector.weight"])
def test_any_gate_says_what_filling_is(gate):
    numbers = torch.rand(E * 18)
    state = {"_num_global_experts": torch.tensor(E), gate: torch.rand(5, 6), "experts.W_fc1": numbers}
    assert torch.equal(gather(scatter(state, 16))["experts.W_fc1"], numbers)


def test_where_no_gate_says_it_the_user_must():
    numbers = torch.rand(E * 18)
    state = {"_num_global_experts": torch.tensor(E), "gates.0.own.weight": torch.rand(E, 6), "experts.W_fc1": numbers}
    assert torch.equal(gather(scatter(state, 4))["experts.W_fc1"], numbers)
    with pytest.raises(ValueError, match=r"4 ranks share an expert, and no gate .* with --default_model_dim"):
        gather(scatter(state, 16))
    assert torch.equal(gather(scatter(state, 16), default_model_dim=6)["experts.W_fc1"], numbers)


def test_layers_with_different_numbers_of_experts_are_kept_apart():
    state = {**whole("a."), **{key: v for key, v in whole("b.").items() if "b." in key}}
    state["b._num_global_experts"] = torch.tensor(2)
    for key in [key for key in state if key.startswith("b.experts")]:
        state[key] = state[key][:2]
    assert expert_counts(state) == {"a.": 4, "b.": 2}
    again = gather(scatter(state, 4))
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_experts_of_other_libraries_are_shared_tensors():
    state = {**whole(), "other.experts.weight": torch.rand(3)}
    assert torch.equal(next(scatter(state, 2))["other.experts.weight"], state["other.experts.weight"])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: list(scatter(whole(), 3)), "4 experts and there are 3 ranks"),
        (lambda: gather(list(scatter(whole(), 4))[:3]), "4 experts and there are 3 ranks"),
        (
            lambda: gather(list(scatter(whole(), 4))[:2]),
            r"shape \(1, .*\) on each of 2 ranks, wanted 2 in dim 0 for 4 experts",
        ),
        (
            lambda: gather(list(scatter(whole(), 16))[:4]),
            r"batched_fc2_bias has shape \(1, 2\) .* wanted 1 in dim 0 and 6 in dim 1",
        ),
        (lambda: list(scatter(whole(), 64)), r"cannot be cut for 64 ranks: .* multiple of 16 in dim 1"),
        (
            lambda: list(scatter({**whole(), P + "experts.W_fc1": torch.zeros(7)}, 2)),
            "W_fc1 has 7 numbers, wanted a mul",
        ),
        (lambda: list(scatter({"model": whole()}, 2)), "no MoE layer in .'model'.* --namespace"),
        (lambda: gather([whole(), {}]), "rank 1 has no blocks.1.moe.experts.batched_fc1_w"),
        (lambda: gather([whole(), {k: v[:1] if v.ndim else v for k, v in whole().items()}]), "differs in shape"),
        (lambda: list(scatter({"_num_global_experts": torch.tensor(0)}, 2)), "0 experts, wanted 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def layer(kind, experts):
    from synchromesh.compat.tutel.moe import moe_layer

    torch.manual_seed(net.get_world_rank())
    settings = {"type": kind, "num_experts_per_device": experts, "hidden_size_per_expert": H}
    gate = {"type": "top", "k": 2, "capacity_factor": 0.0}
    return moe_layer(
        gate, D, {**settings, **({"activation_fn": torch.relu} if kind == "ffn" else {})}, seeds=(1, None, None)
    )


def layers(folder, experts, loads):
    """Make a layer of each kind, or load it; keep its state and what it gives for one input."""
    torch.manual_seed(5)
    x, file = torch.rand(3, 4, D), f"{net.get_world_rank()}-of-{net.get_world_size()}"
    found = torch.load(folder / file, weights_only=True) if loads else None
    results = {}
    for kind in ("ffn", "llama_ffn"):
        ours = layer(kind, experts)
        if found:
            ours.load_state_dict(found[kind])
        results[kind] = {"state": ours.state_dict(), "y": ours(x).detach()}
    torch.save(results, folder / f"{file}-results")


def test_layers_of_any_number_of_ranks_take_over_from_each_other(tmp_path):
    """Four ranks share two experts; one process, and two ranks, then give the same."""

    def results(ranks):
        return [torch.load(tmp_path / f"{rank}-of-{ranks}-results", weights_only=True) for rank in range(ranks)]

    run_ranks(layers, 4, tmp_path, -2, False)
    began = results(4)
    whole = {kind: gather([result[kind]["state"] for result in began]) for kind in began[0]}
    for ranks, experts in ((1, 2), (2, 1)):
        parts = {kind: list(scatter(state, ranks)) for kind, state in whole.items()}
        for rank in range(ranks):
            torch.save({kind: part[rank] for kind, part in parts.items()}, tmp_path / f"{rank}-of-{ranks}")
        run_ranks(layers, 2, tmp_path, experts, True) if ranks > 1 else layers(tmp_path, experts, True)
        for result in results(ranks):
            for kind in whole:
                assert_close(f"{kind} on {ranks} ranks", result[kind]["y"], began[0][kind]["y"])
                assert result[kind]["state"].keys() == whole[kind].keys()
