import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from synchromesh.compat.huggingface import heads as hf
from synchromesh.data.moves import Fit
from synchromesh.models.heads.cascade.cascade_mask_rcnn import CascadeMaskRCNN
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.depth import DepthFPN, DepthHead, LogDifference
from synchromesh.models.heads.objects import ObjectHead, Objects
from synchromesh.models.heads.panoptic import PanopticHead
from synchromesh.models.heads.semantic import SemanticFPN, SemanticHead
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SWIN_MOE, SwinV2Config
from synchromesh.moe.capacity import FixedCapacity, batch_prioritized
from synchromesh.moe.layer import MoE
from synchromesh.moe.losses import ImportanceLoad, OverRanks
from synchromesh.recipes.catalog import CATALOG, RECIPES
from synchromesh.training.codec import differences, encode
from synchromesh.training.config import Freeze, TrainConfig
from synchromesh.training.optim import make_schedule
from synchromesh.training.run_folder import build_model
from synchromesh.training.start import freeze, load_weights
from synchromesh.training.summary import model_size

EXPERTS_OF_TWO = ExpertsConfig(num_experts=2, blocks=((), (1,)))
OLD = Path(__file__).parents[1] / "tasks" / "runs_of_0_1" / "recipes"


def built(config: TrainConfig, classes: int) -> nn.Module:
    facts = {"classes": list(range(classes)), "things": [label % 2 == 0 for label in range(classes)]}
    with torch.device("meta"):
        return build_model(config.task, config.model, facts)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_named_as_it_is_called_and_builds_its_model(name: str) -> None:
    config = RECIPES[name]()
    assert config.name == name
    experts = any(isinstance(m, MoE) for m in built(config, 10).modules())
    sizes = name.startswith("simmim_") and name != "simmim_demo"  # published ones, which are dense
    assert experts is not (sizes or name in ("digits_dense", "emoe_demo", "upcycle_demo", "spdf_demo"))


@pytest.mark.parametrize("file", sorted(OLD.iterdir()), ids=lambda file: file.stem)
def test_a_recipe_as_version_0_1_wrote_it_is_the_recipe_of_today(file: Path) -> None:
    found = CATALOG.config(json.loads(file.read_text()))
    assert differences(encode(found), encode(RECIPES[file.stem]())) == []


@pytest.mark.parametrize(
    ("name", "width", "drop_path", "millions"),
    [("swinv2_moe_s_22k", 96, 0.2, 541.8), ("swinv2_moe_b_22k", 128, 0.3, 955.3)],
)
def test_pre_training_has_the_papers_settings(name: str, width: int, drop_path: float, millions: float) -> None:
    config = RECIPES[name]()
    swin, experts = config.model, config.model.experts
    assert (swin.embed_dim, swin.depths, swin.window_size, swin.drop_path) == (width, (2, 2, 18, 2), 12, drop_path)
    assert (swin.init_std, swin.style, swin.image_size) == (0.005, SWIN_MOE, 192)
    assert (experts.num_experts, experts.k) == (32, 1)
    assert experts.capacity == FixedCapacity(1.25, priority=batch_prioritized)
    assert (experts.router.noise, experts.dropout, experts.down_bias) == (1.0, 0.1, False)
    assert experts.losses == (OverRanks(ImportanceLoad(0.01)),)
    assert (config.epochs, config.batch_size, config.task.label_smoothing) == (90, 4096, 0.1)
    optim = config.optim
    assert (optim.weight_decay, optim.clip_norm, optim.betas, optim.eps) == (0.1, 3.0, (0.9, 0.999), 1e-8)
    rate = make_schedule(optim, batch_size=4096, steps_per_epoch=100, epochs=90)
    assert all(math.isclose(rate(step), wanted) for step, wanted in ((0, 1e-6), (1000, 1e-3), (9000, 1e-5)))
    augment = config.task.augment
    assert augment.mixing is not None
    assert (augment.mixing.mixup, augment.mixing.cutmix, augment.erase, augment.flip) == (0.8, 1.0, 0.25, 0.5)
    assert augment.rand_augment is not None
    assert (augment.rand_augment.magnitude, augment.rand_augment.spread) == (9.0, 0.5)
    assert model_size(built(config, 21841)).parameters / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize(("name", "width", "drop_path"), [("cascade_coco_s", 96, 0.2), ("cascade_coco_b", 128, 0.3)])
def test_fine_tuning_on_coco_has_the_papers_head_with_the_moe_layers_frozen(
    name: str, width: int, drop_path: float
) -> None:
    config = RECIPES[name]()
    swin, data = config.model, config.task.data
    assert (swin.embed_dim, swin.drop_path, swin.window_size, swin.checkpointed) == (width, drop_path, 12, True)
    assert swin.pretrained_window_sizes == tuple(
        RECIPES["swinv2_moe_s_22k"]().model.window(stage) for stage in range(4)
    )
    assert swin.experts.capacity == FixedCapacity(1.25, priority=batch_prioritized)
    assert config.task.head == CascadeMaskRCNN()
    assert (config.start.freeze, config.epochs, config.batch_size, config.eval_batch_size) == (Freeze.MOE, 36, 16, 1)
    rate = make_schedule(config.optim, batch_size=16, steps_per_epoch=7330, epochs=36)
    assert [rate(epoch * 7330) for epoch in (1, 26, 27, 33)] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-6])
    assert (config.optim.weight_decay, data.fit) == (0.05, Fit(shorter=800, longer=1333))
    for size, shorter in zip(data.moves.sizes, (480, 560, 640, 720, 800), strict=True):
        for height, width_of_picture in ((480, 640), (640, 480)):
            one = dataclasses.replace(data.moves, sizes=(size,))
            crop = one.draw(height, width_of_picture, np.random.default_rng(0)).size
            assert abs(min(crop) - shorter) <= 1


def test_every_recipe_of_larger_images_keeps_the_positions_of_pre_training() -> None:
    """An offset of one position has the bias that it was learnt with, in windows that were cut to small maps too."""
    for name, recipe in RECIPES.items():
        config = recipe()
        if config.start.weights is None or not isinstance(config.model, SwinV2Config):
            continue
        pretrained = RECIPES[config.start.weights.name]().model
        model = config.task.sized(config.model)
        for stage in range(4):
            own = (*model.pretrained_window_sizes, 0, 0, 0, 0)[stage] or model.window(stage)
            assert own == pretrained.window(stage), (name, stage)


@pytest.mark.parametrize("pixels", [(32, 32), (40, 56)])
def test_weights_of_small_images_start_larger_ones_whose_windows_grow(tmp_path: Path, pixels: tuple[int, int]) -> None:
    """As `cascade_coco_s` starts from 192 pixels: a map that was one window of 2 x 2 gets windows of 4 x 4."""
    sizes = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "drop_path": 0.0}
    small = dataclasses.replace(SwinV2Config(image_size=16, **sizes), experts=EXPERTS_OF_TWO)
    large = dataclasses.replace(small, image_size=pixels, pretrained_window_sizes=(4, 2))
    assert [small.window(stage) for stage in (0, 1)] == [4, 2]
    assert [large.window(stage) for stage in (0, 1)] == [4, 4]
    source = small.build()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    model = CentreBoxes(width=8, convs=1).build(large.build(), 3)
    loaded = load_weights(model, tmp_path / "w.safetensors", CATALOG)
    assert not [name for name in loaded.fresh if name.startswith("backbone.")]
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[f"backbone.{name}"], tensor)
    freeze(model, Freeze.MOE)
    losses = model(torch.randn(1, 3, *pixels), torch.tensor([pixels]), Objects(
        torch.tensor([0]), torch.tensor([[2.0, 2, 20, 20]]), torch.tensor([1])
    ))  # fmt: skip
    sum(losses.values()).backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen
    assert all(".ffn." in name for name in frozen)


def test_the_twin_of_the_demo_costs_what_one_token_costs_in_the_moe() -> None:
    config = RECIPES["demo"]()
    assert config.twin is not None
    twin = dataclasses.replace(config, model=config.twin)
    sizes = [model_size(built(one, 10)) for one in (config, twin)]
    router = sizes[0].active - sizes[1].active
    assert 0 < router < 0.01 * sizes[1].active
    assert sizes[1].parameters == sizes[1].active
    assert sizes[0].parameters > 2 * sizes[1].parameters


def test_the_demo_chooses_nothing_on_its_test_images() -> None:
    config = RECIPES["demo"]()
    assert config.keep.best is False
    assert config.task.data.source.held_out == 0


def test_fine_tuning_and_probing_start_from_weights() -> None:
    assert RECIPES["finetune_1k"]().start.weights is not None
    probe = RECIPES["few_shot"]()
    assert (probe.start.freeze, probe.task.data.shots) == (Freeze.BACKBONE, 5)


def test_nobody_waits_for_transformers_who_builds_nothing_of_it() -> None:
    code = (
        "import sys\n"
        "from synchromesh.recipes.catalog import CATALOG\n"
        "own = [kind for kinds in CATALOG.kinds.values() for kind in kinds if 'huggingface' in kind.__module__]\n"
        "heads = [kind() for kind in own]\n"
        "print(len(heads), [name for name in ('transformers', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, _, found = done.stdout.strip().partition(" ")
    assert int(count) == 9
    assert found == "[]"


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (ObjectHead, hf.DeformableDetr(queries=30)),
        (ObjectHead, hf.MaskFormer(levels=2)),
        (SemanticHead, SemanticFPN(width=32)),
        (SemanticHead, hf.SemanticMasks(hf.MaskFormer())),
        (SemanticHead, hf.UperNet(norms=hf.Norms.BATCH)),
        (DepthHead, DepthFPN(farthest=None, loss=LogDifference())),
        (PanopticHead, CentrePanoptic(hf.Mask2Former(), least=0.25)),
        (PanopticHead, hf.PanopticMasks(hf.Mask2Former(queries=7))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_head_comes_back_from_a_file(kind: type, head: object) -> None:
    assert CATALOG.decode(kind, json.loads(json.dumps(encode(head)))) == head


def test_mask2former_has_its_papers_settings_and_scores_pictures_one_at_a_time() -> None:
    config = RECIPES["mask2former_ade20k"]()
    assert config.epochs * -(-20_210 // config.batch_size) == pytest.approx(160_000, rel=5e-3)
    assert (config.batch_size, config.eval_batch_size, config.start.freeze) == (16, 1, Freeze.MOE)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (1e-4, 0.05, 0.01)
    head = config.task.head.masks
    assert (head.queries, head.width, head.decoder_layers, head.points) == (100, 256, 9, 12544)
    assert config.model.image_size == 640
    assert config.task.data.source.train.root == config.task.data.source.test.root


@pytest.mark.parametrize("name", ["segment_demo", "panoptic_demo", "depth_demo", "mask2former_ade20k"])
def test_recipes_of_pixels_come_back_from_a_file(name: str) -> None:
    config = RECIPES[name]()
    assert CATALOG.config(json.loads(json.dumps(encode(config)))) == config
