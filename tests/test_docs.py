"""docs/extending.md: each example is complete and short, and passes the test that stands below it.

docs/guarantees.md: the tests that it names are there.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
MOST_LINES = 40


def blocks(section: str, title: str) -> list[str]:
    return re.findall(rf"^```{title}\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)


def test_there_is_an_example_and_a_test_for_every_seam() -> None:
    assert list(SECTIONS) == ["A task", "A backbone", "A router", "A strategy", "A kernel", "An optimizer"]
    for section in SECTIONS:
        assert (len(blocks(section, "python")), len(blocks(section, "python test"))) == (1, 1)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_is_shorter_than_40_lines_of_code(section: str) -> None:
    (code,) = blocks(section, "python")
    ast.parse(code)
    assert len([line for line in code.splitlines() if line.strip()]) < MOST_LINES


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_passes_its_test(section: str) -> None:
    (example,), (test,) = blocks(section, "python"), blocks(section, "python test")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", example + test], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


# What an example must not get away with: a change of its code, and what its test then fails with.
WRONG = {
    "A task": ("batch).square().sum()", "batch).square().mean()", "AssertionError"),
    "A backbone": ("F.pad(images, (0, -images.shape[3] % 8, 0, -images.shape[2] % 8))", "images", "AssertionError"),
    "A router": ("2 * x @ centres.T", "x @ centres.T", "relative RMS error"),
    "A strategy": ("torch.where(rowmap.rows >= 0, routing.expert_ids, -1)", "routing.expert_ids", "relative RMS error"),
    "An optimizer": ("RAdam(groups,", "RAdam([p for group in groups for p in group['params']],", "AssertionError"),
    "A kernel": ("grad[kept])", "2 * grad[kept])", "gradient of x"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_test_finds_a_mistake(section: str) -> None:
    (example,), (test,) = blocks(section, "python"), blocks(section, "python test")
    right, wrong, says = WRONG[section]
    assert example.count(right) == 1
    code = example.replace(right, wrong) + test
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert says in run.stderr.splitlines()[-1], run.stderr


def test_the_tests_that_hold_a_guarantee_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "guarantees.md").read_text())
    assert named
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(), f"{path} has no {test}"
