"""torch.compile takes transformers' experts, and whole models where these allow it. Runs without the shape hook."""

from collections.abc import Iterator

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from synchromesh.compat.huggingface import register
from synchromesh.testing.compare import assert_close

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    register()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("kind", "dtype"), [("mixtral", torch.float32), ("gpt_oss", torch.bfloat16)], ids=str)
def test_experts_compile_in_one_graph(kind, dtype):
    config = MixtralConfig(**SIZES) if kind == "mixtral" else GptOssConfig(**SIZES)
    config._experts_implementation = "synchromesh"
    experts = (MixtralExperts if kind == "mixtral" else GptOssExperts)(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.2)
    experts.to(dtype)
    results = []
    for run in (experts, torch.compile(experts, fullgraph=True)):
        torch.manual_seed(0)
        x, weights = (t.to(dtype).requires_grad_() for t in (torch.randn(6, 16), torch.rand(6, 2)))
        ids = torch.tensor([[0, 1], [2, 0], [0, 2], [2, 1], [1, 0], [0, 2]])
        experts.zero_grad()
        y = run(x, ids, weights)
        y.float().square().sum().backward()
        results.append(
            {"y": y, "x": x.grad, "weights": weights.grad} | {n: p.grad for n, p in experts.named_parameters()}
        )
    for name, wanted in results[0].items():
        assert_close(name, results[1][name], wanted)


def test_a_model_compiles_in_one_graph():
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, vocab_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("synchromesh")
    ids = torch.randint(64, (2, 9))
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append({"loss": loss} | {name: p.grad for name, p in model.named_parameters()})
    for name, wanted in results[0].items():
        assert_close(name, results[1][name], wanted)
