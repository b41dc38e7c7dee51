import pytest
import transformers as hf

from synchromesh.compat.huggingface.heads.fields import Levels, levels_of, pyramid_fields
from synchromesh.compat.huggingface.swin.configuration import SwinV2MoEConfig

OURS = SwinV2MoEConfig(embed_dim=24, patch_size=4, out_features=["stage2", "stage3", "stage4"])
HYBRID = {
    "encoder_in_channels": [48, 96, 192],
    "feat_strides": [8, 16, 32],
    "encode_proj_layers": [2],
    "decoder_in_channels": [64, 64, 64],
    "num_feature_levels": 3,
}


@pytest.mark.parametrize(
    ("of", "wanted"),
    [
        (hf.RTDetrConfig, HYBRID),
        (hf.RTDetrV2Config, HYBRID | {"decoder_n_levels": 3}),
        (hf.DFineConfig, HYBRID | {"decoder_n_points": [6, 6, 6]}),
        (hf.Deimv2Config, HYBRID | {"decoder_n_points": [6, 6, 6]}),
        (hf.DeformableDetrConfig, {"num_feature_levels": 5}),
        (hf.Mask2FormerConfig, {"feature_strides": [8, 16, 32], "common_stride": 8}),
        (hf.UperNetConfig, {"auxiliary_in_channels": 192}),
        (hf.DetrConfig, {}),
        (hf.MaskFormerConfig, {}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_configuration_gets_the_fields_that_it_has_and_repeats(of, wanted) -> None:
    fields = pyramid_fields(OURS, of, width=64, points=6, extra=2)
    assert fields == wanted
    assert all(hasattr(of, name) for name in fields)


def test_two_maps_are_told_as_two_and_leave_upernet_one_head() -> None:
    two = Levels((8, 16), (4, 8))
    assert pyramid_fields(two, hf.RTDetrV2Config)["encode_proj_layers"] == [1]
    assert pyramid_fields(two, hf.RTDetrV2Config)["decoder_in_channels"] == [256, 256]
    assert pyramid_fields(two, hf.UperNetConfig) == {"use_auxiliary_head": False}


def test_maps_are_those_of_a_backbone_of_ours_or_of_a_configuration(tiny) -> None:
    assert levels_of(tiny.build()) == Levels((8, 16, 32, 64), (4, 8, 16, 32))
    assert levels_of(tiny.build()).last(2) == levels_of(tiny.build()).last(9).last(2) == Levels((32, 64), (16, 32))
    dense = hf.Swinv2Config(
        embed_dim=12, patch_size=2, depths=[1, 1], num_heads=[1, 1], out_features=["stem", "stage2"]
    )
    assert levels_of(dense) == Levels((12, 24), (2, 4))
    assert len(levels_of(OURS)) == 3


def test_a_backbone_that_does_not_say_its_maps_is_named() -> None:
    with pytest.raises(ValueError, match=r"a ResNetConfig does not say \['embed_dim', 'patch_size'\]"):
        pyramid_fields(hf.ResNetConfig(out_features=["stage4"]), hf.RTDetrConfig)
