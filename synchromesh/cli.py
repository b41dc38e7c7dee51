"""The `synchromesh` command: parsing only. Names on the command line select recipes and commands here, nowhere else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synchromesh.commands.context import Context
    from synchromesh.training.catalog import Catalog

EXAMPLES = """\
examples:
  synchromesh train demo                    a SwinV2-MoE learns digits, on a CPU
  synchromesh train --data photos/          a folder for each class, no more
  synchromesh train --data 'shards-{000..009}.tar'     or parquet files, a list
  synchromesh train --data instances_train.json --images photos/
  synchromesh train demo --optim.lr 1e-3 --epochs 5 --run runs/quick
  synchromesh train demo --run runs/quick --resume
  synchromesh train demo --augment.mixing.mixup 0.8   what is off is switched on
  synchromesh train demo --ema.decay 0.999 --optim.rule muon
  synchromesh train --config runs/quick/recipe.json --run runs/again
  synchromesh train finetune_1k --data photos/ --start.weights runs/big
  synchromesh eval runs/demo
  synchromesh eval runs/photos --tta.flip   probabilities averaged over views
  synchromesh predict digit.png another.png --run runs/demo --json
  synchromesh report runs/a runs/b          several runs on one page
  synchromesh models show swinv2_moe_b_e32  what a model is made of and costs
  synchromesh push runs/demo published/demo        and `pull` reads it
  synchromesh plan --model swinv2_moe_b --cluster a100_hdr --world 8..2048
  synchromesh kernels --architecture sm_90  which kernels run there, and why
  synchromesh verify --world 4              or by torchrun, see its --help

synchromesh COMMAND --help says more, synchromesh train the recipes, and
synchromesh --version which version this is.
"""


@dataclass(frozen=True)
class Command:
    """A command, whose module holds its `Request`, `ABOUT` it, and `run`; imported when it is called.

    Attributes:
        module: inside `synchromesh.commands`.
        takes: what stands after its name.
        says: what it does.
    """

    module: str
    takes: str
    says: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "train": Command("train", "RECIPE", "train a model from a recipe, or on data of your own"),
        "eval": Command("evaluate", "RUN", "score a trained model"),
        "predict": Command("predict", "IMAGE ...", "say what a trained model sees in image files"),
        "report": Command("report", "RUN ...", "write a page about a run, or one that compares several"),
        "convert": Command("convert", "RUN FILE", "write the weights of a run as one safetensors file"),
        "verify": Command("verify", "", "prove that every parallel plan computes the same"),
        "profile": Command("profile", "FILE", "measure this cluster: links, products, memory"),
        "plan": Command("plan", "", "what a model costs on a cluster, and how to run it there"),
        "kernels": Command("kernels", "", "which kernel runs each step of a layer, and why"),
        "models": Command("models", "", "every architecture by name, with what it costs"),
        "push": Command("push", "RUN TARGET", "a trained model in the hub's format, in a folder or hf://"),
        "pull": Command("pull", "SOURCE RUN", "a run folder of such a model"),
        "plans": Command("plans", "RUN ...", "what the layers of a run found out about their plans"),
    }
)


def shipped_catalog() -> Catalog:
    """Return the library's own recipes and tasks; they need the packages of its extra `vision`."""
    from synchromesh.recipes.catalog import CATALOG

    return CATALOG


def main(
    arguments: Sequence[str] | None = None,
    *,
    catalog: Callable[[], Catalog] = shipped_catalog,
    program: Sequence[str] = ("-m", "synchromesh"),
) -> int:
    """Run one command line; return its exit code: 0 done, 2 for what the user can mend, others as the command says.

    Args:
        arguments: what stands after the program's name; None takes this process's.
        catalog: makes the recipes and tasks that the commands know: `lambda: CATALOG.extended(...)` adds your own.
        program: what follows `python` to start this program on other ranks: (__file__,) in a script of your own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if given else 2
    if given[0] == "--version":
        from synchromesh import __version__

        sys.stdout.write(f"synchromesh {__version__}\n")
        return 0
    from synchromesh.commands.exits import guarded  # torch is imported from here on: help need not wait for it

    return guarded(lambda context: _dispatch(given, context), given, catalog, tuple(program))


def usage() -> str:
    """Return the page of `synchromesh --help`."""
    lines = ["usage: synchromesh COMMAND ...", ""]
    lines += [f"  {f'{name} {command.takes}':18}  {command.says}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", EXAMPLES])


def _dispatch(given: list[str], context: Context) -> int:
    from synchromesh.commands.options import parse
    from synchromesh.errors import InputError

    name, *rest = given
    if name not in COMMANDS:
        raise InputError(f"there is no command {name!r}: wanted one of {', '.join(COMMANDS)}")
    module: Any = importlib.import_module(f"synchromesh.commands.{COMMANDS[name].module}")
    if name != "train":
        return module.run(parse(module.Request, rest, prog=f"synchromesh {name}", about=module.ABOUT), context)
    if not rest or rest[0] in ("-h", "--help"):
        context.console.print(module.recipes_page(context.catalog()), highlight=False, soft_wrap=True, end="")
        return 0 if rest else 2
    return module.run(module.read_request(rest, context.catalog()), context)


if __name__ == "__main__":
    sys.exit(main())
