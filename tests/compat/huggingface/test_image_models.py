"""What all backbones with experts share under transformers' interfaces."""

import pytest
import torch
from torch import nn

from synchromesh.compat.huggingface.backbones.modeling import FAMILIES
from synchromesh.compat.huggingface.image_models import MoEBackbone, MoEForImageClassification, MoEPreTrainedModel
from synchromesh.compat.huggingface.swin.configuration import SwinV2MoEConfig
from synchromesh.compat.huggingface.swin.modeling import SwinV2MoEBackbone, SwinV2MoEForImageClassification

ALL = [(SwinV2MoEConfig, SwinV2MoEForImageClassification, SwinV2MoEBackbone), *FAMILIES]
SIZES = {
    "swinv2_moe": {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "vit_moe": {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
    "focalnet_moe": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
    "pvt_moe": {"widths": [8, 12], "depths": [1, 1], "num_heads": [1, 2], "reductions": [2, 1], "mlp_ratios": [2, 2]},
    "spectrum_moe": {"embed_dim": 8, "depths": [1, 1], "bands": 4, "band_hidden": 4},
}
OURS = pytest.mark.parametrize(("config", "classifier", "backbone"), ALL, ids=[one[0].model_type for one in ALL])


@OURS
def test_every_family_is_the_same_classifier_and_backbone_by_its_settings(config, classifier, backbone) -> None:
    assert issubclass(classifier, MoEForImageClassification)
    assert issubclass(backbone, MoEBackbone)
    own = config(**SIZES[config.model_type], num_labels=3, moe_blocks=None)
    model = classifier(own)
    assert set(model.backbone.state_dict()) == set(own.settings().build().state_dict())
    blocks = {type(module).__name__ for module in model.modules()}
    assert blocks & set(MoEPreTrainedModel._no_split_modules), "a device map cuts between blocks, never inside of one"


@OURS
def test_first_weights_are_as_wide_as_the_settings_say(config, classifier, backbone) -> None:
    name = "initializer_range" if config is SwinV2MoEConfig else "init_std"
    torch.manual_seed(0)
    model = backbone(config(**SIZES[config.model_type], **{name: 0.5}))
    drawn = torch.cat([m.weight.detach().flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert 0.4 < float(drawn.std()) < 0.55
