"""Backbones beside each other: what they learn, dense and with experts, and how fast they are beside transformers'.

    python benchmarks/backbones.py learn --tasks digits       # 3 seeds; about a quarter of an hour on one idle core
    python benchmarks/backbones.py learn --tasks textures     # likewise
    python benchmarks/backbones.py learn --tasks boxes        # likewise
    python benchmarks/backbones.py learn --tasks digits --backbones ViT --seeds 1 --epochs 4
    python benchmarks/backbones.py speed                      # images/s of published sizes, transformers' below ours
    python benchmarks/backbones.py speed --quick              # tiny sizes, for a look whether all runs
    python benchmarks/backbones.py table                      # the tables of what was measured

*learn* trains each backbone twice for each task and seed: dense, and with 4 experts in its last stage, one for each
token, as large as the feed-forward that they stand for: a picture costs the same multiply-adds, but for routers and,
in PVT v2, the convolution inside of a feed-forward that experts take the place of. Widths and depths are alike, rates
are those of the recipes and tuned for none. Digits are scikit-learn's; textures are 32 x 32 crops of scikit-image's
brick, grass and gravel, left halves to learn from and right halves to score on; boxes are those of `detect_demo`, of
one to three digits on scenes of 64 pixels.

*speed* takes training steps (forward, cross-entropy, backward, without an optimizer) and inference of the same
weights: interleaved rounds, medians, one thread unless told otherwise, stochastic depth off. Logits are compared first;
where they differ no time is printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from timing import machine, timed
from torch import nn
from transformers import (
    FocalNetConfig as TheirFocalNetConfig,
)
from transformers import (
    FocalNetForImageClassification,
    PvtConfig,
    PvtForImageClassification,
    PvtV2Config,
    PvtV2ForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTForImageClassification,
)
from transformers import (
    ViTConfig as TheirViTConfig,
)

from synchromesh import cli
from synchromesh.compat.huggingface.backbones import focalnet_weights, pvt_weights, vit_weights
from synchromesh.compat.huggingface.swin import weights as swin_weights
from synchromesh.models.costs import costs
from synchromesh.models.features import BackboneConfig
from synchromesh.models.focalnet import FocalNetConfig
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.pvt import PVTConfig, PVTVersion
from synchromesh.models.spectrum import SpectrumNetConfig
from synchromesh.models.swin_v2 import SWIN_MOE, SwinV2Config
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.losses import LoadBalance
from synchromesh.testing.compare import relative_rms
from synchromesh.training.codec import encode

RESULTS = Path(__file__).parent / "results" / "backbones.jsonl"
TEXTURES = ("brick", "grass", "gravel")
SIDE = 32  # of a texture's crop
EPOCHS = {"digits": 20, "textures": 12, "boxes": 5}
# Of grey crops of these photographs. Mirrored, never turned or zoomed: grain and direction are what tells them apart.
TEXTURE_OPTIONS = (
    *("--data.preprocess.image-size=32", "--data.preprocess.channels=1", "--data.preprocess.mean", "0.45"),
    *("--data.preprocess.std", "0.2", "--augment.affine", "none", "--augment.flip=0.5", "--batch-size=32"),
)
# Scenes of 64 pixels: maps of 16 x 16 and 8 x 8 positions.
BOX_OPTIONS = (
    *("--data.preprocess.image-size=64", "--data.source.train=1024", "--data.source.test=100"),
    *("--data.source.fewest=1", "--data.source.most=3", "--head.width=32"),
)
HEADLINE = {"digits": "test_accuracy", "textures": "test_accuracy", "boxes": "test_AP"}


@dataclass(frozen=True)
class Learn:
    """Train every backbone, dense and with experts.

    Attributes:
        tasks: which.
        backbones: which; none for all.
        seeds: how many.
        first: seed.
        epochs: of each run; those of EPOCHS without it.
        note: kept beside each figure, such as "busy machine".
        out: file to append to.
    """

    tasks: tuple[str, ...] = ("digits", "textures", "boxes")
    backbones: tuple[str, ...] = ()
    seeds: int = 3
    first: int = 0
    epochs: int | None = None
    note: str = ""
    out: Path = RESULTS


@dataclass(frozen=True)
class Speed:
    """Measure published sizes beside transformers' of the same weights.

    Attributes:
        backbones: which; none for all.
        batch: pictures.
        image_size: side of a picture; the published one without it.
        seconds: of each of the four, at least.
        threads: of torch.
        quick: tiny sizes.
        note: kept beside each figure, such as "busy machine".
        out: file to append to.
    """

    backbones: tuple[str, ...] = ()
    batch: int = 8
    image_size: int | None = None
    seconds: float = 10.0
    threads: int = 1
    quick: bool = False
    note: str = ""
    out: Path = RESULTS


@dataclass(frozen=True)
class Tables:
    """Print the tables of what was measured.

    Attributes:
        file: with a line of JSON for each figure.
    """

    file: Path = RESULTS


# learning


def small(patch_size: int, width: int, depths: tuple[int, ...], window: int) -> Mapping[str, BackboneConfig]:
    """Return backbones of like sizes; first weights are larger than usual, as small widths want them."""
    common: dict[str, Any] = {"patch_size": patch_size, "drop_path": 0.0, "init_std": 0.1}
    staged = {**common, "embed_dim": width, "depths": depths}
    heads, stages = tuple(width * 2**stage // 16 for stage in range(len(depths))), len(depths)
    pvt = {
        "widths": tuple(width * 2**stage for stage in range(stages)),
        "depths": depths,
        "num_heads": heads,
        "reductions": tuple(2 ** (stages - 1 - stage) for stage in range(stages)),
        "mlp_ratios": (4.0,) * stages,
    }
    return {
        "SwinV2": SwinV2Config(**staged, num_heads=heads, window_size=window, style=SWIN_MOE),
        "ViT": ViTConfig(
            **(common | {"patch_size": 2 * patch_size}),
            width=2 * width,
            depth=sum(depths),
            num_heads=2 * width // 16,
            positions=Positions.ROTARY,
            pooling=Pooling.MEAN,
        ),
        "FocalNet": FocalNetConfig(**staged, focal_levels=(2,) * stages, focal_windows=(3,) * stages),
        "PVT": PVTConfig(**common, **pvt, version=PVTVersion.V1),
        "PVT v2": PVTConfig(**common, **pvt),
        "SpectrumNet": SpectrumNetConfig(**staged, bands=16, band_hidden=32),
    }


def with_experts(config: BackboneConfig) -> BackboneConfig:
    """Return the twin with 4 experts in every second block of the last stage."""
    depths = getattr(config, "depths", None) or (getattr(config, "depth"),)  # noqa: B009, of a ViT
    blocks = tuple(tuple(range(1, n, 2)) if i == len(depths) - 1 else () for i, n in enumerate(depths))
    experts = ExpertsConfig(
        num_experts=4,
        blocks=blocks,
        router=LinearGate(noise=0.0),
        capacity=Dropless(),
        losses=(LoadBalance(0.01),),
        dropout=0.0,
        down_bias=True,
    )
    return dataclasses.replace(config, experts=experts)


def texture_folders(root: Path) -> Path:
    """Write crops of photographs of three textures: root/train/NAME and root/test/NAME."""
    from skimage import data

    for name in TEXTURES:
        pixels = np.asarray(getattr(data, name)())
        middle = pixels.shape[1] // 2
        for part, half in (("train", pixels[:, :middle]), ("test", pixels[:, middle:])):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number, (row, column) in enumerate(_corners(half.shape, SIDE // 2 if part == "train" else SIDE)):
                Image.fromarray(half[row : row + SIDE, column : column + SIDE]).save(folder / f"{number:04}.png")
    return root


def _corners(shape: tuple[int, ...], step: int) -> Iterator[tuple[int, int]]:
    for row in range(0, shape[0] - SIDE + 1, step):
        for column in range(0, shape[1] - SIDE + 1, step):
            yield row, column


def options_of(task: str, folder: Path) -> tuple[list[str], Mapping[str, BackboneConfig]]:
    """Return the recipe of a task with its options, and the backbones for it."""
    if task == "digits":
        return ["digits"], small(2, 32, (1, 2), 4)
    if task == "textures":
        if not (folder / "train").exists():
            texture_folders(folder)
        return ["demo", f"--data={folder}", "--twin=none", *TEXTURE_OPTIONS], small(4, 32, (1, 2), 4)
    if task == "boxes":
        return ["detect_demo", "--twin=none", *BOX_OPTIONS], small(4, 32, (1, 2), 4)
    raise SystemExit(f"there is no task {task!r}, wanted one of {', '.join(EPOCHS)}")


def train(run: Path, options: Iterable[str], config: BackboneConfig) -> dict[str, Any]:
    """Train a recipe with a backbone of its own; return the summary of the run."""
    file = run.parent / f"{run.name}.json"
    file.write_text(json.dumps({"model": encode(config)}))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.main(["train", *options, f"--config={file}", f"--run={run}", "--nproc=1"])
    if code:
        raise RuntimeError(f"train {' '.join(options)} ended with {code}: {said.getvalue()[-2000:]}")
    return json.loads((run / "summary.json").read_text())


def learn(args: Learn) -> None:
    """Train all rows; a line of JSON for each run."""
    with tempfile.TemporaryDirectory() as folder:
        for task in args.tasks:
            recipe, backbones = options_of(task, Path(folder) / "textures")
            epochs = args.epochs or EPOCHS[task]
            for seed in range(args.first, args.first + args.seeds):
                for name in args.backbones or backbones:
                    for kind, config in (("dense", backbones[name]), ("experts", with_experts(backbones[name]))):
                        run = Path(folder) / f"{task}-{name.replace(' ', '')}-{kind}-{seed}"
                        summary = train(run, [*recipe, f"--epochs={epochs}", f"--seed={seed}"], config)
                        _write(args.out, args.note, {
                            "what": "learn", "task": task, "backbone": name, "kind": kind, "seed": seed,
                            "epochs": epochs, "score": summary[HEADLINE[task]], "seconds": summary["train_seconds"],
                            "parameters": summary["parameters"],
                            "multiply_adds": round(_sized(config, task).build().multiply_adds()),
                        })  # fmt: skip


def _sized(config: BackboneConfig, task: str) -> BackboneConfig:
    side = {"digits": 8, "textures": SIDE, "boxes": 64}[task]
    return config.sized(image_size=side, channels=1)


# speed


@dataclass(frozen=True)
class Pair:
    """One size, ours and transformers', of the same weights.

    Attributes:
        ours: a classifier.
        theirs: transformers' one.
        side: of its pictures.
    """

    ours: nn.Module
    theirs: nn.Module
    side: int


def _loaded(config: BackboneConfig, theirs: nn.Module, rename: Callable[..., Any], side: int) -> Pair:
    ours = Classifier(config.build(), 1000)
    ours.load_state_dict(rename(theirs.state_dict()))
    return Pair(ours, theirs, side)


def _swin(quick: bool, side: int) -> Pair:
    depths, heads, width = ((1, 1), (1, 2), 32) if quick else ((2, 2, 6, 2), (3, 6, 12, 24), 96)
    config = SwinV2Config(image_size=side, embed_dim=width, depths=depths, num_heads=heads, drop_path=0.0)
    theirs = Swinv2Config(
        image_size=side,
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        pretrained_window_sizes=[0] * len(depths),
        window_size=8,
        drop_path_rate=0.0,
        num_labels=1000,
    )
    return _loaded(config, Swinv2ForImageClassification(theirs), swin_weights.from_transformers, side)


def _vit(quick: bool, side: int) -> Pair:
    width, depth = (64, 2) if quick else (384, 12)
    config = ViTConfig(image_size=side, width=width, depth=depth, num_heads=width // 64, norm_eps=1e-6)
    theirs = TheirViTConfig(
        image_size=side,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        num_labels=1000,
    )
    return _loaded(config, ViTForImageClassification(theirs), vit_weights.from_transformers, side)


def _focalnet(quick: bool, side: int) -> Pair:
    depths = (1, 1) if quick else (2, 2, 6, 2)
    width, levels = (32 if quick else 96), (2,) * len(depths)
    config = FocalNetConfig(
        image_size=side,
        embed_dim=width,
        depths=depths,
        focal_levels=levels,
        focal_windows=(3,) * len(depths),
        drop_path=0.0,
    )
    theirs = TheirFocalNetConfig(
        image_size=side,
        embed_dim=width,
        hidden_sizes=[width * 2**stage for stage in range(len(depths))],
        depths=list(depths),
        focal_levels=list(levels),
        focal_windows=[3] * len(depths),
        drop_path_rate=0.0,
        num_labels=1000,
    )
    return _loaded(config, FocalNetForImageClassification(theirs), focalnet_weights.from_transformers, side)


def _pvt(quick: bool, side: int, *, version: PVTVersion) -> Pair:
    widths = (16, 32, 80, 128) if quick else (64, 128, 320, 512)
    depths = (1, 1, 1, 1) if quick else (2, 2, 2, 2)
    config = PVTConfig(image_size=side, version=version, widths=widths, depths=depths, drop_path=0.0)
    common: dict[str, Any] = {
        "image_size": side,
        "hidden_sizes": list(widths),
        "depths": list(depths),
        "num_labels": 1000,
    }
    if version is PVTVersion.V1:
        theirs: nn.Module = PvtForImageClassification(PvtConfig(**common))
        return _loaded(config, theirs, pvt_weights.from_pvt, side)
    return _loaded(config, PvtV2ForImageClassification(PvtV2Config(**common)), pvt_weights.from_pvt_v2, side)


def _pvt_v1(quick: bool, side: int) -> Pair:
    return _pvt(quick, side, version=PVTVersion.V1)


def _pvt_v2(quick: bool, side: int) -> Pair:
    return _pvt(quick, side, version=PVTVersion.V2)


PAIRS: Mapping[str, tuple[Callable[[bool, int], Pair], int]] = {
    "SwinV2-T": (_swin, 256),
    "ViT-S/16": (_vit, 224),
    "FocalNet-T": (_focalnet, 224),
    "PVT-Tiny": (_pvt_v1, 224),
    "PVTv2-B1": (_pvt_v2, 224),
}


def speed(args: Speed) -> None:
    """Measure all pairs; a line of JSON for each."""
    torch.set_num_threads(args.threads)
    for name in args.backbones or PAIRS:
        build, side = PAIRS[name]
        torch.manual_seed(0)
        pair = build(args.quick, args.image_size or (64 if args.quick else side))
        found = _measured(pair, args)
        _write(args.out, args.note, {
            "what": "speed", "backbone": name, "batch": args.batch, "side": pair.side, "quick": args.quick,
            "multiply_adds": costs(pair.ours).multiply_adds, **found,
        })  # fmt: skip


def _measured(pair: Pair, args: Speed) -> dict[str, float]:
    x, labels = torch.randn(args.batch, 3, pair.side, pair.side), torch.zeros(args.batch, dtype=torch.int64)
    for model in (pair.ours, pair.theirs):
        model.eval()
    with torch.no_grad():
        error = relative_rms(pair.ours(x), pair.theirs(x).logits)
    if error > 1e-4:
        raise SystemExit(f"logits differ by {error:.2g}, wanted the same model")

    def inferred(model: nn.Module) -> None:
        with torch.inference_mode():
            model(x)

    def trained(model: nn.Module) -> None:
        model.zero_grad()
        y = model(x)
        F.cross_entropy(y if isinstance(y, torch.Tensor) else y.logits, labels).backward()

    runs: dict[str, Callable[[], object]] = {}
    for whose, model in (("ours", pair.ours), ("theirs", pair.theirs)):
        runs[f"{whose}_trained"] = lambda model=model: trained(model)
        runs[f"{whose}_inferred"] = lambda model=model: inferred(model)
    times = timed(runs, seconds=0.0 if args.quick else args.seconds, least=2 if args.quick else 5)
    # A limit: three products of the model's size at the speed of one large product, measured in the same run.
    a, b = torch.randn(2, 1024, 1024)
    limit = timed({"product": lambda: a @ b}, seconds=1.0)["product"]
    work = costs(pair.ours).multiply_adds
    return {
        **{name: args.batch / own for name, own in times.items()},
        "limit_trained": (1024**3 / limit) / (3 * work),
        "limit_inferred": (1024**3 / limit) / work,
    }


# results


def _write(out: Path, note: str, found: dict[str, Any]) -> None:
    line = json.dumps({**found, "note": note, **machine()})
    out.parent.mkdir(exist_ok=True)
    with out.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def tables(args: Tables) -> None:
    """Print what was measured as the tables of docs/models.md."""
    lines = [json.loads(line) for line in args.file.read_text().splitlines()]
    learnt = [one for one in lines if one["what"] == "learn"]
    for task in dict.fromkeys(one["task"] for one in learnt):
        own = _latest([one for one in learnt if one["task"] == task])
        print(f"\n{task}, {own[0]['epochs']} epochs, seeds {sorted({one['seed'] for one in own})}")
        print("| backbone | M multiply-adds | dense | with experts | parameters |\n|---|---|---|---|---|")
        for name in dict.fromkeys(one["backbone"] for one in own):
            rows = {
                kind: [o for o in own if o["backbone"] == name and o["kind"] == kind] for kind in ("dense", "experts")
            }
            cells = [_spread([o["score"] for o in rows[kind]]) for kind in rows]
            sizes = " / ".join(f"{rows[kind][0]['parameters']:,}" for kind in rows if rows[kind])
            print(f"| {name} | {rows['dense'][0]['multiply_adds'] / 1e6:.2f} | {cells[0]} | {cells[1]} | {sizes} |")
    measured = [one for one in lines if one["what"] == "speed" and not one["quick"]]
    if measured:
        print("\n| backbone | trained, images/s | transformers' | limit | inferred, images/s | transformers' | limit |")
        print("|---|---|---|---|---|---|---|")
    for one in measured:
        cells = [
            f"{one[f'{whose}_{how}']:.2f}" for how in ("trained", "inferred") for whose in ("ours", "theirs", "limit")
        ]
        print(f"| {one['backbone']} | {' | '.join(cells)} |")


def _latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last line of each run among those of as many epochs as the last one of all."""
    kept = [one for one in lines if one["epochs"] == lines[-1]["epochs"]]
    return list({(one["backbone"], one["kind"], one["seed"]): one for one in kept}.values())


def _spread(scores: list[float]) -> str:
    if not scores:
        return "-"
    wide = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{wide}"


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    kind = (
        Annotated[Learn, tyro.conf.subcommand("learn")]
        | Annotated[Speed, tyro.conf.subcommand("speed")]
        | Annotated[Tables, tyro.conf.subcommand("table")]
    )
    args: Any = tyro.cli(kind, args=arguments, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))  # pyright: ignore[reportArgumentType, reportCallIssue]
    {Learn: learn, Speed: speed, Tables: tables}[type(args)](args)


if __name__ == "__main__":
    main(sys.argv[1:])
