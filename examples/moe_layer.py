"""A MoE layer in place of a feed-forward block: train it, watch its load, change k and capacity between two calls."""

import torch

from synchromesh import FixedCapacity, LoadBalance, MLPExperts, MoE, TopKRouter, aux_loss, load_stats, routing_options

torch.manual_seed(0)
moe = MoE(TopKRouter(64, 8, k=2), MLPExperts(8, 64, hidden=256), losses=(LoadBalance(0.01),))
optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-3)

x = torch.randn(4, 128, 64)
target = x.roll(1, dims=-1).sin()
for step in range(50):
    loss = (moe(x) - target).square().mean() + aux_loss(moe)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        load = load_stats(moe)[""].tokens_per_expert
        print(f"step {step:2d}  loss {loss.item():.3f}  tokens per expert {load.tolist()}")

with torch.no_grad(), routing_options(moe, k=1, capacity=FixedCapacity(1.25)):
    print(f"one expert per token, capacity 1.25: error {(moe(x) - target).square().mean().item():.3f}")
