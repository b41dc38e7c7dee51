"""SwinV2 on a CPU: a training step and inference, dense against transformers' Swinv2, with experts against dense.

    python benchmarks/swin.py                              # every model, fp32 and bf16 autocast
    python benchmarks/swin.py --models demo --dtypes bfloat16
    python benchmarks/swin.py --compile inductor           # ours compiled (inductor needs a C++ compiler); lines beside

The dense model has the weights of transformers' and is first compared with it, logits and all gradients; where they
differ no time is printed. transformers runs the only attention it has for Swinv2. Stochastic depth is off. A training
step is forward, cross entropy (and the losses of routers) and backward, without the optimizer. Rounds are interleaved,
times are medians. `matmuls` is the time of nothing but the matrix products of one dense step, replayed by what ran them
on tensors of the same shapes and strides: transformers' time over it is the most that is left to gain.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table
from timing import machine, save, timed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Swinv2Config, Swinv2ForImageClassification

from synchromesh.compat.huggingface.swin.weights import from_transformers
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SWIN_V2, SwinV2Config
from synchromesh.models.swin_v2_moe import DEMO, DEMO_EXPERTS, swin_v2_moe
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import relative_rms
from synchromesh.torch_private import onednn_linear

FIGURE = ("machine", "threads", "model", "dtype", "pass", "batch", "compiled")  # what tells a record from others
RESULTS = Path(__file__).parent / "results" / "swin.jsonl"
TINY = SwinV2Config(image_size=64, drop_path=0.0)
TINY_EXPERTS = ExpertsConfig(num_experts=8, blocks=((), (), (1, 3, 5), (1,)), dropout=0.0, down_bias=True)
WANTED = {"train": 1.3, "infer": 1.5, "experts": 0.9}


@dataclass(frozen=True)
class Case:
    """A model, its experts, and the batch it is measured with."""

    config: SwinV2Config
    experts: ExpertsConfig
    pixels: int
    batch: int
    classes: int


CASES = {
    "demo": Case(dataclasses.replace(DEMO, style=SWIN_V2), DEMO_EXPERTS, 32, 128, 10),
    "tiny 64px": Case(TINY, TINY_EXPERTS, 64, 32, 1000),
    "tiny 128px": Case(dataclasses.replace(TINY, image_size=128), TINY_EXPERTS, 128, 16, 1000),
}
SMALLEST = Case(
    SwinV2Config(
        image_size=16, in_channels=1, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=2, drop_path=0.0
    ),
    dataclasses.replace(DEMO_EXPERTS, blocks=((), (1,))),
    pixels=16,
    batch=16,
    classes=50,
)


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        models: of the cases, all by default.
        dtypes: float32, and bfloat16 by autocast.
        seconds: of timing per contestant and figure.
        threads: 0 for torch's own number.
        compile: backend of torch.compile that ours run by, dense and with experts; none where empty.
        tiny: time a very small model once instead, to see that this runs.
        out: where the figures go.
    """

    models: list[str] = field(default_factory=lambda: list(CASES))
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    seconds: float = 5.0
    threads: int = 0
    compile: str = ""
    tiny: bool = False
    out: Path = RESULTS


class Theirs(nn.Module):
    """transformers' classifier as images to logits."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        c = case.config
        self.model = Swinv2ForImageClassification(
            Swinv2Config(
                image_size=c.image_size,
                patch_size=c.patch_size,
                num_channels=c.in_channels,
                embed_dim=c.embed_dim,
                depths=list(c.depths),
                num_heads=list(c.num_heads),
                window_size=c.window_size,
                pretrained_window_sizes=[0] * len(c.depths),
                drop_path_rate=0.0,
                num_labels=case.classes,
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _by_onednn(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Multiply as ours do; the result is a new tensor."""
    onednn_linear(a, b.t(), None, gelu=False)


class Products(TorchDispatchMode):
    """Notes the matrix products that run, with the shapes and strides of their operands, and what runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Callable[..., object], list[tuple[torch.Size, tuple[int, ...], torch.dtype]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default):
            self._note(torch.mm, *args[-2:])
        elif func in (aten.bmm.default, aten.bmm.out):
            self._note(torch.bmm, *args[:2])
        elif func is aten.linear.default:  # whole, in inference mode
            self._note(torch.mm, args[0].flatten(0, -2), args[1].t())
        elif func is torch.ops.mkldnn._linear_pointwise.default:
            self._note(_by_onednn, args[0].flatten(0, -2), args[1].t())
        return func(*args, **(kwargs or {}))

    def _note(self, run: Callable[..., object], *operands: Tensor) -> None:
        self.noted.append((run, [(t.shape, t.stride(), t.dtype) for t in operands]))

    def replay(self) -> Callable[[], None]:
        def tensor(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            t = torch.empty_strided(size, stride, dtype=dtype)
            return t.copy_(torch.randn(size))

        ready = [(run, *(tensor(*about) for about in operands)) for run, operands in self.noted]
        ready = [(run, a, b, a @ b) for run, a, b in ready]

        def products() -> None:
            for run, a, b, out in ready:
                run(a, b, out=out)

        return products


def step(model: nn.Module, images: Tensor, labels: Tensor, *, dtype: str, training: bool) -> Tensor:
    """Run one training step or one inference; return the logits."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    if not training:
        with torch.inference_mode(), autocast:
            return model.eval()(images)
    model.train().zero_grad()
    with autocast:
        logits = model(images)
        loss = F.cross_entropy(logits, labels) + aux_loss(model)
    loss.backward()
    return logits


def results(model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return logits of both passes and all gradients, under our names."""
    got = {kind: step(model, images, labels, dtype=dtype, training=kind == "train") for kind in ("infer", "train")}
    got |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().float() for name, tensor in got.items()}


def check_equal(ours: Classifier, theirs: Theirs, images: Tensor, labels: Tensor, dtype: str) -> None:
    """Fail unless ours is as near to transformers' float32 results as the dtype allows, or as transformers' own are."""
    parts = []
    for model, precision in ((theirs, "float32"), (theirs, dtype), (ours, dtype)):
        got = results(model, images, labels, precision)
        got = got if model is ours else from_transformers({n.removeprefix("model."): t for n, t in got.items()})
        gradients = torch.cat([got[name].flatten() for name, _ in ours.named_parameters()])
        parts.append({"infer": got["infer"], "train": got["train"], "gradients": gradients})
    truth, other, mine = parts
    for name in truth:
        error, allowed = relative_rms(mine[name], truth[name]), relative_rms(other[name], truth[name])
        if not error <= max(1e-4, 1.25 * allowed):
            raise SystemExit(
                f"{name} in {dtype} is off by {error:.2g}, transformers' by {allowed:.2g}: nothing is timed"
            )


def measure(case: Case, dtype: str, seconds: float, backend: str) -> list[dict[str, object]]:
    """Return one record for training and one for inference; with a backend, of our models compiled by it."""
    torch.manual_seed(0)
    theirs, dense = Theirs(case), Classifier(case.config.build(), case.classes)
    dense.load_state_dict(from_transformers(theirs.model.state_dict()))
    experts = swin_v2_moe(case.config, case.classes, experts=case.experts)
    eager = copy.deepcopy(dense)
    if backend:
        torch.compiler.reset()  # else the graphs of all figures count towards torch's limit, and later ones run eagerly
        dense.compile(backend=backend)
        experts.compile(backend=backend)
    images = torch.randn(case.batch, case.config.in_channels, case.pixels, case.pixels)
    labels = torch.randint(case.classes, (case.batch,))
    check_equal(dense, theirs, images, labels, dtype)
    records = []
    for training in (True, False):

        def run(model: nn.Module, training: bool = training) -> Tensor:
            return step(model, images, labels, dtype=dtype, training=training)

        with Products() as products:
            run(eager)
        runs: dict[str, Callable[[], object]] = {
            "theirs": lambda run=run: run(theirs),
            "dense": lambda run=run: run(dense),
        }
        runs |= {"experts": lambda run=run: run(experts), "matmuls": products.replay()}
        times = timed(runs, seconds=seconds) if seconds else timed(runs, seconds=0.0, least=1)
        figure = {"dtype": dtype, "pass": "train" if training else "infer", "batch": case.batch, "compiled": backend}
        records.append({**figure, "seconds": times, **verdict(times, str(figure["pass"]))})
    return records


def verdict(times: dict[str, float], kind: str) -> dict[str, object]:
    """Compare with what is wanted."""
    gain, kept = times["theirs"] / times["dense"], times["dense"] / times["experts"]
    return {
        "over_transformers": gain,
        "most_possible": times["theirs"] / times["matmuls"],
        "experts_over_dense": kept,
        "met": {
            "faster than transformers": gain > 1,
            f"{WANTED[kind]}x transformers": gain >= WANTED[kind],
            f"experts at {WANTED['experts']} of dense": kept >= WANTED["experts"],
        },
    }


def show(records: list[dict]) -> None:
    table = Table("model", "dtype", "pass", "ours compiled by", title="images per second")
    for name in ("transformers", "dense", "experts", "dense over transformers", "most possible", "experts over dense"):
        table.add_column(name, justify="right")
    table.add_column("misses")
    for r in records:
        rates = [f"{r['batch'] / r['seconds'][who]:.0f}" for who in ("theirs", "dense", "experts")]
        ratios = [f"{r[name]:.2f}" for name in ("over_transformers", "most_possible", "experts_over_dense")]
        missed = ", ".join(name for name, met in r["met"].items() if not met)
        table.add_row(r["model"], r["dtype"], r["pass"], r["compiled"] or "-", *rates, *ratios, missed or "-")
    Console(width=180).print(table)


def main(args: Args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    about, seconds = machine(), 0.0 if args.tiny else args.seconds
    records: list[dict] = []
    for name, case in {"smallest": SMALLEST}.items() if args.tiny else ((name, CASES[name]) for name in args.models):
        for dtype in args.dtypes:
            made = measure(case, dtype, seconds, args.compile)
            records += [{**about, "model": name, **record} for record in made]
            save(records, args.out, figure=FIGURE)
            print(f"{len(records)} figures", file=sys.stderr)
    show(records)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
