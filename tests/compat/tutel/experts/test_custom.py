import pytest
import torch
import torch.distributed as dist
from torch import nn

from synchromesh.compat.tutel.moe import moe_layer
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks

D, H, T = 6, 8, 13


class Gathered(torch.autograd.Function):
    """Parts of all ranks, put together; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group, parts = group, [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(ctx.group.size())[dist.get_rank(ctx.group)], None


class Own(nn.Module):
    """A feed-forward network that gathers its shards by itself, as Tutel wants it of custom experts."""

    def __init__(self, model_dim, num_experts_per_device, sharded_count, hidden):
        super().__init__()
        self.up = nn.Parameter(torch.empty(num_experts_per_device, hidden // sharded_count, model_dim))
        self.down = nn.Parameter(torch.empty(num_experts_per_device, hidden // sharded_count, model_dim))
        with torch.no_grad():
            for expert in range(num_experts_per_device):
                self.up[expert] = nn.Linear(model_dim, hidden // sharded_count, bias=False).weight
                self.down[expert] = nn.Linear(hidden // sharded_count, model_dim, bias=False).weight.t()

    def forward(self, x, ctx):
        up, down = (self.gathered(part, ctx) for part in (self.up, self.down))
        return (x @ up.mT).relu() @ down

    def gathered(self, part, ctx):
        if ctx.world_size == 1:
            return part
        if ctx.adaptive_degree == 0:
            return Gathered.apply(part, ctx.group).reshape(ctx.num_global_experts, -1, D)
        size = ctx.sharded_count // ctx.adaptive_degree
        if size == 1:
            return part
        blocks = [list(range(at, at + size)) for at in range(0, ctx.world_size, size)]
        groups = [dist.new_group(block) for block in blocks]
        return Gathered.apply(part, groups[dist.get_rank() // size]).reshape(1, -1, D)


class Narrow(nn.Module):
    def __init__(self, output_dim, local_experts, **kwargs):
        super().__init__()
        self.output_dim, self.w = output_dim, nn.Parameter(torch.randn(local_experts, D, output_dim))

    def forward(self, x, ctx):
        assert isinstance(ctx.dispatch_count, torch.Tensor)
        return x @ self.w


class Rows(nn.Module):
    """Sees tokens in their own dims, and tells of them."""

    def __init__(self, model_dim, num_experts_per_device, sharded_count):
        super().__init__()
        self.seen = None

    def forward(self, x, ctx):
        self.seen = tuple(x.shape)
        return 2 * x


def tokens(rank=0):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(50 + rank), dtype=torch.float64)


def both(number, overlap):
    """Outputs and gradients of the same experts, built in and custom, at every degree."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.set_default_dtype(torch.float64)
    built_in = {"type": "ffn", "hidden_size_per_expert": H, "has_fc1_bias": False, "has_fc2_bias": False}
    found = [], []
    for own, settings in zip(found, (built_in, {"type": "custom", "module": Own, "hidden": H}), strict=True):
        layer = moe_layer(
            {"type": "top", "k": 2, "capacity_factor": 0.75},
            D,
            {**settings, "num_experts_per_device": number},
            seeds=(1, rank + 1),
            a2a_ffn_overlap_degree=overlap,
        )
        for degree in layer.valid_rs:
            layer.zero_grad()
            x = tokens(rank).requires_grad_()
            y = layer(x, adaptive_r=degree)
            (y.square().sum() + y.l_aux).backward()
            grads = [p.grad.numpy() for p in layer.parameters()]
            own.append([y.detach().numpy(), x.grad.numpy(), *grads])
    torch.set_default_dtype(torch.float32)
    return list(zip(*found, strict=True))


def all_of(settings):
    return [found for number, overlap in settings for found in both(number, overlap)]


@pytest.mark.parametrize(("world", "settings"), [(1, [(3, 1)]), (2, [(2, 1), (-2, 2)]), (4, [(-2, 1)])])
def test_custom_experts_are_called_as_by_tutel(world, settings):
    results = [all_of(settings)] if world == 1 else run_ranks(all_of, world, settings)
    for found in results:
        for built_in, custom in found:
            for wanted, got in zip(built_in, custom, strict=True):
                assert_close(f"custom, world {world}", torch.from_numpy(got), torch.from_numpy(wanted))


def test_experts_of_another_width_say_so():
    settings = {"type": "custom", "module": Narrow, "num_experts_per_device": 2}
    layer = moe_layer({"type": "top", "capacity_factor": 0}, D, {**settings, "output_dim": 4}, seeds=(1, 1))
    x = torch.randn(3, 5, D)
    scores, ids = layer.gates[0].wg(x).softmax(-1).max(-1)
    wanted = scores[..., None] * torch.einsum("btd,btdo->bto", x, layer.experts.w[ids])
    assert_close("narrow", layer(x), wanted)
    del layer.experts.output_dim
    layer = moe_layer({"type": "top"}, D, {"type": "custom", "module": silent, "num_experts_per_device": 2})
    with pytest.raises(ValueError, match="experts of another output width say so in an attribute output_dim"):
        layer(x)


def silent(model_dim, num_experts_per_device, sharded_count):
    experts = Narrow(4, num_experts_per_device)
    del experts.output_dim
    return experts


def test_reserved_dims_reach_the_experts():
    layer = moe_layer({"type": "top", "capacity_factor": 0}, 6, {"type": "custom", "module": Rows})
    x = torch.randn(4, 2, 3)
    y = layer(x, reserve_dims=2)
    assert_close("doubled", y, 2 * x)
    assert layer.experts.seen == (1, 4, 2, 3)
    assert layer(x[:0], reserve_dims=2).shape == (0, 2, 3)


def test_a_custom_module_stands_in_the_state_by_its_own_names():
    layer = moe_layer({"type": "top"}, D, {"type": "custom", "module": Own, "hidden": H, "num_experts_per_device": 2})
    assert list(layer.state_dict()) == ["_num_global_experts", "experts.up", "experts.down", "gates.0.wg.weight"]
    assert isinstance(layer.experts, Own)
    assert {name for name, _ in layer.get_parameter_iterator("local_experts")} == {"up", "down"}
