"""What the README and the docs tell a newcomer to type is true."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from synchromesh.cli import COMMANDS
from synchromesh.commands.options import parse
from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.testing.packed import encoded, index_of, parquet_of, tar_of
from synchromesh.testing.programs import run_program
from synchromesh.testing.squares import write_squares
from synchromesh.training.codec import encode

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[Path, str]]:
    found = []
    for page in PAGES:
        found += [(page, text) for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]
    return found


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: getattr(value, "name", ""))
def test_python_on_the_page_runs(page, code):
    run = run_program("-W", "error", "-c", code)
    assert run.returncode == 0, f"{page.name}: {run.stderr}"


def test_the_layer_takes_about_fifteen_lines():
    (_, code), *_ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 16


def commands() -> list[str]:
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    return sorted({line.split("  #")[0].strip() for line in lines} - {""})


def write_data(named: str) -> None:
    """Write what the page calls a COCO json, a parquet file, tar shards, a list, or a folder of classes."""
    path, pictures = Path(named), encoded(24)
    if path.suffix == ".json":
        write_squares(path.parent, "train", 4).replace(path)
    elif path.suffix == ".parquet":
        parquet_of(path, pictures)
    elif path.suffix == ".tsv":
        index_of(path, pictures)
    elif path.suffix == ".tar":
        for number in range(10):
            tar_of(Path(named.replace("{000..009}", f"{number:03d}")), pictures)
    else:
        index_of(path / "index.tsv", pictures)
        for line in (path / "index.tsv").read_text().splitlines():
            file, kind = line.split("\t")
            (path / kind).mkdir(exist_ok=True)
            (path / file).replace(path / kind / file)
        (path / "index.tsv").unlink()


@pytest.mark.parametrize("command", commands())
def test_commands_on_the_page_are_understood(command, tmp_path, monkeypatch):
    """`make` targets exist, programs lie where they are called, and every option has a value that it takes."""
    words = shlex.split(command.rpartition("| ")[2])  # what is piped into it is another program's
    words = words[1:] if words[0].endswith("activate") else words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0].endswith("python"):
        script = ROOT / words[1]
        assert script.exists()
        run = run_program(script, "--help", cwd=ROOT)
        assert run.returncode == 0, run.stderr
        for option in [word for word in words[2:] if word.startswith("--")]:
            assert option in run.stdout
    else:
        assert words[0].endswith("synchromesh"), f"nothing checks {command!r}"
        name, *rest = words[1:]
        module = importlib.import_module(f"synchromesh.commands.{COMMANDS[name].module}")
        if name != "train":
            assert parse(module.Request, rest, prog="synchromesh", about="")
            return
        monkeypatch.chdir(tmp_path)
        if "--config" in rest:
            file = Path(rest[rest.index("--config") + 1])
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(encode(RECIPES["demo"]())))
        if rest[0] == "--data":  # the task is found from it
            write_data(rest[1])
        assert module.read_request(rest, CATALOG).configured()


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def test_links_between_pages_lead_somewhere():
    found = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#]+)", prose(page))]
    assert len(found) > 10
    for page, target in found:
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
