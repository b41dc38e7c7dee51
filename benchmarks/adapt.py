"""Dense models that become others: split into experts (EMoE), upcycled, trained sparse first (SPDF); small and real.

A line of JSON for every model that was trained. All arms of a seed start from the same weights, with the same batches.

    python benchmarks/adapt.py emoe --seeds 10      # rotated digits, scored at angles that none was trained on
    python benchmarks/adapt.py upcycle --seeds 5    # dense SwinV2, trained on or made SwinV2-MoE at the same cost
    python benchmarks/adapt.py sparse --seeds 5     # sparse pre-training on a pretext, few labels afterwards
    python benchmarks/adapt.py simmim --seeds 5     # the same with SimMIM as the pretext
    python benchmarks/adapt.py experts --seeds 5    # 4 experts with 75 % zeros beside a dense block of as many numbers
    python benchmarks/adapt.py bytes --seeds 2      # a language model of bytes on docstrings that are installed
    python benchmarks/adapt.py products             # torch's sparse products on this CPU beside dense ones

Any of them takes arms by name: `emoe --arms dense "k-means, k = 8"`. An arm alone gives the numbers that it gives among
the others.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.datasets import load_digits
from torch import Tensor, nn

from synchromesh import RandomGroups, SplitFFN, StaticSparsity, Upcycle, aux_loss, count_entries, densify, seeds
from synchromesh.adapt.adaptation import adapt, after_step
from synchromesh.data.hiding import random_cells
from synchromesh.models.costs import costs
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.heads.pixels import PixelDecoder, masked_l1
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.losses import LoadBalance

SWIN = SwinV2Config(
    image_size=8, in_channels=1, embed_dim=32, depths=(1, 2), num_heads=(2, 4), patch_size=2, window_size=4,
    drop_path=0.0, init_std=0.1,
)  # fmt: skip
FFN = "backbone.stages.1.*.ffn"
MATRICES = ("*.attention.qkv", "*.attention.proj", "*.ffn.up", "*.ffn.down")
SEEN, UNSEEN = (0, 15, 30, 45), (60, 75)  # degrees
BATCH = 100


@dataclass(frozen=True)
class Args:
    """What to do.

    Attributes:
        what: which demonstration.
        seeds: how many.
        first: seed.
        arms: which, by name; none for all.
        epochs: of each part of a training; 0 for the demonstration's own number.
        tiny: a few steps only, for tests.
        out: file to append to.
    """

    what: tyro.conf.Positional[Literal["emoe", "upcycle", "sparse", "simmim", "experts", "bytes", "products"]]
    seeds: int = 5
    first: int = 0
    arms: tuple[str, ...] = ()
    epochs: int = 0
    tiny: bool = False
    out: Path = Path(__file__).parent / "results" / "adapt.jsonl"


Wanted = Callable[[str], bool]
"""Whether an arm is to be run."""


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, 1,400 to learn from and 397 to score on, drawn by a seed.

    Attributes:
        train, test: images [N, 1, 8, 8].
        train_labels, test_labels: digits.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @staticmethod
    def of(seed: int) -> Digits:
        found = load_digits()
        order = np.random.default_rng([seed, 1]).permutation(len(found.images))
        images = torch.tensor(found.images[order] / 16, dtype=torch.float32)[:, None]
        labels = torch.tensor(found.target[order])
        return Digits(images[:1400], labels[:1400], images[1400:], labels[1400:])


def turned(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image about its middle, between pixels, outside black."""
    angle = degrees.to(torch.float32).deg2rad()
    zero = torch.zeros_like(angle)
    matrix = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [*images.shape], align_corners=False)
    return (F.grid_sample(images, grid, align_corners=False) - 0.3) / 0.37


def model_of(seed: int, classes: int = 10, *, hiding: bool = False, experts: ExpertsConfig | None = None) -> Classifier:
    config = dataclasses.replace(SWIN.hiding() if hiding else SWIN, experts=experts)
    with seeds.torch_seeded(torch.device("cpu"), seed, seeds.INIT):
        model = Classifier(config.build(), classes)
        model.backbone.reset_parameters()
        return model


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    *,
    rate: float,
    optimizer: torch.optim.Optimizer | None = None,
) -> torch.optim.Optimizer:
    """Train by AdamW with a cosine; return the optimizer."""
    own = optimizer or torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.99))
    model.train()
    for step in range(steps):
        for group in own.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 + np.cos(np.pi * step / steps)) / 2
        x, labels = next(batches)
        loss = F.cross_entropy(model(x), labels, label_smoothing=0.05) + aux_loss(model)
        own.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        own.step()
        after_step(model)
    return own


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return float((model(images).argmax(1) == labels).double().mean())


def batches_of(images: Tensor, labels: Tensor, seed: int, angles: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, each image at any of these angles; the same ones for the same seed."""
    rng = np.random.default_rng([seed, 2])
    while True:
        for chosen in np.array_split(rng.permutation(len(images)), max(1, len(images) // BATCH)):
            degrees = torch.tensor(rng.choice(angles, len(chosen)))
            yield turned(images[chosen], degrees), labels[chosen]


def at(model: nn.Module, digits: Digits, angles: tuple[int, ...]) -> float:
    """Return the mean accuracy on the test images at these angles."""
    scores = [
        accuracy(model, turned(digits.test, torch.full((len(digits.test),), angle)), digits.test_labels)
        for angle in angles
    ]
    return sum(scores) / len(scores)


def emoe(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Train dense on upright digits; then on turned ones: dense as long, split by k-means, split at random."""
    digits, steps = Digits.of(seed), epochs * 14
    base = model_of(seed)
    train(base, batches_of(digits.train, digits.train_labels, seed, (0,)), steps, rate=2e-3)
    arms: dict[str, SplitFFN | None] = {
        "dense": None,
        "k-means": SplitFFN(num_experts=16, k=4),
        "random": SplitFFN(num_experts=16, k=4, grouping=RandomGroups(seed)),
        "k-means, k = 8": SplitFFN(num_experts=16, k=8),
        "random, k = 8": SplitFFN(num_experts=16, k=8, grouping=RandomGroups(seed)),
    }
    for arm, factory in ((name, own) for name, own in arms.items() if wanted(name)):
        model = model_of(seed)
        model.load_state_dict(base.state_dict())
        adaptation = None if factory is None else adapt(model, FFN, factory)
        train(model, batches_of(digits.train, digits.train_labels, seed + 100, SEEN), steps, rate=1e-3)
        row = {"arm": arm, "seen": at(model, digits, SEEN), "unseen": at(model, digits, UNSEEN)}
        if adaptation is not None:
            merged = adaptation.merge()
            row |= {"merged seen": at(merged, digits, SEEN), "merged unseen": at(merged, digits, UNSEEN)}
        yield row


def upcycle(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Train dense on digits at all seen angles; then train on, or make experts of it, for as many multiply-adds."""
    digits, steps = Digits.of(seed), epochs * 14
    base = model_of(seed)
    train(base, batches_of(digits.train, digits.train_labels, seed, SEEN), steps, rate=2e-3)
    before = at(base, digits, SEEN)
    dense = costs(base).multiply_adds
    arms: dict[str, Upcycle | None] = {
        "trained on": None,
        "8 half experts, k = 2": Upcycle(num_experts=8, k=2, slices=2, seed=seed),
        "8 half experts, k = 2, noise 0.1": Upcycle(num_experts=8, k=2, slices=2, noise=0.1, seed=seed),
        "4 copies, k = 2": Upcycle(num_experts=4, k=2, seed=seed),
    }
    for arm, factory in ((name, own) for name, own in arms.items() if wanted(name)):
        model = model_of(seed)
        model.load_state_dict(base.state_dict())
        if factory is not None:
            adapt(model, FFN, factory)
        first, cost = at(model, digits, SEEN), costs(model).multiply_adds
        own = round(steps * dense / cost)
        train(model, batches_of(digits.train, digits.train_labels, seed + 100, SEEN), own, rate=1e-3)
        row = {"arm": arm, "before": before, "first": first, "seen": at(model, digits, SEEN), "steps": own}
        yield row | {"unseen": at(model, digits, UNSEEN), "multiply_adds": cost}


def sparse(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Learn by which of four right angles digits are turned, sparse; then 100 labels, dense or still sparse."""

    def learned(model: Classifier, digits: Digits, steps: int) -> float:
        train(model, _quarter_turns(digits.train, seed), steps, rate=2e-3)
        return accuracy(model, *next(_quarter_turns(digits.test, seed + 1)))

    yield from _sparse_first(seed, epochs, wanted, learned)


def simmim(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Learn to draw hidden patches of digits, sparse; then 100 labels, dense or still sparse."""

    def learned(model: Classifier, digits: Digits, steps: int) -> float:
        with seeds.torch_seeded(torch.device("cpu"), seed, seeds.INIT):
            decoder = PixelDecoder(model.backbone, 1)
        own = torch.optim.AdamW(decoder.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.99))
        batches = _hidden(digits.train, seed)
        decoder.train()
        for step in range(steps):
            for group in own.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 10) * (1 + np.cos(np.pi * step / steps)) / 2
            own.zero_grad()
            _hidden_error(decoder, *next(batches)).backward()
            own.step()
        with torch.no_grad():
            return float(_hidden_error(decoder.eval(), *next(_hidden(digits.test, seed + 1))))

    yield from _sparse_first(seed, epochs, wanted, learned, hiding=True)


def _sparse_first(
    seed: int,
    epochs: int,
    wanted: Wanted,
    learned: Callable[[Classifier, Digits, int], float],
    *,
    hiding: bool = False,
) -> Iterator[dict[str, Any]]:
    """Learn a pretext at several shares of zeros, each an arm by its number; then tune on 100 labels."""
    digits, steps = Digits.of(seed), epochs * 14
    few = digits.train[:100], digits.train_labels[:100]
    for sparsity in (None, 0.0, 0.5, 0.75):
        arm = str(sparsity) if sparsity is not None else "no pre-training"
        if not wanted(arm):
            continue
        model = model_of(seed, hiding=hiding)
        row: dict[str, Any] = {"sparsity": sparsity if sparsity is not None else arm}
        if sparsity is not None:
            adapt(model, MATRICES, StaticSparsity(sparsity, seed))
            counted, dense = count_entries(model), costs(model_of(seed)).multiply_adds
            pretext = learned(model, digits, 2 * steps)
            row |= {"kept": counted.kept, "all": counted.all, "multiply_adds": dense, "pretext": pretext}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for tuned in ("dense", "still sparse") if sparsity else ("dense",):
            model.load_state_dict(state)
            if tuned == "dense" and sparsity is not None:
                own = model_of(seed, hiding=hiding)
                adapt(own, MATRICES, StaticSparsity(sparsity, seed))
                own.load_state_dict(state)
                densify(own)
            else:
                own = model
            train(own, batches_of(*few, seed + 100, (0,)), 60 if epochs > 1 else 2, rate=1e-3)
            yield row | {"tuned": tuned, "test": at(own, digits, (0,))}


def _hidden(images: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and, of each, 60 % of its patches to be hidden."""
    rng = np.random.default_rng([seed, 5])
    while True:
        chosen = torch.tensor(rng.permutation(len(images))[:BATCH])
        cells = [random_cells(8, 8, cell=SWIN.patch_size, ratio=0.6, rng=rng) for _ in chosen]
        yield turned(images[chosen], torch.zeros(len(chosen))), torch.from_numpy(np.stack(cells))


def _hidden_error(decoder: nn.Module, images: Tensor, hidden: Tensor) -> Tensor:
    return masked_l1(decoder(images, hidden), images, hidden) / hidden.sum()


def experts(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Train dense blocks, or four experts in place of each of as many non-zero numbers together, from random weights.

    With k = 4 a token is multiplied with as many of them as in the dense block, with k = 1 with a quarter.
    """
    digits, steps = Digits.of(seed), 2 * epochs * 14
    for arm, k in (("dense", 0), *((f"4 experts, 75 % zeros, k = {k}", k) for k in (1, 2, 4))):
        if not wanted(arm):
            continue
        mixture = ExpertsConfig(
            num_experts=4, k=max(k, 1), blocks=((), (0, 1)), router=LinearGate(noise=0.0, norm_topk=True),
            capacity=Dropless(), losses=(LoadBalance(0.01),), dropout=0.0, down_bias=True,
        )  # fmt: skip
        model = model_of(seed, experts=mixture if k else None)
        dense = sum(p.numel() for name, p in model_of(seed).named_parameters() if _of_last_blocks(name) and p.ndim > 1)
        row: dict[str, Any] = {"arm": arm, "numbers": dense, "products": dense}
        if k:
            adapt(model, "*.ffn.experts", StaticSparsity(0.75, seed))
            counted = count_entries(model)
            row |= {"numbers": counted.kept, "products": counted.kept * k // 4}
        train(model, batches_of(digits.train, digits.train_labels, seed, SEEN), steps, rate=2e-3)
        yield row | {"seen": at(model, digits, SEEN), "unseen": at(model, digits, UNSEEN)}


def _of_last_blocks(name: str) -> bool:
    return name.startswith("backbone.stages.1.") and ".ffn." in name


def _quarter_turns(images: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng([seed, 3])
    while True:
        chosen = torch.tensor(rng.permutation(len(images))[:BATCH])
        turns = torch.tensor(rng.integers(0, 4, len(chosen)))
        yield turned(images[chosen], 90 * turns), turns


def docstrings(module: str, most: int) -> Tensor:
    """Return the bytes of the docstrings of what a package has at its top, in the order of names."""
    package = importlib.import_module(module)
    found = [inspect.getdoc(getattr(package, name)) or "" for name in sorted(dir(package)) if not name.startswith("_")]
    text = "\n\n".join(dict.fromkeys(found)).encode()[:most]
    return torch.tensor(list(text), dtype=torch.int64)


def language_model(seed: int) -> nn.Module:
    import transformers  # an extra

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    with seeds.torch_seeded(torch.device("cpu"), seed, seeds.INIT):
        return transformers.LlamaForCausalLM(config)


def bits(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean bits that the next byte costs."""
    logits = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / np.log(2)


def learn_bytes(model: nn.Module, text: Tensor, seed: int, steps: int, rate: float) -> None:
    rng = np.random.default_rng([seed, 4])
    own = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    for step in range(steps):
        for group in own.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (0.1 + 0.9 * (1 + np.cos(np.pi * step / steps)) / 2)
        starts = rng.integers(0, len(text) - 97, 16)
        own.zero_grad()
        bits(model, torch.stack([text[start : start + 97] for start in starts])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        own.step()


def bytes_(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Pre-train on docstrings of numpy and torch, tune on half of scipy.stats', score on its other half."""
    pre, tune = (30, 10) if epochs == 1 else (25 * epochs, 7 * epochs)
    text = torch.cat([docstrings("numpy", 400_000), docstrings("torch", 400_000)])
    task = docstrings("scipy.stats", 300_000)
    half = len(task) // 2
    held = task[half:][: 97 * 200].unfold(0, 97, 97)
    for sparsity in (share for share in (0.0, 0.5, 0.75) if wanted(str(share))):
        model = language_model(seed)
        select = ("*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.mlp.*")
        adapt(model, select, StaticSparsity(sparsity, seed))
        counted, total = count_entries(model), sum(p.numel() for p in model.parameters() if p.ndim > 1)
        learn_bytes(model, text, seed, pre, 3e-3)
        first = _score(model, held)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        embedding = 256 * 64  # looked up, not multiplied
        work = {"kept": counted.kept, "all": counted.all, "products": total - embedding - counted.all + counted.kept}
        for tuned in ("dense", "still sparse") if sparsity else ("dense",):
            model = language_model(seed)
            adapt(model, select, StaticSparsity(sparsity, seed))
            model.load_state_dict(state)
            if tuned == "dense":
                densify(model)
            learn_bytes(model, task[:half], seed + 100, tune, 1e-3)
            yield {"sparsity": sparsity, "tuned": tuned, "first": first, "bits": _score(model, held), **work}


@torch.no_grad()
def _score(model: nn.Module, held: Tensor) -> float:
    model.eval()
    return float(torch.stack([bits(model, rows) for rows in held.split(50)]).mean())


def products(seed: int, epochs: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Multiply tokens by a matrix, dense and as torch's sparse formats have it; processor seconds, interleaved."""
    torch.manual_seed(seed)
    repeats = 2 if epochs == 1 else 7
    for side in (512, 1024):
        x = torch.randn(256, side)
        for sparsity in (share for share in (0.5, 0.75, 0.9, 0.95, 0.99) if wanted(str(share))):
            weight = StaticSparsity(sparsity)("w", nn.Linear(side, side, bias=False))
            assert weight is not None
            dense = weight.get_parameter("parametrizations.weight.original").detach()
            csr, columns = dense.to_sparse_csr(), x.T.contiguous()
            ways: dict[str, Callable[[], Tensor]] = {
                "dense": lambda dense=dense, columns=columns: dense @ columns,
                "csr": lambda csr=csr, columns=columns: csr @ columns,
            }
            torch.testing.assert_close(ways["csr"](), ways["dense"](), rtol=1e-3, atol=1e-3)
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats):
                for way, run in ways.items():
                    start = time.process_time()
                    run()
                    seconds[way].append(time.process_time() - start)
            best = {way: 1e3 * min(found) for way, found in seconds.items()}
            yield {"side": side, "tokens": 256, "sparsity": sparsity, **{f"{w}_ms": v for w, v in best.items()}}


DEMONSTRATIONS: dict[str, tuple[Callable[[int, int, Wanted], Iterator[dict[str, Any]]], int]] = {
    "emoe": (emoe, 6),
    "upcycle": (upcycle, 6),
    "sparse": (sparse, 6),
    "simmim": (simmim, 6),
    "experts": (experts, 6),
    "bytes": (bytes_, 6),
    "products": (products, 6),
}


def main(args: Args) -> None:
    torch.set_num_threads(1)
    run, own = DEMONSTRATIONS[args.what]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    asked: list[str] = []

    def wanted(arm: str) -> bool:
        asked.append(arm)
        return not args.arms or arm in args.arms

    for seed in range(args.first, args.first + (1 if args.what == "products" else args.seeds)):
        start = time.process_time()
        for row in run(seed, 1 if args.tiny else args.epochs or own, wanted):
            seconds = round(time.process_time() - start, 1)
            line = {"what": args.what, "seed": seed, **row, "cpu_seconds": seconds, "commit": commit.strip()}
            print(json.dumps(line), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if unknown := set(args.arms) - set(asked):
            raise SystemExit(
                f"{args.what} has no arm {', '.join(sorted(unknown))}: wanted some of {list(dict.fromkeys(asked))}"
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
