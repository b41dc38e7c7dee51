"""What the README and the docs tell a newcomer to type is true."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[Path, str]]:
    found = []
    for page in PAGES:
        found += [(page, text) for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]
    return found


@pytest.mark.parametrize(("page", "code"), blocks("python"), ids=lambda value: getattr(value, "name", ""))
def test_python_on_the_page_runs(page, code):
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{page.name}: {run.stderr}"


def test_the_layer_takes_about_fifteen_lines():
    (_, code), *_ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 16


def commands() -> list[str]:
    lines = [line for _, text in blocks("sh") for line in text.splitlines()]
    return sorted({line.split("  #")[0].strip() for line in lines} - {""})


@functools.cache
def help_of(*words: str) -> str:
    """What a command says of itself; it takes seconds to start."""
    program = Path(sys.executable).with_name("synchromesh")
    run = subprocess.run([program, *words, "--help"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("command", commands())
def test_commands_on_the_page_exist(command):
    """`make` targets exist, programs lie where they are called, and the command line knows every option used."""
    words = shlex.split(command)
    words = words[1:] if words[0].endswith("activate") else words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0].endswith("python"):
        script = ROOT / words[1]
        run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False, cwd=ROOT)
        assert script.exists()
        assert run.returncode == 0, run.stderr
        for option in [word for word in words[2:] if word.startswith("--")]:
            assert option in run.stdout
    else:
        assert words[0].endswith("synchromesh"), f"nothing checks {command!r}"
        said = help_of(words[1], *(words[2:3] if words[1] == "train" else []))
        for option in [word.split("=")[0] for word in words[2:] if word.startswith("--")]:
            assert option in said, f"{command!r}: {option}"


def prose(page: Path) -> str:
    """The page without its code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def test_links_between_pages_lead_somewhere():
    found = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#]+)", prose(page))]
    assert len(found) > 10
    for page, target in found:
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
