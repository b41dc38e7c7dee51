"""Turn the feed-forward blocks of an existing model into MoE layers whose experts start as copies of them."""

import torch
from torch import nn

from synchromesh import Upcycle, aux_loss
from synchromesh.adapt.adaptation import adapt


class FeedForward(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), FeedForward(32), nn.LayerNorm(32), FeedForward(32))
x = torch.randn(40, 16)
before = model(x)
adaptation = adapt(model, FeedForward, Upcycle(num_experts=4, k=2))
error = (model(x) - before).abs().max().item()
print(f"replaced {adaptation.names}; the output moved by {error:.1e}")
assert error < 1e-5

optimizer = torch.optim.AdamW(adaptation.trained().values(), lr=1e-3)  # experts and routers alone
for _ in range(20):
    loss = (model(x) - x.repeat(1, 2).sin()).square().mean() + aux_loss(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}; experts differ by {model[1].moe.experts.up.std(0).mean().item():.1e}")
