"""moe_layer against an independent transcription of Tutel's arithmetic: one process, padded einsums, plain torch."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synchromesh.compat.tutel.moe import moe_layer
from synchromesh.testing.compare import assert_close, relative_rms
from synchromesh.testing.distributed import run_ranks

D, H, BATCH, TOKENS, STEPS, AUX = 8, 16, 2, 12, 20, 0.05


@dataclass(frozen=True)
class Setting:
    """One training run.

    number: of experts per rank, or -n. overlap: a2a_ffn_overlap_degree. wire: what the transcription rounds rows to.
    """

    number: int = 2
    k: int = 2
    factor: float = 1.0
    gate: str = "top"
    prioritized: bool = False
    normalize: bool = True
    postscore: bool = True
    gshard: bool = True
    overlap: int = 1
    biased: bool = True
    dtype: torch.dtype = torch.float64
    width: int = D
    wire: torch.dtype | None = None

    def experts(self, world):
        return self.number * world if self.number > 0 else world // -self.number


def data(rank, dtype):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(BATCH, TOKENS, D, generator=generator).to(dtype)


def loss_of(y):
    return (y - torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).square().mean()


# The layer


def trained(setting):
    """Train the layer on this rank, at every degree in turn; return its losses, gradients and parameters."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.set_default_dtype(setting.dtype)
    layer = moe_layer(
        gate_type={"type": setting.gate, "k": setting.k, "capacity_factor": setting.factor, "gate_noise": 1.0},
        model_dim=D,
        experts={
            "type": "ffn",
            "num_experts_per_device": setting.number,
            "hidden_size_per_expert": H,
            "output_dim": setting.width,
            "has_fc1_bias": setting.biased,
            "has_fc2_bias": setting.biased,
        },
        seeds=(1, rank + 1, 1),
        a2a_ffn_overlap_degree=setting.overlap,
        is_postscore=setting.postscore,
        batch_prioritized_routing=setting.prioritized,
        normalize_gate=setting.normalize,
        is_gshard_loss=setting.gshard,
    ).eval()  # without noise, whose numbers are the generator's
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    x, losses, first = data(rank, setting.dtype).requires_grad_(), [], None
    for step in range(STEPS):
        optimizer.zero_grad()
        y = layer(x, adaptive_r=layer.valid_rs[step % len(layer.valid_rs)])
        loss = loss_of(y) + AUX * y.l_aux
        loss.backward()
        for _, parameter in layer.get_parameter_iterator("gate"):
            parameter.grad /= world
            if world > 1:
                dist.all_reduce(parameter.grad)
        first = first or {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), first, {name: p.detach() for name, p in layer.named_parameters()}


def trained_all(settings):
    """Results travel as numpy arrays: a rank that ends takes its shared tensors with it."""
    return [pytree.tree_map(Tensor.numpy, trained(setting)) for setting in settings]


# The transcription


def drawn(setting, world):
    """All experts' parameters, put together from what each rank draws, and the gate's."""
    experts = setting.experts(world)
    shards = max(1, world // experts)
    biases = math.ceil(setting.width / shards)
    own = {name: [] for name in ("w1", "b1", "w2", "b2")}
    for rank in range(world):
        torch.manual_seed(rank + 1)
        for _ in range(max(1, experts // world)):
            one = nn.Linear(D, H // shards, bias=setting.biased, dtype=setting.dtype)
            two = nn.Linear(H // shards, setting.width, bias=setting.biased, dtype=setting.dtype)
            own["w1"].append(one.weight)
            own["w2"].append(two.weight.t())
            if setting.biased:
                own["b1"].append(one.bias)
                own["b2"].append(two.bias[:biases])
    parameters = {
        "w1": torch.cat(own["w1"]).view(experts, H, D),
        "w2": torch.cat(own["w2"]).view(experts, H, setting.width),
    }
    if setting.biased:
        parameters["b1"] = torch.cat(own["b1"]).view(experts, H)
        parameters["b2"] = torch.cat(own["b2"]).view(experts, -1)
    torch.manual_seed(1)
    torch.set_default_dtype(setting.dtype)
    if setting.gate == "top":
        parameters["gate"] = nn.Linear(D, experts, bias=False).weight
    else:
        parameters["temperature"] = torch.tensor([2.0]).log()
        projector = nn.Linear(D, 256)
        parameters["projector"], parameters["projector_bias"] = projector.weight, projector.bias
        torch.randn(256, experts)
        parameters["directions"] = torch.randn(256, experts) * 0.01
    torch.set_default_dtype(torch.float32)
    return {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}


def logits_of(setting, p, x):
    if setting.gate == "top":
        return x @ p["gate"].t()
    projected = x @ p["projector"].t() + p["projector_bias"]
    cosine = (projected / projected.norm(dim=1, keepdim=True)) @ (p["directions"] / p["directions"].norm(dim=0))
    return cosine * p["temperature"].exp()


def places(setting, ids, best, experts):
    """The place of each pair in its expert's queue, pair by pair."""
    order = sorted(range(len(ids)), key=lambda t: -best[t]) if setting.prioritized else range(len(ids))
    queue, place = [0] * experts, torch.zeros_like(ids)
    for choice in range(ids.shape[1]):
        for token in order:
            expert = int(ids[token, choice])
            place[token, choice] = queue[expert]
            queue[expert] += 1
    return place, max(queue)


def aux_of(setting, scores, logits, ids):
    experts = scores.shape[1]
    if setting.gshard:
        fraction = F.one_hot(ids[:, 0], experts).to(scores.dtype).mean(0)
        return experts * (scores.mean(0) * fraction).sum()
    threshold = logits.gather(1, ids)[:, -1:]
    load = torch.distributions.Normal(0.0, 1.0 / experts).cdf(scores - threshold).sum(0)
    importance = scores.sum(0)
    return sum(v.var() / v.mean() ** 2 for v in (importance, load)) / 2


def rounded(rows, dtype):
    return rows if dtype is None else rows.to(dtype).to(rows.dtype)


def forward(setting, p, x, world):
    tokens, (experts, *_) = x.flatten(0, 1), p["w1"].shape
    logits = logits_of(setting, p, tokens)
    scores = logits.softmax(1)
    k = min(setting.k, experts)
    ids = scores.argsort(dim=1, descending=True)[:, :k]
    weights = scores.gather(1, ids)
    if setting.normalize and k > 1:
        weights = weights / weights.sum(1, keepdim=True)
    place, needed = places(setting, ids, scores.max(1).values.tolist(), experts)
    rows = k * int(abs(setting.factor) * math.ceil(len(tokens) / experts))
    rows = needed if setting.factor == 0 else min(needed, rows) if setting.factor < 0 else rows
    alignment = max(1, world // experts) * setting.overlap
    rows = math.ceil(rows / alignment) * alignment
    where = (F.one_hot(ids, experts)[..., None] * F.one_hot(place, max(rows, needed))[:, :, None])[..., :rows]
    where = where.to(x.dtype)  # [T K E C]; a place beyond the capacity is none
    there, back = where, where * weights[..., None, None]
    if not setting.postscore:
        there, back = back, there
    queues = rounded(torch.einsum("tkec,td->ecd", there, tokens), setting.wire)
    hidden = torch.einsum("ecd,ehd->ech", queues, p["w1"]) + (p["b1"][:, None] if setting.biased else 0)
    out = torch.einsum("ech,eho->eco", hidden.relu(), p["w2"])
    out = out + (p["b2"][:, None, : setting.width] if setting.biased else 0)
    y = rounded(torch.einsum("tkec,eco->to", back, rounded(out, setting.wire)), setting.wire)
    return y.view(BATCH, TOKENS, -1), aux_of(setting, scores, logits, ids)


def transcribed(setting, world):
    """All ranks in one process: expert gradients are sums over ranks, those of the gate means."""
    parameters = drawn(setting, world)
    xs, losses, first = [data(rank, setting.dtype).requires_grad_() for rank in range(world)], [], None
    for _ in range(STEPS):
        each = []
        for x in xs:
            y, aux = forward(setting, parameters, x, world)
            each.append(loss_of(y) + AUX * aux)
        names = [*parameters, *range(world)]
        grads = dict(zip(names, torch.autograd.grad(sum(each), [*parameters.values(), *xs]), strict=True))
        for name in parameters:
            grads[name] = grads[name] if name[1:] in ("1", "2") else grads[name] / world
        first = first or grads
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter -= 0.05 * grads[name]
        losses.append(torch.stack(each).detach())
    return torch.stack(losses, 1), first, parameters


NAMES = {
    "experts.batched_fc1_w": "w1",
    "experts.batched_fc2_w": "w2",
    "experts.batched_fc1_bias": "b1",
    "experts.batched_fc2_bias": "b2",
    "gates.0.wg.weight": "gate",
    "gates.0.temperature": "temperature",
    "gates.0.cosine_projector.weight": "projector",
    "gates.0.cosine_projector.bias": "projector_bias",
    "gates.0.sim_matrix": "directions",
}


def own(name, whole, rank, world, shape):
    """A rank's share of what all experts hold."""
    if name not in ("w1", "w2", "b1", "b2"):
        return whole
    rows = whole.flatten(0, 1)
    return rows.chunk(world)[rank].reshape(shape)


def compare(setting, world, results):
    losses, first, parameters = transcribed(setting, world)
    for rank, (got_losses, got_first, got_parameters) in enumerate(results):
        said = f"{setting} on rank {rank} of {world}:"
        assert_close(f"{said} losses", got_losses, losses[rank])
        assert_close(f"{said} gradient of the input", got_first.pop("x"), first[rank])
        assert len(got_first) == len(parameters)
        for name, got in got_first.items():
            known = NAMES[name]
            wanted = own(known, first[known], rank, world, got.shape)
            if known == "gate" and setting.experts(world) == 1:  # it has nothing to choose
                got, wanted = got + 1, wanted + 1
            assert_close(f"{said} gradient of {name}", got, wanted)
            last = got_parameters[name]
            assert_close(
                f"{said} trained {name}", last, own(known, parameters[known].detach(), rank, world, last.shape)
            )


ALONE = [
    *(Setting(number=4, k=k, factor=f) for k in (1, 2, 3, 4) for f in (1.0, 0.0, -0.5)),
    *(Setting(number=4, k=k, factor=f, prioritized=True) for k in (1, 3) for f in (0.75, 0.0, -0.5)),
    Setting(number=4, normalize=False),
    Setting(number=4, k=2, gate="cosine_top"),
    Setting(number=4, k=3, gate="cosine_top", factor=0.0, normalize=False),
    Setting(number=4, postscore=False, factor=0.75),
    Setting(number=4, gshard=False),
    Setting(number=4, overlap=3, factor=0.75),
    Setting(number=4, width=6),
    Setting(number=4, width=12, postscore=False),
    Setting(number=4, biased=False),
    Setting(number=1, k=4),
    Setting(number=4, k=2, dtype=torch.float32),
    Setting(number=4, k=1, factor=0.75, dtype=torch.float32, prioritized=True),
]
TOGETHER = {
    2: [
        Setting(),
        Setting(number=1, k=1, factor=0.0),
        Setting(number=-2, k=1, dtype=torch.float32),
        Setting(number=2, k=3, factor=-0.6, gate="cosine_top", overlap=2),
        Setting(number=2, prioritized=True, factor=0.75, dtype=torch.float32),
        Setting(number=1, postscore=False, width=6),
        Setting(number=2, k=4, gshard=False, normalize=False),
    ],
    4: [
        Setting(number=1, k=2),
        Setting(number=-2, k=2, factor=0.75),
        Setting(number=-4, k=1, factor=0.0, width=6),
        Setting(number=-2, k=1, factor=-0.5, width=7, overlap=2, dtype=torch.float32),
        Setting(number=-2, k=2, prioritized=True, postscore=False),
        Setting(number=2, k=4, gate="cosine_top", factor=0.0),
    ],
}


@pytest.mark.parametrize("setting", ALONE, ids=str)
def test_one_process_trains_as_transcribed(setting):
    compare(setting, 1, [trained(setting)])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_as_transcribed(world):
    results = run_ranks(trained_all, world, TOGETHER[world])
    for index, setting in enumerate(TOGETHER[world]):
        compare(setting, world, [pytree.tree_map(torch.from_numpy, result[index]) for result in results])


@pytest.mark.parametrize("k", [1, 3])
def test_float64_is_tutels_but_for_its_rounding(k):
    """Tutel moves float64 tokens as float32; this library does not."""
    setting = Setting(number=4, k=k, factor=0.75, wire=torch.float32)
    losses, _, parameters = trained(setting)
    wanted, _, transcription = transcribed(setting, 1)
    assert 1e-10 < relative_rms(losses, wanted[0]) < 1e-5
    assert relative_rms(parameters["experts.batched_fc1_w"], transcription["w1"]) < 1e-5
