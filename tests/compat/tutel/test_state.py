import pytest
import torch

from synchromesh.compat.tutel.moe import moe_layer

D, H, E = 8, 16, 3


def layer(kind="ffn", experts=E, hidden=H):
    settings = {"type": kind, "num_experts_per_device": experts, "hidden_size_per_expert": hidden}
    return moe_layer({"type": "top"}, D, settings)


def test_names_and_shapes_are_tutels():
    shapes = {name: tuple(value.shape) for name, value in layer().state_dict().items()}
    assert shapes == {
        "_num_global_experts": (),
        "experts.batched_fc1_w": (E, H, D),
        "experts.batched_fc2_w": (E, H, D),
        "experts.batched_fc1_bias": (E, H),
        "experts.batched_fc2_bias": (E, D),
        "gates.0.wg.weight": (E, D),
    }
    assert layer().state_dict()["_num_global_experts"] == E
    flat = {name: tuple(value.shape) for name, value in layer("llama_ffn").state_dict().items() if "W_" in name}
    assert flat == {f"experts.W_fc{i}": (E * D * H,) for i in (1, 2, 3)}


def test_an_old_file_loads():
    """It has no number of experts, and biases with a dim of 1 more."""
    old, new = layer().state_dict(), layer()
    wanted = {name: value.clone() for name, value in old.items()}
    del old["_num_global_experts"]
    for name in ("experts.batched_fc1_bias", "experts.batched_fc2_bias"):
        old[name] = old[name][:, None]
    new.load_state_dict(old)
    assert all(torch.equal(value, wanted[name]) for name, value in new.state_dict().items())
    assert old["experts.batched_fc1_bias"].dim() == 3
    assert "_num_global_experts" not in old


def test_a_missing_bias_is_zero_and_a_missing_weight_an_error():
    state, new = layer().state_dict(), layer()
    del state["experts.batched_fc2_bias"]
    with pytest.warns(UserWarning, match="no experts.batched_fc2_bias: it is taken for 0"):
        new.load_state_dict(state)
    assert (new.experts.batched_fc2_bias == 0).all()
    before = copy_of(other := layer())
    del state["experts.batched_fc1_w"]
    with pytest.raises(RuntimeError, match=r"Missing key.*batched_fc1_w.*batched_fc2_bias"):
        other.load_state_dict(state)
    assert torch.equal(other.experts.batched_fc2_bias, before["experts.batched_fc2_bias"])


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("taken", [(), ("1._num_global_experts",), ("1.experts.batched_fc1_w",)])
def test_a_partial_load_changes_nothing_else(taken):
    model = torch.nn.Sequential(torch.nn.Linear(D, D), layer())
    before, other = copy_of(model), torch.nn.Sequential(torch.nn.Linear(D, D), layer()).state_dict()
    part = {name: other[name] for name in ("0.weight", *taken)}
    found = model.load_state_dict(part, strict=False)
    assert set(found.missing_keys) == before.keys() - part.keys()
    assert all(torch.equal(value, {**before, **part}[name]) for name, value in model.state_dict().items())


def test_a_bias_keeps_its_numbers_where_the_weights_do_not_fit():
    model, other = layer(), layer(hidden=2 * H).state_dict()
    before = copy_of(model)
    del other["experts.batched_fc2_bias"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other, strict=False)
    assert torch.equal(model.experts.batched_fc2_bias, before["experts.batched_fc2_bias"])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_what_does_not_fit_is_refused_and_loses_nothing(strict, assign):
    new = layer()
    before, parameters = copy_of(new), list(new.parameters())
    with pytest.raises(RuntimeError, match="holds 6 experts, wanted 3: bring it to this number of ranks") as error:
        torch.nn.Sequential(new).load_state_dict(
            torch.nn.Sequential(layer(experts=6)).state_dict(), strict=strict, assign=assign
        )
    assert "issing" not in str(error.value)
    assert all(one is other for one, other in zip(new.parameters(), parameters, strict=True))
    turned = layer().state_dict()
    turned = {name: value.mT.clone() if name.endswith("_w") else value for name, value in turned.items()}
    with pytest.raises(RuntimeError, match=r"size mismatch for experts.batched_fc1_w"):
        moe_layer({"type": "top"}, D, new_settings()).load_state_dict(turned)
    assert all(torch.equal(value, before[name]) for name, value in new.state_dict().items())


def new_settings():
    return {"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H}


def test_flat_pieces_are_taken_in_any_shape():
    state, new = layer("llama_ffn").state_dict(), layer("llama_ffn")
    whole = {name: value.view(E, -1) if "W_" in name else value for name, value in state.items()}
    new.load_state_dict(whole)
    assert all(torch.equal(value, state[name]) for name, value in new.state_dict().items())
