import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from synchromesh.compat.tutel.moe import moe_layer
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, H, T = 6, 5, 13


def tokens(rank):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(50 + rank), dtype=torch.float64)


def forward_and_backward(number):
    """The output, and the gradients, at every degree."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.set_default_dtype(torch.float64)
    layer = moe_layer(
        {"type": "top", "k": 2, "capacity_factor": 0},
        D,
        {"type": "llama_ffn", "num_experts_per_device": number, "hidden_size_per_expert": H},
        seeds=(1, rank + 1),
    )
    torch.set_default_dtype(torch.float32)
    assert layer.world_size == world
    found = []
    for degree in layer.valid_rs:
        layer.zero_grad()
        y = layer(tokens(rank), adaptive_r=degree)
        y.square().sum().backward()
        grads = {name: p.grad.numpy() for name, p in layer.get_parameter_iterator("local_experts")}
        found.append((y.detach().numpy(), grads))
    return found


def all_of(numbers):
    return [forward_and_backward(number) for number in numbers]


def definition(number, world):
    experts = number * world if number > 0 else world // -number
    local, shards = max(1, experts // world), max(1, world // experts)
    pieces = {f"W_fc{i}": [] for i in (1, 2, 3)}
    for rank in range(world):
        torch.manual_seed(rank + 1)
        for own in pieces.values():
            size = -(-local * D * H // shards)
            own.append(torch.empty(size, dtype=torch.float64).normal_(0, 0.01).requires_grad_())
    torch.manual_seed(1)
    gate = torch.nn.Linear(D, experts, bias=False, dtype=torch.float64).weight
    wholes = []
    for name, own in pieces.items():
        rows = [torch.cat(own[e * shards : (e + 1) * shards])[: local * D * H] for e in range(world // shards)]
        shape = (H, D) if name == "W_fc3" else (D, H)
        wholes.append(torch.cat(rows).view(experts, *shape))
    ys = []
    for rank in range(world):
        x = tokens(rank)
        weights, ids = (x @ gate.t()).softmax(1).topk(min(2, experts))
        weights = weights / weights.sum(1, keepdim=True) if experts > 1 else weights
        w1, w2, w3 = (whole[ids] for whole in wholes)  # [T K . .]
        hidden = F.silu(torch.einsum("td,tkdh->tkh", x, w1)) * torch.einsum("td,tkdh->tkh", x, w2)
        ys.append(torch.einsum("tkh,tkhd,tk->td", hidden, w3, weights))
    sum(y.square().sum() for y in ys).backward()
    return ys, pieces


@pytest.mark.parametrize(("world", "numbers"), [(1, [1, 3]), (2, [1, 2, -2]), (4, [-2, -4])])
def test_every_degree_gives_the_definition(world, numbers):
    results = [all_of(numbers)] if world == 1 else run_ranks(all_of, world, numbers)
    for index, number in enumerate(numbers):
        ys, pieces = definition(number, world)
        for rank, found in enumerate(results):
            for degree, (y, grads) in enumerate(found[index]):
                said = f"{number} experts, rank {rank} of {world}, degree no. {degree}:"
                assert_close(f"{said} output", torch.from_numpy(y), ys[rank].detach())
                for name, grad in grads.items():
                    assert_close(f"{said} gradient of {name}", torch.from_numpy(grad), pieces[name][rank].grad)
