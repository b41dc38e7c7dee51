"""A MoE layer in every stage of torch's pipelines: the balance loss arrives, by every schedule."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from synchromesh import InBackward, LoadBalance, MLPExperts, MoE, TopKRouter, aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, MICRO = 8, 4
# The stages of both ranks.
SCHEDULES = {
    "GPipe": (ScheduleGPipe, [(0,), (1,)]),
    "1F1B": (Schedule1F1B, [(0,), (1,)]),
    "interleaved": (ScheduleInterleaved1F1B, [(0, 2), (1, 3)]),
    "zero bubble": (ScheduleInterleavedZeroBubble, [(0, 2), (1, 3)]),
    "zero bubble in a V": (ScheduleZBVZeroBubble, [(0, 3), (1, 2)]),
}


class Block(nn.Module):
    """Adds to what the layer returns in place, as residual blocks do."""

    def __init__(self, number, losses_in_backward):
        super().__init__()
        torch.manual_seed(number)
        self.first = nn.Linear(D, D)
        experts = MLPExperts(4, D, hidden=16)
        losses = (LoadBalance(0.5),)
        self.moe = MoE(TopKRouter(D, 4, k=2), experts, losses=losses, losses_in_backward=losses_in_backward)

    def forward(self, x):
        y = self.moe(self.first(x))
        y += x
        return y


def loss_of(output, target):
    return (output - target).square().mean()


def stages_of(name):
    schedule, stages = SCHEDULES[name]
    count, own = sum(map(len, stages)), stages[dist.get_rank()]
    x = torch.randn(2 * MICRO, D, generator=torch.Generator().manual_seed(1))
    blocks = [Block(number, InBackward()) for number in own]
    made = [PipelineStage(b, n, count, torch.device("cpu")) for b, n in zip(blocks, own, strict=True)]
    run = schedule(made if count > 2 else made[0], MICRO, loss_fn=loss_of)
    run.step(*((x,) if 0 in own else ()), **({"target": x.sin()} if count - 1 in own else {}))

    whole = nn.Sequential(*(Block(number, None) for number in range(count)))
    for part in x.chunk(MICRO):
        ((loss_of(whole(part), part.sin()) + aux_loss(whole)) / MICRO).backward()
    for block, number in zip(blocks, own, strict=True):
        for (key, got), wanted in zip(block.named_parameters(), whole[number].parameters(), strict=True):
            assert_close(f"stage {number}, {key}", got.grad, wanted.grad)
    return True


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_gradients_are_those_of_one_process_that_reads_the_loss(name):
    assert run_ranks(stages_of, 2, name) == [True, True]
