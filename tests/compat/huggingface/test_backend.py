"""A transformers model gives the same numbers with this backend as with its own loop."""

from unittest.mock import patch

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from synchromesh.compat.huggingface import backend, register
from synchromesh.testing.compare import TOLERANCE, assert_close, relative_rms

register()


def loss_of(model, batch):
    """The loss of a training step, with the router's own where the model has one."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    routed = {"output_router_logits": True} if model.config.model_type == "mixtral" else {}
    return model(**batch, **routed, labels=labels, use_cache=False)


def step(model, batch, implementation):
    """The logits, the loss and every gradient, by name; the loss in the dtype that it was computed from."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = loss_of(model, batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach().to(out.logits.dtype)} | grads


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert_close(name, got[name], wanted[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_equals_the_eager_one(kind, dtype, build, inputs):
    model = build(kind).to(dtype)
    batch = inputs(model)
    wanted = step(model, batch, "eager")
    assert all(wanted[name].any() for name in wanted if ".experts." in name)
    with patch.object(backend, "network_of", wraps=backend.network_of) as called:
        assert_same(step(model, batch, "synchromesh"), wanted)
    assert called.call_count == (1 if kind == "deepseek_v3" else 2)  # its first layer is dense


def test_generation_is_equal_token_for_token(kind, build, inputs):
    model = build(kind)
    batch, tokens = inputs(model), {}
    for implementation in ("eager", "synchromesh"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(tokens["eager"], tokens["synchromesh"])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_is_saved_and_loaded_is_equal(family, build, inputs, tmp_path):
    model = build(family)
    model.set_experts_implementation("synchromesh")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="synchromesh")
    assert loaded.get_experts_implementation()[""] == "synchromesh"
    batch = inputs(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert_close("logits", loaded(**batch).logits, eager(**batch).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(family, reentrant, build, inputs):
    model = build(family).train()
    batch = inputs(model)
    wanted = step(model, batch, "synchromesh")
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(step(model, batch, "synchromesh"), wanted)


def test_autocast_reaches_the_experts(build, inputs):
    model = build("mixtral")
    batch = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, got = step(model, batch, "eager"), step(model, batch, "synchromesh")
        experts = model.model.layers[0].mlp.experts
        x = torch.randn(4, 32)
        y = backend.experts_forward(experts, x, torch.tensor([[0, 1]] * 4), torch.ones(4, 2))
    assert y.dtype == torch.float32
    assert torch.equal(y, y.to(torch.bfloat16).float())
    assert got["model.layers.0.mlp.experts.down_proj"].dtype == torch.float32
    for name in wanted:
        assert relative_rms(got[name], wanted[name]) <= TOLERANCE[torch.bfloat16], name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_adapters_on_attention_train_beside_it(build, inputs):
    model, grads = build("qwen3_moe"), {}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    batch = inputs(model)
    for implementation in ("eager", "synchromesh"):
        model.base_model.model.set_experts_implementation(implementation)
        model.zero_grad()
        loss_of(model, batch).loss.backward()
        grads[implementation] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads["eager"]) == 8
    assert_same(grads["synchromesh"], grads["eager"])


def test_weights_of_another_dtype_than_the_hidden_states(build):
    """Norms kept in float32 hand such states to bfloat16 experts."""
    experts = build("mixtral").to(torch.bfloat16).model.layers[0].mlp.experts
    x, ids, weights = torch.randn(5, 32), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    y = backend.experts_forward(experts, x, ids, weights)
    assert y.dtype == torch.float32
    assert_close("y", y.to(torch.bfloat16), backend.experts_forward(experts, x.to(torch.bfloat16), ids, weights))


def test_an_old_list_of_names_is_widened(monkeypatch, build):
    def listed(self, requested_experts):
        if requested_experts not in (None, "eager", "grouped_mm", "batched_mm"):
            raise ValueError(f"{requested_experts} is not supported")
        return requested_experts or "eager"

    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", listed)
    model = build("mixtral")
    with pytest.raises(ValueError, match="not supported"):
        model.set_experts_implementation("synchromesh")
    for _ in range(2):
        register()
        model.set_experts_implementation("synchromesh")
    assert model.config._experts_implementation == "synchromesh"
    with pytest.raises(ValueError, match="nonsense"):
        model.set_experts_implementation("nonsense")


def test_a_transformers_without_a_registry_is_named(monkeypatch):
    monkeypatch.delattr("transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS")
    with pytest.raises(RuntimeError, match=r"install transformers>=5\.0"):
        register()


def test_quantized_experts_are_refused(build):
    experts = build("mixtral").model.layers[0].mlp.experts
    del experts.gate_up_proj
    with pytest.raises(ValueError, match=r"MixtralExperts has no gate_up_proj.*quantized"):
        backend.experts_forward(experts, torch.randn(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
