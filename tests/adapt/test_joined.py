import copy

import pytest
import torch
from torch import nn

from synchromesh import SplitFFN
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
