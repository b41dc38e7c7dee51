"""Experts sharded by this library, everything else by torch's FSDP2.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import torch
from torch import nn

from synchromesh import FullySharded, MLPExperts, MoE, TopKRouter, clip_grad_norm, parallelize, split_by_kind
from synchromesh.parallel.comm.job import joined

with joined() as grid:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64),
        nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, batch_first=True, dropout=0.0),
        MoE(TopKRouter(64, 8), MLPExperts(8, 64, hidden=128)),
        nn.Linear(64, 16),
    )
    run = parallelize(
        model, grid, shared=FullySharded(blocks=lambda module: isinstance(module, nn.TransformerEncoderLayer))
    )
    # Plain tensors and DTensors never stand in one group: foreach and fused optimizers do not take both.
    optimizer = torch.optim.AdamW([{"params": group} for group in split_by_kind(run.parameters())], lr=1e-3)
    torch.manual_seed(grid.rank)
    for step in range(10):
        x = torch.randn(8, 32, 16)
        loss = (run(x) - x.flip(1)).square().mean()
        loss.backward()
        norm = clip_grad_norm(model, grid, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0 and grid.rank == 0:
            print(f"step {step}  loss {loss.item():.3f}  gradient norm {norm.item():.3f}")
