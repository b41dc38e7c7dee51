"""What `pip install synchromesh` gives: the wheel, in a fresh environment, beside nothing but what it asks for.

The dependencies are those of the environment that runs the tests, linked one by one; a package that only an extra
brings cannot be imported.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from synchromesh.cli import COMMANDS
from synchromesh.planning.dictionary import Dictionary
from synchromesh.planning.lattice import Ranks
from synchromesh.planning.tuner import Entry, Trial
from synchromesh.types import Plan, Workload

ROOT = Path(__file__).parents[1]
TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--model.experts.blocks.1", "0",
    "--batch-size=64", "--loading.workers=1", "--epochs=1",
]  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the wheel."""

    folder: Path

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of it, where neither the sources nor other packages can be found."""
        names = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        name, *rest = map(str, command)
        program = [str(self.folder / "bin" / name), *rest]
        done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=self.folder, env=names)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def python(self, code: str) -> str:
        return self.run("python", "-c", code).stdout


def needed(requirements: list[str], extras: set[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return the distributions that these requirements, and theirs in turn, ask for."""
    found, waiting = {}, [(Requirement(text), extras) for text in requirements]
    while waiting:
        one, own = waiting.pop()
        wanted = one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *own))
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if wanted and (name not in found or one.extras):
            found[name] = importlib.metadata.distribution(one.name)
            waiting += [(Requirement(text), set(one.extras)) for text in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    here = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here, "--wheel-dir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def installed(wheel: Path, folder: Path, *extras: str) -> Environment:
    """Make an environment with the wheel, and what it and these extras ask for."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (own,) = importlib.metadata.distributions(path=[str(site)])
    for other in needed(own.requires or [], set(extras)).values():
        for top in sorted({file.parts[0] for file in other.files or []} - {"..", "__pycache__"}):
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(other.locate_file(top))).resolve())
    return Environment(folder)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Without extras."""
    return installed(wheel, tmp_path_factory.mktemp("bare"))


def test_every_public_name_is_there_without_extras(bare: Environment) -> None:
    said = bare.python(
        "import importlib.util as find, synchromesh\n"
        "print(synchromesh.__file__)\n"
        "print(len([getattr(synchromesh, name) for name in synchromesh.__all__]))\n"
        "print([name for name in ('PIL', 'tensorboard', 'transformers', 'pytest') if find.find_spec(name)])"
    ).splitlines()
    assert Path(said[0]).is_relative_to(bare.folder)
    assert int(said[1]) > 50
    assert said[2] == "[]"


def test_help_does_not_wait_for_torch(bare: Environment) -> None:
    """Nobody waits for what is not used: `import torch` takes a second, and the page of the commands none of it."""
    code = "import sys; from synchromesh.cli import main; main(['{}']); print('torch' in sys.modules)"
    for word in ("--help", "--version"):
        assert bare.python(code.format(word)).splitlines()[-1] == "False"
    page = bare.run("synchromesh", "--help").stdout
    assert all(f"  {name} " in page for name in COMMANDS)
    assert bare.run("python", "-m", "synchromesh", "--version").stdout == bare.run("synchromesh", "--version").stdout


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_help_of_a_command_waits_for_torch_and_no_more_of_it(bare: Environment, command: str) -> None:
    said = bare.python(
        "import sys, torch, torch.distributed\n"
        "before = set(sys.modules)\n"
        "from synchromesh.cli import main\n"
        "try:\n"
        f"    main(['{command}', '--help'])\n"
        "except SystemExit as end:\n"
        "    print()\n"
        "    print(end.code, sorted(m for m in set(sys.modules) - before if m.startswith(('torch', 'triton'))))"
    )
    assert f"usage: synchromesh {command}" in said
    assert said.splitlines()[-1] == "0 []"


def test_plan_reads_the_profiles_that_are_shipped(bare: Environment) -> None:
    said = bare.run("synchromesh", "plan", "--cluster", "a100_hdr", "--world", "8..16", "--json").stdout
    assert [json.loads(line)["world"] for line in said.splitlines()] == [8, 16]
    bare.run("synchromesh", "plan", "--world", "8", "--html", "page.html")  # the page needs no extra
    assert "Memory of a rank" in (bare.folder / "page.html").read_text()


def test_verify_starts_ranks_of_the_installed_package(bare: Environment) -> None:
    said = bare.run("synchromesh", "verify", "--world", "2", "--quick", "--json").stdout
    findings = [json.loads(line) for line in said.splitlines()]
    assert len({json.dumps(finding["plan"], sort_keys=True) for finding in findings}) > 5
    assert all(finding["good"] for finding in findings)


def test_what_profile_measures_plan_reads(bare: Environment) -> None:
    plan = ["plan", "--cluster", "here.json", "--world", "1", "--batch", "1", "--dtype", "float32"]
    bare.run("synchromesh", "profile", "here.json")
    said = bare.run("synchromesh", *plan, "--json").stdout
    assert json.loads(said)["seconds"] > 0


def test_plans_shows_a_file_of_plans(bare: Environment) -> None:
    work, plan = Workload(64, 1, 8, 16, 4, torch.float32, training=True), Plan(gather=2)
    known = Dictionary(Ranks(2, 2), {"blocks.3": {work: Entry([Trial(plan, 0.25, [0.5])], plan, settled=True)}})
    (bare.folder / "plans.json").write_text(known.to_json())
    shown = json.loads(bare.run("synchromesh", "plans", "plans.json", "--json").stdout)
    assert shown == json.loads(known.to_json())


NEED_EXTRAS = {
    "vision": ["train", "train demo", "eval run", "predict a.png --run run", "report run", "convert run a.safetensors"],
}


def test_a_command_that_needs_an_extra_says_which_in_one_line(bare: Environment) -> None:
    commands = {command: extra for extra, own in NEED_EXTRAS.items() for command in own}
    (bare.folder / "run").mkdir()
    said = bare.python(
        "import contextlib, io, json\n"
        "from synchromesh.cli import main\n"
        f"for command in {list(commands)!r}:\n"
        "    out, errors = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):\n"
        "        code = main(command.split())\n"
        "    print(json.dumps([command, code, out.getvalue(), errors.getvalue()]))"
    )
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == len(commands)
    for command, code, out, errors in found:
        assert (code, out) == (2, ""), command
        assert re.fullmatch(rf"error: .*pip install 'synchromesh\[{commands[command]}\]'\n", errors), errors


def test_the_program_ends_with_an_error_and_no_trace_where_an_extra_is_missing(bare: Environment) -> None:
    done = bare.run("synchromesh", "train", "digits", "--nproc", "2", check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "synchromesh[vision]" in done.stderr


def test_the_extra_vision_is_all_that_training_needs(wheel: Path, tmp_path: Path) -> None:
    seeing = installed(wheel, tmp_path / "vision", "vision")
    said = seeing.run("synchromesh", "train", "digits", *TINY, "--run", "run").stdout
    assert "no report" not in said
    assert (seeing.folder / "run" / "report.html").is_file()
    assert json.loads((seeing.folder / "run" / "summary.json").read_text())["test_images"] == 397
    done = seeing.run("synchromesh", "train", "digits", *TINY, "--run", "other", "--tensorboard", check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*pip install 'synchromesh\[report\]'\n", done.stderr), done.stderr


def test_the_extra_hf_is_all_that_heads_of_transformers_need(wheel: Path, tmp_path: Path) -> None:
    said = installed(wheel, tmp_path / "hf", "hf").python(
        "import torch\n"
        "from synchromesh.compat.huggingface import heads as hf\n"
        "from synchromesh.models.heads.objects import Objects\n"
        "from synchromesh.models.swin_v2 import SwinV2Config\n"
        "backbone = SwinV2Config(image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 1), window_size=4).build()\n"
        "model = hf.Detr(queries=3, width=16, heads=2, ffn=8, encoder_layers=1, decoder_layers=1).build(backbone, 2)\n"
        "truth = Objects(torch.zeros(1).long(), torch.tensor([[2.0, 3, 9, 9]]), torch.ones(1).long())\n"
        "sums = model(torch.randn(1, 3, 32, 32), torch.tensor([[32, 32]]), truth)\n"
        "print(all(bool(one.isfinite()) for one in sums.values()))"
    )
    assert said == "True\n"
