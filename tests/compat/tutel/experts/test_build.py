import pytest
import torch
from torch import nn

from synchromesh.compat.tutel.experts.build import build_experts
from synchromesh.compat.tutel.experts.share import Share
from synchromesh.moe.experts import WHOLE, Cut

ALONE = Share(model_dim=6, num_experts=2, cut=WHOLE)
SHARED = Share(model_dim=6, num_experts=2, cut=Cut(3, 8))


def test_a_share_knows_its_numbers():
    assert (ALONE.local_experts, ALONE.sharded_count) == (2, 1)
    assert (SHARED.local_experts, SHARED.sharded_count) == (1, 4)


def as_dict(**settings):
    return settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "mlp"}, "of type 'mlp', wanted 'ffn', 'llama_ffn', or 'custom'"),
        ({"hidden_size_per_expert": 4}, "of type None"),
        ({"type": "ffn"}, "wanted hidden_size_per_expert"),
        ({"type": "ffn", "hidden_size_per_expert": 8, "dropout": 0.1}, "'dropout', 'hidden_size_per_expert'"),
        ({"type": "llama_ffn", "hidden_size_per_expert": 8, "output_dim": 4}, "'output_dim'"),
        ({"type": "ffn", "hidden_size_per_expert": 6}, "is 6, wanted a multiple of the 4 ranks"),
        (
            {"type": "ffn", "hidden_size_per_expert": 8, "activation_fn": abs, "activation_fn_with_self": abs},
            "wanted one of them",
        ),
        ({"type": "custom"}, "module=None, wanted a class"),
        ({"type": "custom", "module": nn.ReLU}, "takes no num_experts_per_device"),
        ({"type": "custom", "module": as_dict}, "are a dict, wanted a torch.nn.Module"),
    ],
)
def test_wrong_experts_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        build_experts(settings, SHARED)


def test_experts_are_born_with_their_cut():
    experts = build_experts({"type": "ffn", "hidden_size_per_expert": 8}, SHARED)
    experts.hold(Cut(3, 8))
    with pytest.raises(ValueError, match="these experts were created as"):
        experts.hold(Cut(2, 8))
    assert experts.batched_fc2_bias.shape == (1, 2)
    assert experts.vectors == (8, 6)


def test_an_activation_may_use_its_experts():
    plain = build_experts({"type": "ffn", "hidden_size_per_expert": 8}, ALONE)
    assert torch.equal(plain.activation_fn(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
    own = {"type": "ffn", "hidden_size_per_expert": 8, "activation_fn_with_self": lambda x, me: x * me.hidden_size}
    assert torch.equal(build_experts(own, ALONE).activation_fn(torch.ones(2)), torch.full((2,), 8.0))
