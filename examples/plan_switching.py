"""One layer, every plan, the same result: the plan changes between two calls and nothing moves.

torchrun --nproc-per-node 4 examples/plan_switching.py
"""

import torch

from synchromesh import Dropless, MLPExperts, MoE, Plan, Sharded, TopKRouter
from synchromesh.parallel.comm.job import joined
from synchromesh.types import Workload

with joined() as grid:
    torch.manual_seed(0)
    strategy = Sharded(grid)
    layer = MoE(TopKRouter(32, 8, k=2), MLPExperts(8, 32, hidden=64), strategy=strategy)
    torch.manual_seed(grid.rank)
    x = torch.randn(64 * (grid.rank + 1), 32)  # ranks may hold different numbers of tokens

    work = Workload(len(x), 2, 32, 64, 8, x.dtype, training=True)
    wanted = None
    for plan, reason in strategy.legal_plans(work, Dropless()).items():
        if reason is not None or plan.chunks > 2:
            continue
        layer.zero_grad()
        y = layer(x, plan=plan)
        y.square().sum().backward()
        found = torch.cat([y.flatten(), layer.experts.up.grad.flatten()])
        wanted = found if wanted is None else wanted
        if grid.rank == 0:
            print(f"{plan!s:28} differs from the first plan by {(found - wanted).abs().max().item():.1e}")
    refused = Plan(gather=grid.size + 1)
    if grid.rank == 0:
        print(f"{refused!s:28} refused: {strategy.refusal(refused, work, Dropless())}")
