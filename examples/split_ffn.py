"""EMoE: feed-forward blocks split into experts without new parameters, tuned so, and merged into a dense model."""

import copy

import torch
from torch import nn

from synchromesh import SplitFFN, routing_options
from synchromesh.adapt.adaptation import adapt

torch.manual_seed(0)


class Block(nn.Module):
    """A transformer block whose feed-forward is a module of its own, as in most models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


model, x = nn.Sequential(Block(), Block()), torch.randn(8, 10, 32)
before, first = copy.deepcopy(model.state_dict()), model(x)

adaptation = adapt(model, "*.mlp", SplitFFN(num_experts=8, k=4))  # balanced k-means of the first layer's rows
print(f"split {adaptation.names}: half of the experts moves the output by {(model(x) - first).abs().mean().item():.1e}")
with routing_options(model, k=8):
    assert torch.allclose(model(x), first, atol=1e-5)  # all of them are the dense model
assert all(torch.equal(p, before[n]) for n, p in copy.deepcopy(adaptation).merge().state_dict().items())

optimizer = torch.optim.AdamW(adaptation.trained().values(), lr=1e-3)
for _ in range(20):
    loss = (model(x) - x.roll(1, 1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    adaptation.after_step()  # gates follow their experts' rows
print(f"loss {loss.item():.3f} as experts, {(adaptation.merge()(x) - x.roll(1, 1)).square().mean().item():.3f} merged")
