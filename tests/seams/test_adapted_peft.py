"""Adapters of peft beside what was adapted, in one model."""

import pytest
import torch

from synchromesh import SplitFFN, StaticSparsity
from synchromesh.adapt.adaptation import adapt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # read by peft


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def learned(model: torch.nn.Module, ids: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_lora_on_attention_stands_beside_experts_that_are_merged_below_it():
    model, ids = llama(), torch.randint(0, 32, (2, 7))
    adaptation = adapt(model, "*.mlp", SplitFFN(num_experts=4, k=4))
    wanted = model(input_ids=ids).logits
    both = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(both(input_ids=ids).logits, wanted)
    for parameter in adaptation.trained().values():
        assert not parameter.requires_grad  # peft freezes all that is not its own
    learned(both, ids)
    after = both(input_ids=ids).logits
    assert not torch.allclose(after, wanted)
    adaptation.merge()
    torch.testing.assert_close(both(input_ids=ids).logits, after)
    torch.testing.assert_close(both.merge_and_unload()(input_ids=ids).logits, after)


def test_lora_around_masked_layers_goes_dense_below_it():
    model, ids = llama(), torch.randint(0, 32, (2, 7))
    adaptation = adapt(model, "*.q_proj", StaticSparsity(0.5))
    both = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    learned(both, ids)
    after = both(input_ids=ids).logits
    adaptation.merge()
    torch.testing.assert_close(both(input_ids=ids).logits, after)
