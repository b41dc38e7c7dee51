"""Turn the feed-forward blocks of an existing model into MoE layers whose experts start as copies of them."""

import torch
from torch import nn

from synchromesh import MLPExperts, MoE, TopKRouter, replace_ffn


class FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def upcycled(old: FeedForward, num_experts: int = 4) -> MoE:
    up, down = old[0], old[2]
    experts = MLPExperts(num_experts, up.in_features, hidden=up.out_features)
    with torch.no_grad():
        experts.up.copy_(up.weight.expand_as(experts.up))
        experts.up_bias.copy_(up.bias.expand_as(experts.up_bias))
        experts.down.copy_(down.weight.T.expand_as(experts.down))
        experts.down_bias.copy_(down.bias.expand_as(experts.down_bias))
    return MoE(TopKRouter(up.in_features, num_experts, k=num_experts), experts)


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), FeedForward(32), nn.LayerNorm(32), FeedForward(32))
x = torch.randn(10, 16)
before = model(x)
names = replace_ffn(model, lambda name, module: isinstance(module, FeedForward), upcycled)
error = (model(x) - before).abs().max().item()
print(f"replaced {names}; with all experts chosen the output moved by {error:.1e}")
