"""Models by name: each costs what its authors say, and the Python that is shown for it builds it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from synchromesh.models.costs import costs
from synchromesh.models.published import PUBLISHED, SWIN, dense_moe

# Million parameters and GFLOPs of Microsoft's own table (README of Swin-Transformer, "Main results on ImageNet"), of
# 1,000 classes each; the tables of SwinV2-MoE are held in test_costs.
THEIRS = {
    "swinv2_tiny_w8_256": (28, 5.9),
    "swinv2_tiny_w16_256": (28, 6.6),
    "swinv2_small_w8_256": (50, 11.5),
    "swinv2_small_w16_256": (50, 12.6),
    "swinv2_base_w8_256": (88, 20.3),
    "swinv2_base_w16_256": (88, 21.8),
    "swinv2_base_w24_384": (88, 54.7),
    "swinv2_large_w16_256": (197, 47.5),
    "swinv2_large_w24_384": (197, 115.4),
}


@pytest.mark.parametrize("name", THEIRS)
def test_dense_models_cost_what_their_authors_say(name: str) -> None:
    millions, gflops = THEIRS[name]
    with torch.device("meta"):
        got = costs(PUBLISHED[name].build())
    assert round(got.parameters / 1e6) == millions
    assert got.gflops == pytest.approx(gflops, abs=0.06)


def test_every_dense_model_of_1000_classes_is_compared() -> None:
    dense = {name for name, one in PUBLISHED.items() if one.family is SWIN and not name.endswith("_22k")}
    assert dense == THEIRS.keys()


def test_the_count_is_what_torch_counts_as_the_model_runs() -> None:
    """Torch's counter sees matrix products alone; those of the position bias are the difference, less the norms."""
    with torch.device("meta"):
        model = PUBLISHED["swinv2_tiny_w8_256"].build().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 256, 256))
    assert costs(model).multiply_adds == pytest.approx(counter.get_total_flops() / 2, rel=0.005)


SHOWN = ["pvt_v2_b5", "focalnet_large_fl4", "vit_base_p16_224", "pvt_tiny", "spectrum_tiny"]
SHOWN += ["swinv2_small_w16_256", "swinv2_large_w24_384", "swinv2_moe_b_dense", "swinv2_moe_s_e8", "swinv2_moe_demo"]


@pytest.mark.parametrize("name", SHOWN)
def test_the_python_that_is_shown_builds_the_model(name: str) -> None:
    with torch.device("meta"):
        wanted, made = PUBLISHED[name].build(), {}
        exec(PUBLISHED[name].python, made)
    shapes = {key: tensor.shape for key, tensor in wanted.state_dict().items()}
    assert {key: tensor.shape for key, tensor in made["model"].state_dict().items()} == shapes
    assert made["model"].backbone.config == wanted.get_submodule("backbone").config  # type: ignore[attr-defined]  # a Module to pyright


def test_a_size_that_is_not_published_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no size 'xl', wanted one of s, b"):
        dense_moe("xl")
