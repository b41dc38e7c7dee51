"""Every backbone under what reads one: heads, pretexts, files of settings, the planner, the optimizer, fresh memory."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from synchromesh.commands import train
from synchromesh.models.costs import costs
from synchromesh.models.features import BackboneConfig
from synchromesh.models.focalnet import FocalNetConfig
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.heads.objects import Objects
from synchromesh.models.heads.pixels import PixelDecoder
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.pvt import PVTConfig, PVTVersion
from synchromesh.models.shapes import shape_of
from synchromesh.models.spectrum import SpectrumNetConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.record import aux_loss
from synchromesh.recipes.catalog import CATALOG
from synchromesh.testing.randomised import gradients
from synchromesh.training.codec import encode
from synchromesh.training.traits import traits

STAGED = ExpertsConfig(num_experts=4, blocks=((), (1,)), capacity=Dropless())
ONE = ExpertsConfig(num_experts=4, blocks=((1,),), capacity=Dropless())
PVT = {"widths": (8, 12), "depths": (1, 2), "num_heads": (1, 2), "reductions": (2, 1), "mlp_ratios": (2.0, 2.0)}
CONFIGS: dict[str, BackboneConfig] = {
    "swin": SwinV2Config(image_size=32, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, experts=STAGED),
    "vit": ViTConfig(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, experts=ONE),
    "rotary vit": ViTConfig(
        image_size=32,
        patch_size=8,
        width=16,
        depth=2,
        num_heads=2,
        pooling=Pooling.MEAN,
        positions=Positions.ROTARY,
        experts=ONE,
    ),
    "focalnet": FocalNetConfig(
        image_size=32,
        embed_dim=8,
        depths=(1, 2),
        focal_levels=(2, 1),
        focal_windows=(3, 3),
        layer_scale=0.1,
        conv_embed=True,
        experts=STAGED,
    ),
    "pvt": PVTConfig(image_size=32, version=PVTVersion.V1, **PVT, experts=STAGED),
    "pvt v2": PVTConfig(image_size=32, version=PVTVersion.V2, **PVT, experts=STAGED),
    "spectrum": SpectrumNetConfig(image_size=32, embed_dim=8, depths=(1, 2), bands=4, band_hidden=4, experts=STAGED),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each
def test_detection_and_segmentation_heads_train_on_it(config: BackboneConfig) -> None:
    images, sizes = torch.randn(2, 3, 40, 36), torch.tensor([[40, 36], [40, 36]])
    boxes = torch.tensor([[4.0, 4, 20, 24], [10, 2, 30, 30]])
    truth = Objects(torch.tensor([0, 1]), boxes, torch.tensor([0, 2]))
    detector = CentreBoxes(width=8).build(config.build(), 3)
    (sum(detector(images, sizes, truth).values()) + aux_loss(detector)).backward()
    assert set(gradients(detector)) == set(dict(detector.named_parameters()))
    assert len(detector.eval()(images, sizes)) == 2
    segmenter = SemanticFPN(width=8).build(config.build(), 3)
    labels = torch.randint(0, 3, (2, 40, 36))
    (segmenter(images, sizes, labels)["cross_entropy"] + aux_loss(segmenter)).backward()
    assert set(gradients(segmenter)) == set(dict(segmenter.named_parameters()))


@each
def test_hidden_patches_are_drawn(config: BackboneConfig) -> None:
    model = PixelDecoder(config.hiding().build(), 3)
    hidden = torch.zeros(2, 32, 32, dtype=torch.bool)
    hidden[:, 8:24, 8:24] = True
    drawn = model(torch.randn(2, 3, 32, 32), hidden)
    assert drawn.shape == (2, 3, 32, 32)
    drawn.square().sum().backward()
    token = model.backbone.get_submodule("embed").get_parameter("mask_token")
    assert token.grad is not None
    assert token.grad.any()


@each
def test_its_settings_go_to_json_and_back(config: BackboneConfig) -> None:
    assert CATALOG.decode(BackboneConfig, json.loads(json.dumps(encode(config)))) == config
    sized = config.sized(image_size=64, channels=1)
    assert sized.build().embed.in_channels == 1
    assert sized.build().multiply_adds() > config.build().multiply_adds()


@each
def test_fresh_memory_holds_the_same_weights_as_a_new_model(config: BackboneConfig) -> None:
    with torch.device("meta"):
        empty = config.build()
    torch.manual_seed(0)
    empty.to_empty(device="cpu").reset_parameters()
    wanted = config.build()
    torch.manual_seed(0)
    wanted.reset_parameters()
    for name, value in wanted.state_dict().items():
        assert torch.equal(empty.state_dict()[name], value), name
    assert empty(torch.zeros(1, 3, 32, 32)).pooled.isfinite().all()


@each
def test_the_planner_counts_its_experts_and_the_rest_apart(config: BackboneConfig) -> None:
    shape = shape_of("own", config, num_classes=10)
    with torch.device("meta"):
        counted = costs(Classifier(config.build(), 10))
    (kind,) = shape.layers
    own = kind.count * 4 * sum(kind.work.parts_per_expert)
    assert shape.dense_parameters + own == counted.parameters
    assert shape.blocks == sum(1 for _ in config.build().feed_forwards())
    assert 0 < shape.dense_products < counted.multiply_adds
    assert counted.active_parameters < counted.parameters - counted.router_parameters


@each
def test_dense_and_mixed_cost_the_same_for_each_picture(config: BackboneConfig) -> None:
    """One expert for each token, as large as the feed-forward: a plain one stands there in the dense twin."""
    with torch.device("meta"):
        dense = dataclasses.replace(config, experts=None).build()
        mixed = config.build()
    convolved = 16 * 9 * 24 if isinstance(config, PVTConfig) and config.version is PVTVersion.V2 else 0
    assert mixed.multiply_adds() == dense.multiply_adds() - convolved


@each
def test_each_parameter_has_a_depth_and_places_and_tokens_do_not_decay(config: BackboneConfig) -> None:
    found = traits(config.hiding().build())
    assert {name for name, trait in found.items() if trait.depth is None} == {"norm.weight", "norm.bias"}
    blocks = {trait.depth for name, trait in found.items() if ".mixer." in name or ".attention." in name}
    assert blocks == set(range(1, 1 + len(blocks)))
    still = ("token", "position", "positions", ".scale1.weight", ".bias")
    assert all(not trait.decays for name, trait in found.items() if name.endswith(still))
    assert any(trait.decays for name, trait in found.items() if ".ffn." in name)


@pytest.mark.parametrize("name", ["SwinV2Config", "ViTConfig", "FocalNetConfig", "PVTConfig", "SpectrumNetConfig"])
def test_a_file_or_an_option_chooses_the_backbone_of_a_recipe(tmp_path: Path, name: str) -> None:
    sizes = {"ViTConfig": {"width": 20, "num_heads": 5}, "SwinV2Config": {"embed_dim": 20, "num_heads": [5, 4]}}
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"model": {"kind": name, **sizes.get(name, {"drop_path": 0.25})}}))
    config = train.read_request(["digits", "--config", str(file)], CATALOG).configured()
    assert type(config.model).__name__ == name
    assert config.model.image_size == 8
    assert config.model.in_channels == 1
    if name == "ViTConfig":
        assert (config.model.width, config.model.num_heads) == (20, 5)
        given = ["--model", "vit", "--model.width", "20", "--model.num-heads", "5"]
        assert train.read_request(["digits", *given], CATALOG).configured().model == config.model
