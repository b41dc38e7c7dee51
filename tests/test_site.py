"""The site of the docs builds without a warning, knows every public name, and its notebooks run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import synchromesh

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site):
    for module, names in synchromesh._HOMES.items():
        page = (site / "reference" / module / "index.html").read_text()
        for name in names:
            shown = getattr(getattr(synchromesh, name), "__qualname__", name)  # an old name leads to the new one
            assert re.search(rf'id="synchromesh\.[\w.]+\.{shown}"', page), f"{module} does not show {name}"


def test_a_page_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link[^>]+href="(https?:[^"]+)', page.read_text()
        )
        assert not loaded, f"{page.relative_to(site)} loads {loaded}"


def test_links_to_examples_lead_to_their_code(site):
    assert "plan_switching" in (site / "parallelism" / "index.html").read_text()
    assert "legal_plans" in (site / "files" / "examples" / "plan_switching.py" / "index.html").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_as_it_stands_and_shows_what_it_gives(path):
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.execution_count for cell in code), "run it, and save what it shows"
    assert str(Path.home()) not in path.read_text()
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
