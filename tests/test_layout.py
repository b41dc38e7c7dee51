"""The house rules that a reader relies on, held by a machine."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "synchromesh").rglob("*.py"))
READS_ENVIRONMENT = {
    "synchromesh/parallel/comm/environment.py",
    "synchromesh/compat/tutel/communicate/groups.py",  # as Tutel does: sizes of nodes, time limits, mpiexec's numbers
    "synchromesh/compat/tutel/launcher/execl.py",
    "synchromesh/compat/tutel/launcher/run.py",
    "synchromesh/compat/tutel/system.py",
    "synchromesh/compat/tutel/environment.py",
    "synchromesh/testing/programs.py",  # hands it on to the programs that it starts
}
MOST_LINES = 400
MOST_LINES_OF_A_MODEL = 600


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_run_downwards_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_the_environment_is_read_in_named_places_only(path):
    reads = re.search(r"os\.(environ|getenv|putenv)|from os import .*(environ|getenv)", path.read_text())
    assert name(path) in READS_ENVIRONMENT or not reads


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_a_file_holds_one_concept(path):
    cap = MOST_LINES_OF_A_MODEL if "models" in path.parts else MOST_LINES
    assert len(path.read_text().splitlines()) <= cap


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_no_except_hides_what_it_does_not_know(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            assert caught not in ("", "Exception", "BaseException"), f"line {node.lineno}"


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_code_of_a_sub_package_stands_in_named_files(path):
    # What a package imitates is asked for by its name, and a family of heads by one name too.
    imitates = path.parent.parent.name == "compat" or path.parent.parts[-2:] == ("huggingface", "heads")
    if path.name == "__init__.py" and not imitates and path.parent.name not in ("synchromesh", "kernels"):
        assert not path.read_text().strip()


def test_tests_mirror_the_package():
    """Every test file stands beside what it tests: tests/a/test_b.py for synchromesh/a/b.py, or the folder a/b."""
    apart = {"tests/compile", "tests/interpreted", "tests/seams"}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if any(name(path).startswith(folder) for folder in apart) or path.parent == ROOT / "tests":
            continue
        if path.name == "test_fast.py":  # of all fast twins of a kernel
            path = path.parent
        mirrored = ROOT / "synchromesh" / path.parent.relative_to(ROOT / "tests") / path.name.removeprefix("test_")
        assert mirrored.exists() or mirrored.with_suffix("").is_dir(), name(path)


def tree_of_docs() -> dict[str, str]:
    """The annotated tree: path -> what it says."""
    text = (ROOT / "docs" / "design.md").read_text().split("<!-- tree -->")[1]
    entries, folders = {}, []
    for line in text.splitlines():
        found = re.fullmatch(r"((?:    )*)(\S+)\s{2,}(\S.*)", line)
        if found:
            depth, entry, says = len(found[1]) // 4, found[2], found[3]
            folders = [*folders[:depth], entry]
            entries["".join(folders)] = says
    return entries


def test_the_tree_in_the_docs_is_the_tree():
    """Each listed path exists, and each file of the package is listed, or its folder is as a whole."""
    entries = tree_of_docs()
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for path in entries:
        assert (ROOT / path).exists(), f"{path} is in docs/design.md and not in the repository"
    detailed = {path.rpartition("/")[0] + "/" for path in entries if not path.endswith("/")}
    for path in tracked:
        if path.startswith("synchromesh/") and path.endswith(".py") and not path.endswith("__init__.py"):
            folder = path.rpartition("/")[0] + "/"
            parents = {folder[: i + 1] for i, letter in enumerate(folder) if letter == "/"}
            listed = path in entries or (folder not in detailed and parents & set(entries) - {"synchromesh/"})
            assert listed, f"{path} is not in the tree of docs/design.md"
