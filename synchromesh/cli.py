"""The `synchromesh` command: parsing only. Names on the command line select recipes and commands here, nowhere else."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

import tyro
from rich.console import Console

from synchromesh.commands.convert import ConvertRequest, run_convert
from synchromesh.commands.evaluate import EvalRequest, run_eval
from synchromesh.commands.launch import launch
from synchromesh.commands.plan import PlanRequest, run_plan
from synchromesh.commands.plans import PlansRequest, run_plans
from synchromesh.commands.predict import PredictRequest, run_predict
from synchromesh.commands.profile import ProfileRequest, run_profile
from synchromesh.commands.report import run_report
from synchromesh.commands.train import train
from synchromesh.commands.verify import DTYPES, VerifyRequest, run_verify
from synchromesh.data.sources import ImageFolder
from synchromesh.errors import InputError
from synchromesh.parallel.comm.grid import Grid, LostRankError, in_job, job_name, joined, restarted
from synchromesh.recipes.catalog import RECIPES
from synchromesh.training.config import Sharing, TrainConfig
from synchromesh.training.loader import Loading
from synchromesh.training.run_folder import is_run_of

USAGE = """\
usage: synchromesh COMMAND ...

  train RECIPE        train a model from a recipe, its settings changed as you like
  eval RUN            score a trained model, class by class
  predict IMAGE ...   name what a trained model sees in image files
  report RUN          write report.html of a run, finished or not
  convert RUN FILE    write the weights of a run as one safetensors file
  verify              prove on these ranks that every parallel plan computes the same
  profile FILE        measure this cluster: links, products, memory
  plan                what a model costs on a cluster, and how it should run there
  plans RUN ...       what the layers of a run found out about their plans

examples:
  synchromesh train demo                          a SwinV2-MoE learns digits, on a CPU, in minutes
  synchromesh train demo --optim.lr 1e-3 --epochs 5 --run runs/quick
  synchromesh train demo --run runs/quick --resume
  synchromesh train finetune_1k --data photos/ --start.weights runs/big --start.freeze moe
  synchromesh eval runs/demo
  synchromesh predict digit.png another.png --run runs/demo --json
  synchromesh plan --model swinv2_moe_b --cluster a100_hdr --world 8..2048
  synchromesh verify --world 4                    the same on your cluster: torchrun ... -m -- synchromesh.cli verify

synchromesh COMMAND --help says more.
"""

Options = TypeVar("Options")
LOST = 5  # exit code of a rank that lost the others
# Names of files and classes are shown as they are: no markup, no emoji codes.
OUT = Console(markup=False, emoji=False)
ERRORS = Console(stderr=True, markup=False, emoji=False)


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`.

    Attributes:
        run: folder of the run; runs/RECIPE if not given. A run that is there already is moved aside, never deleted.
        data: folder of images, instead of the recipe's: train/ and val/ with one folder per class, or the class
            folders themselves.
        resume: continue what was begun in the run folder; a crash loses nothing that was saved.
        on_bad_image: stop at an unreadable image, or skip it and count.
        tensorboard: also write TensorBoard events.
        nproc: ranks to train with on this machine; the recipe's number if not given. Under torchrun or SLURM, the
            job's ranks are taken.
        restarts: how often to begin again from the last checkpoint when a rank dies.
        timeout: seconds that ranks wait for one another before they give up and name who does not answer.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    run: Path | None = None
    data: Annotated[Path | None, tyro.conf.arg(name="data")] = None
    resume: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    tensorboard: bool = False
    nproc: int | None = None
    restarts: int = 0
    timeout: float = 600.0


@dataclass(frozen=True)
class EvalOptions:
    """Options of `eval`.

    Attributes:
        run: folder of the run.
        data: folder of images to score on, instead of the run's own test images.
        best: the checkpoint of the best evaluation, instead of the last epoch's.
        on_bad_image: stop at an unreadable image, or skip it and count.
        json: print one JSON object.
        capacity: room of the experts over an even load, instead of that of training; 0 drops nothing.
        nproc: ranks to run on, on this machine. sharing: how they share the experts.
    """

    run: tyro.conf.Positional[Path]
    data: Path | None = None
    best: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    json: bool = False
    capacity: float | None = None
    nproc: int = 1
    sharing: Sharing = field(default_factory=Sharing)


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`.

    Attributes:
        images: image files; a run folder may stand first, instead of --run.
        run: folder of a run, or of a checkpoint.
        top: classes to name for each image.
        best: the checkpoint of the best evaluation, instead of the last epoch's.
        on_bad_image: stop at an unreadable image, or skip it and end with exit code 2.
        json: print one JSON object a line.
        capacity: room of the experts over an even load, instead of that of training; 0 drops nothing.
        nproc: ranks to run on, on this machine. sharing: how they share the experts.
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    run: Path | None = None
    top: int = 3
    best: bool = False
    on_bad_image: Literal["stop", "skip"] = "stop"
    json: bool = False
    capacity: float | None = None
    nproc: int = 1
    sharing: Sharing = field(default_factory=Sharing)


@dataclass(frozen=True)
class ReportOptions:
    """Options of `report`.

    Attributes:
        run: folder of the run.
    """

    run: tyro.conf.Positional[Path]


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `verify`.

    Attributes:
        world: ranks to start on this machine; under torchrun or SLURM, the job's ranks are taken.
        ranks_per_node: as if so many neighbours shared a machine; the truth if not given.
        dtype: of all tensors.
        quick: each plan once, instead of in every trial.
        json: print one JSON object a line.
    """

    world: int = 1
    ranks_per_node: int | None = None
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    quick: bool = False
    json: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return its exit code: 0 done, 2 for what the user can mend, others as the command says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        OUT.print(USAGE, highlight=False, markup=False, soft_wrap=True, end="")
        return 0 if given else 2
    try:
        if given[0] not in COMMANDS:
            raise InputError(f"there is no command {given[0]!r}: wanted one of {', '.join(COMMANDS)}")
        return COMMANDS[given[0]](given[1:])
    except InputError as error:
        ERRORS.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except LostRankError as error:
        ERRORS.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.stderr.flush()
        os._exit(LOST)  # threads of the broken exchange would keep the process from ending
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stderr.close()
        return 141
    except OSError as error:  # a full or read-only disk
        ERRORS.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2


def _train(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        OUT.print(_recipes(), highlight=False, markup=False, soft_wrap=True, end="")
        return 0 if given else 2
    name, *rest = given
    if name not in RECIPES:
        raise InputError(f"there is no recipe {name!r}: wanted one of {', '.join(RECIPES)}")
    about = f"Train by the recipe {name}. Every setting below can be changed, such as --epochs 5 or --optim.lr 1e-3."
    options = _parse(
        TrainOptions, rest, prog=f"synchromesh train {name}", about=about, default=TrainOptions(RECIPES[name]())
    )
    config, folder = _overridden(options), options.run or Path("runs") / name
    ranks = config.keep.ranks if options.nproc is None else options.nproc
    if ranks < 1 or options.restarts < 0:
        raise InputError(f"got --nproc {ranks} --restarts {options.restarts}, wanted at least 1 and 0")
    if ranks > 1 and not in_job():
        return launch(["train", *given], ranks, errors=ERRORS, restarts=options.restarts)
    with joined(timeout=timedelta(seconds=options.timeout)) as grid:
        job = job_name()
        resume = options.resume or (restarted() and is_run_of(folder, job))  # a rank died, and all begin again
        return train(config, folder, resume=resume, console=_first(grid, OUT), grid=grid, job=job)


def _overridden(options: TrainOptions) -> TrainConfig:
    config = options.config
    if options.data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=ImageFolder(options.data)))
    if options.on_bad_image == "skip":
        loading = dataclasses.replace(config.loading, skip_bad_images=True)
        config = dataclasses.replace(config, loading=loading)
    if options.tensorboard:
        config = dataclasses.replace(config, keep=dataclasses.replace(config.keep, tensorboard=True))
    return config


def _recipes() -> str:
    lines = ["usage: synchromesh train RECIPE [--run DIR] [--data DIR] [--resume] [any setting of the recipe]", ""]
    for name, recipe in RECIPES.items():
        about = (sys.modules[recipe.__module__].__doc__ or "").partition("\n")[0].partition(": ")[2]
        lines.append(f"  {name:18}  {about}")
    lines += ["", "synchromesh train RECIPE --help lists every setting with its default.", ""]
    return "\n".join(lines)


def _eval(given: list[str]) -> int:
    about = "Score a trained model on its test images, or on a folder of yours: accuracy by class and expert load."
    options = _parse(EvalOptions, given, prog="synchromesh eval", about=about)
    loading = Loading(skip_bad_images=options.on_bad_image == "skip")
    if options.nproc > 1 and not in_job():
        return launch(["eval", *given], options.nproc, errors=ERRORS)
    plan = options.sharing.plan()
    request = EvalRequest(options.run, options.data, options.best, loading, options.json, plan, options.capacity)
    with joined() as grid:
        return run_eval(request, console=_first(grid, OUT), grid=grid)


def _predict(given: list[str]) -> int:
    about = (
        "Name what a trained model sees in image files (JPEG, PNG, WebP; grey or colour, any size).\n\n"
        "  synchromesh predict digit.png --run runs/demo\n"
        "  synchromesh predict runs/demo *.png --json"
    )
    options = _parse(PredictOptions, given, prog="synchromesh predict", about=about)
    run, images = options.run, options.images
    if run is None and images and images[0].is_dir():
        run, images = images[0], images[1:]
    if run is None:
        raise InputError("no run given: name the folder of a trained model, such as --run runs/demo")
    if options.nproc > 1 and not in_job():
        return launch(["predict", *given], options.nproc, errors=ERRORS)
    skip, plan = options.on_bad_image == "skip", options.sharing.plan()
    request = PredictRequest(run, images, options.top, options.best, skip, options.json, plan, options.capacity)
    with joined() as grid:
        return run_predict(request, console=_first(grid, OUT), errors=_first(grid, ERRORS), grid=grid)


def _convert(given: list[str]) -> int:
    about = (
        "Write the weights of a run as one safetensors file, under the names of the model's state dict; or read and "
        "write the files of the released Swin-MoE.\n\n"
        "  synchromesh convert runs/demo demo.safetensors\n"
        "  synchromesh convert ckpt_epoch_final.pth weights.safetensors --from-swin\n"
        "  synchromesh convert runs/demo demo.pth --to-swin 8"
    )
    return run_convert(_parse(ConvertRequest, given, prog="synchromesh convert", about=about), console=OUT)


def _first(grid: Grid, console: Console) -> Console:
    """Return the console on the first rank; the others are silent."""
    return console if grid.rank == 0 else Console(quiet=True)


def _report(given: list[str]) -> int:
    about = "Write report.html into the folder of a run: curves, expert load, throughput, all in one file."
    options = _parse(ReportOptions, given, prog="synchromesh report", about=about)
    return run_report(options.run, console=OUT)


def _verify(given: list[str]) -> int:
    about = (
        "Run every legal parallel plan of a layer on these ranks and devices, and compare outputs and all gradients "
        "with the definition, computed in one process.\n\n"
        "  synchromesh verify --world 4 --ranks-per-node 2\n"
        "  torchrun --nnodes 2 --nproc-per-node 8 ... -m -- synchromesh.cli verify --dtype bfloat16"
    )
    options = _parse(VerifyOptions, given, prog="synchromesh verify", about=about)
    if options.world < 1:
        raise InputError(f"--world is {options.world}, wanted a number of ranks")
    if options.world > 1 and not in_job():
        return launch(["verify", *given], options.world, errors=ERRORS)
    request = VerifyRequest(options.ranks_per_node, DTYPES[options.dtype], options.quick, options.json)
    with joined() as grid:
        return run_verify(request, grid, console=OUT)


def _profile(given: list[str]) -> int:
    about = (
        "Measure these ranks in under a minute: products by shape, memory, links by message size, overlap.\n\n"
        "  synchromesh profile here.json --world 2\n"
        "  torchrun --nnodes 2 --nproc-per-node 8 ... -m -- synchromesh.cli profile cluster.json"
    )
    request = _parse(ProfileRequest, given, prog="synchromesh profile", about=about)
    if request.world < 1:
        raise InputError(f"--world is {request.world}, wanted a number of ranks")
    if request.world > 1 and not in_job():
        return launch(["profile", *given], request.world, errors=ERRORS)
    with joined() as grid:
        return run_profile(request, grid, console=_first(grid, OUT))


def _plan(given: list[str]) -> int:
    about = (
        "Predict a model's step on a described cluster, and choose the plan of each kind of its MoE layers.\n\n"
        "  synchromesh plan --model swinv2_moe_b --cluster a100_hdr --world 8..2048 --batch 128\n"
        "  synchromesh plan --layer 16384 2048 2048 64 2 --cluster h100_ndr --world 512\n"
        "  synchromesh plan --model qwen3/config.json --length 4096 --batch 1 --world 8..65536 --fsdp"
    )
    return run_plan(_parse(PlanRequest, given, prog="synchromesh plan", about=about), console=OUT)


def _plans(given: list[str]) -> int:
    about = "Show what the layers of runs found out about their plans, or merge it into one file."
    return run_plans(_parse(PlansRequest, given, prog="synchromesh plans", about=about), console=OUT)


def _parse(kind: type[Options], given: list[str], *, prog: str, about: str, default: Options | None = None) -> Options:
    settings = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues)
    try:
        if default is None:
            return tyro.cli(kind, args=given, prog=prog, description=about, config=settings)
        return tyro.cli(kind, args=given, prog=prog, description=about, config=settings, default=default)
    except ValueError as error:  # a configuration refuses its values
        raise InputError(str(error)) from error


COMMANDS: Mapping[str, Callable[[list[str]], int]] = MappingProxyType(
    {
        "train": _train,
        "eval": _eval,
        "predict": _predict,
        "report": _report,
        "convert": _convert,
        "verify": _verify,
        "profile": _profile,
        "plan": _plan,
        "plans": _plans,
    }
)

if __name__ == "__main__":
    sys.exit(main())
