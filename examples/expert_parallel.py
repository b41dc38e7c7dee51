"""A model with experts on many ranks: build it for one process, parallelize it, train it. Runs on any number of ranks.

python examples/expert_parallel.py
torchrun --nproc-per-node 4 examples/expert_parallel.py
"""

import torch
from torch import nn

from synchromesh import LoadBalance, MLPExperts, MoE, TopKRouter, aux_loss, clip_grad_norm, parallelize
from synchromesh.parallel.comm.job import joined


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ffn = MoE(TopKRouter(width, 8, k=2), MLPExperts(8, width, hidden=4 * width), losses=(LoadBalance(0.01),))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm(x))


with joined() as grid:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), Block(64), Block(64), nn.Linear(64, 16))
    run = parallelize(model, grid)  # experts are sharded, the rest is replicated by DDP
    optimizer = torch.optim.AdamW(run.parameters(), lr=2e-3)
    torch.manual_seed(grid.rank)  # every rank has data of its own
    for step in range(30):
        x = torch.randn(256, 16)
        loss = (run(x) - x.roll(1, dims=1).sin()).square().mean() + aux_loss(model)
        loss.backward()
        clip_grad_norm(model, grid, 1.0)  # one norm over all ranks, each expert counted once
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and grid.rank == 0:
            print(f"step {step:2d} on {grid.size} ranks  loss {loss.item():.3f}")
    held = sum(p.numel() for p in model.parameters())
    print(f"rank {grid.rank} holds {held:,} parameters")
