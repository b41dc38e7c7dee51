from collections.abc import Iterator
from typing import Any

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


@pytest.fixture(scope="session")
def mixtral() -> dict[str, Any]:
    """The configuration of Mixtral 8x7B as transformers writes it."""
    return {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
