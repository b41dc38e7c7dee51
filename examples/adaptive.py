"""A layer that finds its own plan: trials are training steps, and the workload changes halfway.

torchrun --nproc-per-node 4 examples/adaptive.py
"""

import torch

from synchromesh import Adaptive, MLPExperts, MoE, TopKRouter
from synchromesh.parallel.comm.job import joined

with joined() as grid:
    torch.manual_seed(0)
    strategy = Adaptive(grid)
    layer = MoE(TopKRouter(64, 8, k=2), MLPExperts(8, 64, hidden=256), strategy=strategy)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    torch.manual_seed(grid.rank)
    for tokens in (1024, 16):
        for _ in range(60):
            layer(torch.randn(tokens, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    if grid.rank == 0:
        print(f"{len(strategy.record)} changes of plan in {strategy.forwards} steps on {grid.size} ranks")
        for work, entry in strategy.tuner.entries.items():
            print(
                f"{work.rows:5} tokens, skew {2**work.skew}: {entry.best}{'' if entry.settled else ' (still trying)'}"
            )
            for trial in sorted(entry.trials, key=lambda trial: trial.median):
                times = f"predicted {trial.predicted * 1e3:6.2f} ms, measured {trial.median * 1e3:6.2f}"
                print(f"      {trial.plan!s:28} {times}")
