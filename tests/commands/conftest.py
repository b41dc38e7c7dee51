import pytest

# A model of a few thousand parameters on scikit-learn's digits; every run of it takes about a second.
TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2",
    "--model.experts.blocks.1", "0", "--model.experts.num-experts=4", "--batch-size=64", "--eval-batch-size=200",
    "--loading.workers=1", "--keep.log-steps=2",
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_options() -> list[str]:
    return TINY
