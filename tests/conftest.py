from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from synchromesh.data.images import MemoryImages, Preprocess
from synchromesh.kernels import matmul
from synchromesh.tasks.classification import LabelledImages
from synchromesh.testing.browser import Browser, find_browser
from synchromesh.testing.poison import poisoned_memory
from synchromesh.training.task import Splits

# The same examples in every run, and no limit to how long one takes.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-browser", action="store_true", help="fail instead of skip where no browser is found")
    parser.addoption("--all", action="store_true", help="every case of large products, not only a sample of each kind")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        left = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest) -> Browser:
    """Find a Chromium; without one skip, or fail where --require-browser says so."""
    found = find_browser()
    if found is not None:
        return Browser(found)
    reason = "no chromium in PATH to open pages with (Debian: apt-get install chromium)"
    if request.config.getoption("--require-browser"):
        pytest.fail(reason)
    pytest.skip(reason)  # optional on a user's machine; CI passes --require-browser


FOUR_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=FOUR_GPUS)])
def device(request: pytest.FixtureRequest) -> str:
    """Where ranks compute, for `run_ranks`: by gloo on the CPU, or by NCCL on a GPU each."""
    return request.param


@pytest.fixture(autouse=True)
def _known_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from one seed; outside of tests/compile fresh memory is NaN."""
    torch.manual_seed(0)
    if "compile" in request.path.parts:
        yield
        return
    with poisoned_memory():
        yield


@pytest.fixture
def everything_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine oneDNN multiplies faster than torch, however few the rows are."""
    monkeypatch.setattr(matmul, "_is_faster", lambda threads, rows, rest, instead, numbers: rows > 0)


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


@pytest.fixture
def splits() -> Splits:
    """Eight classes of random patterns with noise, 8 x 8: 96 to learn from, 32 to score on."""
    generator = torch.Generator().manual_seed(7)
    patterns = torch.randint(0, 256, (8, 1, 8, 8), generator=generator)

    def images(count: int) -> LabelledImages:
        labels = torch.arange(count) % 8
        noise = torch.randint(-30, 31, (count, 1, 8, 8), generator=generator)
        pixels = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
        return LabelledImages(MemoryImages(labels, tuple("abcdefgh"), Preprocess(image_size=8), pixels))

    return Splits(images(96), images(32), {"classes": list("abcdefgh")})


@pytest.fixture
def photo() -> Callable[..., Path]:
    """Write a picture of random pixels, in the format that the file's name says."""

    def write(path: Path, *, size: tuple[int, int] = (24, 16), mode: str = "RGB", seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode="L" if mode == "L" else None).save(path)
        return path

    return write


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, list[bytes]]]:
    """Read the last checkpoint's tensors, bit for bit, in the order of its files."""

    def read(run: Path) -> dict[str, list[bytes]]:
        found: dict[str, list[bytes]] = {}
        for file in sorted(sorted((run / "checkpoints").glob("step-*"))[-1].glob("weights*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    found.setdefault(name, []).append(tensors.get_tensor(name).numpy().tobytes())
        return found

    return read
