"""A transformers model gives the same numbers with this backend as with its own loop."""

from types import SimpleNamespace
from unittest.mock import patch

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.jamba.modeling_jamba import JambaTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router

from synchromesh import NodeLimit, Sigmoid, Softmax, TopKRouter
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


# A family with its options; the scores of this library that are its own; the factor it puts on its weights; and whether
# a single choice is weighed in the same way, which the families that divide by the sum do not: they make it 1.
FAMILIES = [
    ("mixtral", {}, Softmax(normalize=True), 1.0, False),
    ("qwen2_moe", {}, Softmax(), 1.0, True),  # by default it does not normalise
    ("qwen2_moe", {"norm_topk_prob": True}, Softmax(normalize=True), 1.0, False),
    ("qwen3_moe", {"norm_topk_prob": True}, Softmax(normalize=True), 1.0, False),
    ("qwen3_moe", {"norm_topk_prob": False}, Softmax(), 1.0, True),
    ("olmoe", {}, Softmax(), 1.0, True),
    ("olmoe", {"norm_topk_prob": True}, Softmax(normalize=True), 1.0, False),
    ("deepseek_v3", {}, Sigmoid(), 2.5, False),
    ("deepseek_v3", {"norm_topk_prob": False}, Sigmoid(normalize=False), 2.5, True),
    ("glm4_moe", {"routed_scaling_factor": 1.5}, Sigmoid(), 1.5, False),
    ("glm4_moe", {"norm_topk_prob": False}, Sigmoid(normalize=False), 1.0, True),
    ("gpt_oss", {}, Softmax(after_selection=True), 1.0, True),
    ("granitemoe", {}, Softmax(after_selection=True), 1.0, True),
]
SINGLE_IS_ONE = [not same or getattr(scores, "after_selection", False) for _, _, scores, _, same in FAMILIES]


def named(value):
    return " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else None


def gate_of(model):
    """The router of the last layer and the network's own name for its weight."""
    return next(m for m in reversed(list(model.modules())) if type(m).__name__.lower().endswith("topkrouter"))


def chosen(gate, x):
    """The ids and weights of a family's router, whatever their places in what it returns."""
    found = gate(x)
    ids = next(one for one in found if one.dtype == torch.int64)
    weights = next(one for one in found if one.is_floating_point() and one.shape == ids.shape)
    return ids, weights


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("family", "more"), [row[:2] for row in FAMILIES], ids=named)
def test_one_and_two_choices_equal_the_eager_loop(family, more, k, build, inputs):
    model = build(family, num_experts_per_tok=k, **more)
    batch = inputs(model)
    wanted, got = step(model, batch, "eager"), step(model, batch, "synchromesh")
    single = SINGLE_IS_ONE[[row[:2] for row in FAMILIES].index((family, more))] and k == 1
    single = single and family != "mixtral"  # whose own loss is on
    for name in wanted:
        if single and (".gate." in name or ".router." in name):
            # The weight is 1 whatever the router says: what is left is the rounding of x / x.
            assert max(got[name].abs().max(), wanted[name].abs().max()) < 1e-6, name
        else:
            assert_close(name, got[name], wanted[name])


@pytest.mark.parametrize(("family", "more", "scores", "factor", "same"), FAMILIES, ids=named)
def test_these_scores_weigh_choices_as_the_family_does(family, more, scores, factor, same, build):
    """docs/migration.md has this table."""
    for k in (1, 2):
        theirs = gate_of(build(family, num_experts_per_tok=k, **more))
        theirs.weight.data.normal_()
        if getattr(theirs, "bias", None) is not None:  # gpt-oss; ours has none
            theirs.bias.data.zero_()
        limit = NodeLimit(4, 2) if family == "deepseek_v3" else None
        ours = TopKRouter(32, len(theirs.weight), k=k, scores=scores, limit=limit)
        ours.weight.data.copy_(theirs.weight)
        x = torch.randn(20, 32)
        routing, (ids, weights) = ours(x), chosen(theirs, x)
        order = ids.argsort(1)
        own = routing.expert_ids.argsort(1)
        assert torch.equal(ids.gather(1, order), routing.expert_ids.gather(1, own))
        if k == 1 and not same:
            assert_close("a single weight of theirs", weights, torch.full((20, 1), factor))
            assert routing.weights.max() < 1  # ours stays the score, and its gradient reaches the router
            assert torch.autograd.grad(routing.weights.sum(), ours.weight)[0].abs().max() > 1e-3
        else:
            assert_close("weights", factor * routing.weights.gather(1, own), weights.gather(1, order))


@pytest.mark.parametrize("k", [1, 2])
def test_llama_4_never_normalises(k):
    """It weighs what goes into its experts, and computes them all: they cannot be switched."""
    config = SimpleNamespace(hidden_size=32, num_local_experts=4, num_experts_per_tok=k)
    theirs, ours = Llama4Router(config), TopKRouter(32, 4, k=k, scores=Sigmoid(normalize=False))
    ours.weight.data.copy_(theirs.weight)
    x = torch.randn(20, 32)
    routing, weights = ours(x), theirs(x)[0]
    assert_close("weights", torch.zeros(20, 4).scatter(1, routing.expert_ids, routing.weights), weights)


@pytest.mark.parametrize("k", [1, 2])
def test_jamba_never_normalises(k):
    config = SimpleNamespace(hidden_size=32, num_experts=4, num_experts_per_tok=k)
    theirs, ours = JambaTopKRouter(config), TopKRouter(32, 4, k=k, scores=Softmax())
    theirs.weight.data.copy_(ours.weight.data)
    x = torch.randn(20, 32)
    routing, (ids, weights) = ours(x), chosen(theirs, x)
    assert torch.equal(routing.expert_ids, ids)
    assert_close("weights", routing.weights, weights)
