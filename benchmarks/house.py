"""Count what a reader of the package has to follow, on any checkout, so that two can be compared.

    python benchmarks/house.py . ../before          a column for each tree
    python benchmarks/house.py . --json             the same for machines, with every file that was counted, and why

Each number is counted by one rule on every tree; the tree's own code runs, in processes of their own.

- *Files between the command line and the loop*: `synchromesh train digits` runs until its first optimizer step, under
  `sys.setprofile` (the main thread; threads that read images are left out). A file counts where one of its functions,
  dunder methods apart, is given the configuration: a `TrainConfig`, a dataclass with a field that holds one, or one of
  the dataclasses that it is made of, `self` included. *As a whole*: the first two only. `--json` tells for each file
  the first such function, and the argument. A setting that is handed on as a plain number is lost from sight there; so
  *files that run* counts all whose functions are called on that way, whatever they are given, imports left out.
- *Modules that name a task*: files in which a name or a string, docstrings and comments apart, has a word that begins
  with one of `TASK_WORDS`: names of the tasks, and what only one of them knows. Not counted: `tasks/` itself,
  `recipes/` (each chooses a task, and the catalog lists them), `data/`, `models/` and `compat/` (what tasks are made
  of: labelled images, heads, other people's formats), and labels of the bars and curves of charts and of
  columns in files of others (`CHARTS`).
- *Files of one forward*: those whose code runs in the second training forward of a layer of 4 experts on 2 ranks, on
  the first rank; router and kernels too. By the plan of `Sharded`, and by plans that are chosen (`Adaptive`).
- *Public concepts*: the names in `synchromesh.__all__`.
- *Functions*: from `def` to the last line, docstring included, nested ones and methods too. *Comments*: comment
  tokens, docstrings apart, for each 100 lines of a file.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import tyro

TASK_WORDS = (
    *("classification", "classifier", "detection", "detector", "simmim"),
    *("label", "accuracy", "argmax", "cross entropy", "average precision"),
)
EXEMPT = ("tasks", "recipes", "data", "models", "compat")
CHARTS = ("training/figures.py", "training/panels.py", "training/page/", "testing/packed.py")
LONG = 40  # lines of a function


@dataclass(frozen=True)
class Args:
    """What to count.

    Attributes:
        trees: checkouts, each with a folder `synchromesh`.
        names: their headings; the folders' own names if not given.
        json: print one JSON object a line.
    """

    trees: tyro.conf.Positional[tuple[Path, ...]] = (Path(__file__).parents[1],)
    names: tuple[str, ...] = ()
    json: bool = False


@dataclass(frozen=True)
class Counts:
    """What was counted in one tree; files by their path inside the package."""

    files: int
    lines: int
    config_files: dict[str, str]
    config_files_as_a_whole: dict[str, str]
    files_that_run_before_the_loop: list[str]
    modules_that_name_a_task: dict[str, list[str]]
    forward_files_sharded: dict[str, int]
    forward_files_adaptive: dict[str, int]
    public_concepts: int
    functions: int
    mean_function_lines: float
    functions_over_40_lines: dict[str, int]
    comments_per_100_lines: float

    def rows(self) -> list[tuple[str, str]]:
        """Return what the table says."""
        sharded, adaptive = self.forward_files_sharded, self.forward_files_adaptive
        return [
            ("files, lines of the package", f"{self.files}, {self.lines:,}"),
            ("files that the configuration or a part of it passes, command line to loop", f"{len(self.config_files)}"),
            ("... the configuration as a whole", f"{len(self.config_files_as_a_whole)}"),
            ("... files that run on that way", f"{len(self.files_that_run_before_the_loop)}"),
            ("modules outside tasks that name one", f"{len(self.modules_that_name_a_task)}"),
            ("files (lines) of one forward, 2 ranks, Sharded", f"{len(sharded)} ({sum(sharded.values()):,})"),
            ("files (lines) of one forward, 2 ranks, Adaptive", f"{len(adaptive)} ({sum(adaptive.values()):,})"),
            ("public concepts", f"{self.public_concepts}"),
            ("functions", f"{self.functions:,}"),
            ("mean function length, lines", f"{self.mean_function_lines:.1f}"),
            ("functions over 40 lines", f"{len(self.functions_over_40_lines)}"),
            ("comments per 100 lines", f"{self.comments_per_100_lines:.1f}"),
        ]


def count(tree: Path) -> Counts:
    """Count one tree."""
    package = tree.resolve() / "synchromesh"
    texts = {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}
    if not texts:
        raise SystemExit(f"{package} holds no Python files: name a checkout of synchromesh")
    lengths = {f"{name}:{line} {what}": size for name, text in texts.items() for what, line, size in functions(text)}
    lines = sum(len(text.splitlines()) for text in texts.values())
    config = _in_the_tree(tree, "config")
    forward = {kind: _in_the_tree(tree, kind) for kind in ("sharded", "adaptive")}
    outside = {name: task_words(text, name) for name, text in texts.items() if name.partition("/")[0] not in EXEMPT}
    return Counts(
        files=len(texts),
        lines=lines,
        config_files=config["all"],
        config_files_as_a_whole=config["whole"],
        files_that_run_before_the_loop=config["ran"],
        modules_that_name_a_task={name: words for name, words in outside.items() if words},
        forward_files_sharded={name: len(texts[name].splitlines()) for name in forward["sharded"]},
        forward_files_adaptive={name: len(texts[name].splitlines()) for name in forward["adaptive"]},
        public_concepts=_in_the_tree(tree, "public"),
        functions=len(lengths),
        mean_function_lines=sum(lengths.values()) / max(1, len(lengths)),
        functions_over_40_lines={name: size for name, size in lengths.items() if size > LONG},
        comments_per_100_lines=100 * sum(map(comments, texts.values())) / lines,
    )


def functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name, the first line and the number of lines of every function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def comments(text: str) -> int:
    """Count the comments of a file, at the end of a line or on lines of their own."""
    return sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))


def task_words(text: str, file: str = "") -> list[str]:
    """Return the words of a file's names and strings that name a task."""
    words = [word for word in TASK_WORDS if word != "label" or not file.startswith(CHARTS)]
    begins = re.compile(rf"\b(?:{'|'.join(words)})\w*")
    return sorted({hit for name in _names(ast.parse(text)) for hit in begins.findall(_apart(name))})


def _apart(name: str) -> str:
    """Return the words of a name, in small letters: `TopLabels` and `top_labels` are `top labels`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|_", " ", name).lower()


def _names(tree: ast.AST) -> Iterator[str]:
    docstrings = {id(text) for node in ast.walk(tree) for text in _docstrings(node)}
    for node in ast.walk(tree):
        for part in ("id", "attr", "arg", "name", "module", "asname"):
            name = getattr(node, part, None)
            if isinstance(name, str):
                yield name
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def _docstrings(node: ast.AST) -> list[ast.expr]:
    """Return the strings of a body that stand alone."""
    body = getattr(node, "body", None)
    return [one.value for one in body if isinstance(one, ast.Expr)] if isinstance(body, list) else []


def _in_the_tree(tree: Path, what: str) -> Any:
    """Run a part of this script with the package of a tree, and return what it found."""
    names = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TORCHELASTIC"))}
    names |= {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "inside", what, folder]
        done = subprocess.run(command, cwd=folder, env=names, capture_output=True, text=True, check=False)
        found = Path(folder) / "found.json"
        if not found.exists():
            raise SystemExit(f"{tree}: counting {what!r} failed\n{done.stdout}{done.stderr}")
        return json.loads(found.read_text())


# What runs with the package of a tree.


def inside(what: str, folder: Path) -> None:
    """Find something out, and write it into found.json of a folder."""
    import synchromesh

    package = Path(synchromesh.__file__).parent
    out = folder / "found.json"
    if what == "public":
        out.write_text(json.dumps(len(synchromesh.__all__)))
    elif what == "config":
        follow_config(package, out)
    else:
        follow_forward(package, what, out)


@dataclass
class Following:
    """The files of a package whose functions are given a configuration, and which function was the first.

    Attributes:
        package: its folder.
        whole: where it is the configuration, or what holds it.
        all: where it may be a part of it too.
        ran: all files whose functions were called.
        parts: the classes that the configuration is made of.
    """

    package: Path
    whole: dict[str, str] = field(default_factory=dict)
    all: dict[str, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    parts: set[type] = field(default_factory=set)

    def see(self, frame: FrameType) -> None:
        """Look at what a function is given."""
        code = frame.f_code
        name = code.co_name
        if not code.co_filename.startswith(f"{self.package}{os.sep}") or re.fullmatch(r"__\w+__", name):
            return
        file = Path(code.co_filename).relative_to(self.package).as_posix()
        if code.co_flags & inspect.CO_OPTIMIZED:  # a function; neither a module nor the body of a class
            self.ran.add(file)
        count = code.co_argcount + code.co_kwonlyargcount
        for argument in code.co_varnames[:count]:
            value = frame.f_locals.get(argument)
            if not dataclasses.is_dataclass(value) or isinstance(value, type):
                continue
            why = f"{name}({argument}: {type(value).__name__})"
            if any(map(self._is_config, [value, *_fields(value)])):
                self.whole.setdefault(file, why)
                self.all.setdefault(file, why)
            elif type(value) in self.parts:
                self.all.setdefault(file, why)

    def _is_config(self, value: Any) -> bool:
        if type(value).__name__ != "TrainConfig":
            return False
        self.parts |= set(_parts(value))
        return True


def _fields(value: Any) -> list[Any]:
    return [getattr(value, each.name, None) for each in dataclasses.fields(value)]


def _parts(value: Any) -> Iterator[type]:
    """Yield the classes of the dataclasses inside a value."""
    for one in value if isinstance(value, (tuple, list)) else _fields(value):
        if dataclasses.is_dataclass(one) and not isinstance(one, type):
            yield type(one)
        if dataclasses.is_dataclass(one) or isinstance(one, (tuple, list)):
            yield from _parts(one)


def follow_config(package: Path, out: Path) -> None:
    """Train until the first step, and write which files the configuration came through."""
    from synchromesh import cli

    following = Following(package)
    for module in pkgutil.walk_packages([str(package)], "synchromesh."):  # what runs at import is not the way
        if module.name.split(".")[1] in ("cli", "commands", "recipes"):
            importlib.import_module(module.name)

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        following.see(frame)
        if frame.f_code.co_name == "train_step":
            sys.setprofile(None)
            found = {"whole": following.whole, "all": following.all, "ran": sorted(following.ran)}
            out.write_text(json.dumps(found))
            os._exit(0)

    sys.setprofile(watch)
    cli.main(["train", "digits", "--run", str(out.parent / "run")])


def follow_forward(package: Path, strategy: str, out: Path) -> None:
    """Start two ranks; the first one writes which files ran in a forward."""
    store = str(out.with_name("store"))
    ranks = [
        subprocess.Popen([sys.executable, __file__, "rank", str(rank), strategy, store, str(package), str(out)])
        for rank in range(2)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit("a rank failed")


def on_rank(rank: int, strategy: str, store: str, package: Path, out: Path) -> None:
    """Run a layer, and follow its second forward."""
    import torch
    import torch.distributed as dist

    from synchromesh import Grid, MLPExperts, MoE, Sharded, TopKRouter, distribute

    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    grid, moe = Grid(dist.group.WORLD), MoE(TopKRouter(16, 4, k=2), MLPExperts(4, 16, hidden=32))
    distribute(moe, grid, strategy=None if strategy == "adaptive" else lambda: Sharded(grid))
    x = torch.randn(32, 16, requires_grad=True)
    moe(x).sum().backward()
    ran: set[str] = set()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{package}{os.sep}"):
            ran.add(Path(frame.f_code.co_filename).relative_to(package).as_posix())

    sys.setprofile(watch)
    y = moe(x)
    sys.setprofile(None)
    y.sum().backward()
    if rank == 0:
        out.write_text(json.dumps(sorted(ran)))
    dist.barrier()
    dist.destroy_process_group()


def table(found: dict[str, Counts]) -> str:
    """Return the counts of trees as a Markdown table."""
    columns = [counts.rows() for counts in found.values()]
    lines = [["", *found], ["---", *["---:"] * len(found)]]
    lines += [[row[0][0], *(value for _, value in row)] for row in zip(*columns, strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(args: Args) -> None:
    names = args.names or tuple(tree.resolve().name for tree in args.trees)
    if len(set(names)) != len(args.trees):
        raise SystemExit(f"got the names {names} for {len(args.trees)} trees, wanted one for each: give --names")
    found = {name: count(tree) for name, tree in zip(names, args.trees, strict=True)}
    if args.json:
        for name, counts in found.items():
            print(json.dumps({"tree": name, **dataclasses.asdict(counts)}))
        return
    print(table(found))
    for name, counts in found.items():
        for file, words in counts.modules_that_name_a_task.items():
            print(f"{name}: {file} names {', '.join(words)}")


def _dispatch(given: Sequence[str]) -> None:
    if given[:1] == ["inside"]:
        inside(given[1], Path(given[2]))
    elif given[:1] == ["rank"]:
        on_rank(int(given[1]), given[2], given[3], Path(given[4]), Path(given[5]))
    else:
        main(tyro.cli(Args, args=given, description=__doc__))


if __name__ == "__main__":
    _dispatch(sys.argv[1:])
