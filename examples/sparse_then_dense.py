"""SPDF: train with three quarters of the weights at 0, then let all of them learn, from the same function."""

import torch
from torch import nn

from synchromesh import StaticSparsity, count_entries, densify
from synchromesh.adapt.adaptation import adapt

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
x = torch.randn(256, 32)
wanted = (x @ torch.randn(32, 32)).tanh()


def train(steps: int, optimizer: torch.optim.Optimizer) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


adapt(model, nn.Linear, StaticSparsity(0.75, seed=0))
entries = count_entries(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
print(f"{entries.kept} of {entries.all} entries: loss {train(100, optimizer):.3f}")
assert int((model[0].weight == 0).sum()) == 0.75 * model[0].weight.numel()  # momentum and decay move none of them

before = model(x)
densify(model, optimizer)  # the same parameters, the same optimizer, without its memory of them
assert torch.equal(model(x), before)
print(f"all entries: loss {train(100, optimizer):.3f}")
