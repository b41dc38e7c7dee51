import copy

import pytest
import torch
from torch import nn

from synchromesh import SplitFFN, Upcycle
from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.joined import join_feed_forwards, part_feed_forwards


def test_a_swin_of_transformers_is_joined_split_merged_and_parted_bit_for_bit():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=16, patch_size=4, num_channels=1, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    model, x = transformers.Swinv2ForImageClassification(config).double().eval(), torch.randn(2, 1, 16, 16).double()
    wanted, state = model(x).logits, copy.deepcopy(model.state_dict())
    names = join_feed_forwards(model)
    assert names == [f"swinv2.encoder.layers.{stage}.blocks.0.intermediate" for stage in range(2)]
    assert torch.equal(model(x).logits, wanted)
    adaptation = adapt(model, "*.intermediate", SplitFFN(num_experts=4, k=4))
    assert adaptation.names == tuple(names)
    assert (model(x).logits - wanted).abs().max() < 1e-12
    with pytest.raises(ValueError, match="has no joined block: merge or undo"):
        part_feed_forwards(model)
    adaptation.merge()
    assert part_feed_forwards(model) == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x).logits, wanted)


def test_a_model_without_such_neighbours_is_refused():
    with pytest.raises(ValueError, match="wanted modules in it with the children 'intermediate' and 'output'"):
        join_feed_forwards(nn.Sequential(nn.Linear(4, 4)))


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double().eval()


@pytest.mark.parametrize("into", [SplitFFN(num_experts=4, k=4), Upcycle(num_experts=4, k=2)], ids=["split", "upcycled"])
def test_a_bert_whose_second_module_adds_a_residual_is_joined_adapted_merged_and_parted_bit_for_bit(into):
    model, ids = bert(), torch.randint(0, 32, (2, 5))
    wanted, state = model(input_ids=ids).logits, copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"intermediate .* is no feed-forward block.*`join_feed_forwards` makes"):
        adapt(model, "*.intermediate", into)
    names = join_feed_forwards(model)
    assert names == [f"bert.encoder.layer.{number}.intermediate" for number in range(2)]
    assert torch.equal(model(input_ids=ids).logits, wanted)
    adaptation = adapt(model, "*.intermediate", into)
    assert (model(input_ids=ids).logits - wanted).abs().max() < 1e-12
    model(input_ids=ids).logits.sum().backward()
    learns = [p.grad for name, p in adaptation.trained().items() if "router" not in name]
    assert all(gradient is not None for gradient in learns)
    assert part_feed_forwards(adaptation.merge()) == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(input_ids=ids).logits, wanted)


def test_a_second_module_that_adds_something_and_has_two_layers_is_refused():
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x, residual):
            return self.b(self.a(x)) + residual

    layer = nn.ModuleDict({"intermediate": nn.Linear(4, 8), "output": Output()})
    with pytest.raises(ValueError, match=r"0.output \(Output\) takes more than one input and has 2 linear layers"):
        join_feed_forwards(nn.Sequential(layer))
    assert type(layer["intermediate"]) is nn.Linear
