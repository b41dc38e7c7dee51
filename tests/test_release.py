"""What is uploaded: wheel and sdist build, pass twine's check, and hold what they should; a release's pages agree."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import synchromesh

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, without a network."""
    if any(importlib.util.find_spec(name) is None for name in ("build", "hatchling", "twine")):
        pytest.skip("needs build, hatchling and twine")  # the extra dev has them
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_twine_finds_nothing(built: Path) -> None:
    files = [str(path) for path in built.iterdir()]
    assert len(files) == 2
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    assert "synchromesh/py.typed" in names
    assert "synchromesh/__init__.pyi" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"synchromesh"}
    assert not [name for name in names if "/tests/" in name or Path(name).name.startswith("test_")]
    assert metadata["Version"] == synchromesh.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "synchromesh").rglob("*.py")}
    assert sources <= set(names)


def test_the_sdist_holds_what_it_takes_to_build_and_no_environment(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "LICENSE", "README.md", "synchromesh/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "dist/", "runs/", "samples/"))]


def test_versions_agree() -> None:
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert project[1] == synchromesh.__version__ == yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert f"## [{synchromesh.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_files_for_the_forge_are_readable_and_name_what_exists() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(files) == 8
    parsed = {path.name: yaml.safe_load(path.read_text()) for path in files}
    release = parsed["release.yml"]
    assert release["jobs"]["publish"]["permissions"] == {"id-token": "write"}  # trusted publishing, and no more
    assert release["permissions"] == {"contents": "read"}
    assert all("body" in parsed[f"{name}.yml"] for name in ("bug", "speed", "feature"))
    hooks = parsed[".pre-commit-config.yaml"]["repos"][0]["hooks"]
    check = (ROOT / "Makefile").read_text().partition("check: $(READY)")[2]
    for hook in hooks:
        assert hook["entry"].split()[0].removeprefix(".venv/bin/") in check
    assert parsed["CITATION.cff"]["references"][0]["url"].endswith("2206.03382")


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "benchmarks" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", module)
    spec.loader.exec_module(module)
    return module


def test_the_matrix_covers_what_the_package_supports(matrix: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert list(matrix.PYTHONS) == re.findall(r"Python :: (3\.\d+)", text)
    bounds = re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', text)
    assert bounds is not None
    assert list(matrix.TORCHES) == [f"2.{minor}" for minor in range(int(bounds[1]), int(bounds[2]))]
    assert all((ROOT / path).exists() for path in matrix.QUICK)


def test_the_matrix_says_what_is_missing_and_what_fails(matrix: ModuleType, tmp_path: Path) -> None:
    args = matrix.Args(folder=tmp_path)
    here = f"3.{sys.version_info.minor}"
    assert matrix.tried("3.99", "2.10", args).why == "no python3.99 on the path or in pyenv"
    for failing, state in (("pip", "missing"), ("pytest", "failed"), ("nothing", "passed")):

        def call(command: list[str], failing: str = failing) -> subprocess.CompletedProcess[str]:
            Path(command[-1]).mkdir(exist_ok=True, parents=True) if "venv" in command else None
            code = int(command[2] == failing)
            return subprocess.CompletedProcess(command, code, stdout="it says this\n", stderr="ERROR: no such torch\n")

        found = matrix.tried(here, "2.13", args, call)
        assert (found.state, bool(found.why)) == (state, True)


def test_an_interpreter_of_pyenv_is_found_by_its_whole_version(matrix: ModuleType, tmp_path: Path) -> None:
    for name in ("3.98.1", "3.9.1"):
        program = tmp_path / ".pyenv" / "versions" / name / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.touch()
    assert matrix.interpreter("3.98", home=tmp_path) == tmp_path / ".pyenv" / "versions" / "3.98.1" / "bin" / "python"
    assert matrix.interpreter("3.97", home=tmp_path) is None
