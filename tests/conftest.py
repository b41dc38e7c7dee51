from collections.abc import Iterator

import pytest
import torch

from synchromesh.testing.poison import poisoned_memory


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-browser", action="store_true", help="fail instead of skip where no browser is found")


@pytest.fixture(autouse=True)
def _known_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from one seed; outside of tests/compile fresh memory is NaN."""
    torch.manual_seed(0)
    if "compile" in request.path.parts:
        yield
        return
    with poisoned_memory():
        yield
