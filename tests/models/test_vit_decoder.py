"""The decoder of visible tokens and of a second view: what it sees, and what it does not."""

import dataclasses

import pytest
import torch
from torch import Tensor

from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.vit import Pooling, Positions, Tokens, ViT, ViTConfig
from synchromesh.models.vit_decoder import CrossBlock, ViTDecoder, ViTDecoderConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

ENCODER = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=1, num_heads=2, positions=Positions.ROTARY, pooling=Pooling.MEAN
)
SMALL = ViTDecoderConfig(width=8, depth=2, num_heads=2)
LEARNED = dataclasses.replace(SMALL, positions=Positions.LEARNED)
ENCODERS = {"mean": ENCODER, "class token": dataclasses.replace(ENCODER, pooling=Pooling.CLASS_TOKEN)}


def built(encoder: ViTConfig, config: ViTDecoderConfig) -> tuple[ViT, ViTDecoder]:
    backbone = encoder.build().double()
    decoder = config.build(backbone).double()
    randomise(backbone)
    randomise(decoder)
    return backbone, decoder


def views(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64, generator=generator)
    return first, second, torch.stack([torch.randperm(16, generator=generator) < 12 for _ in range(2)])


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("config", [SMALL, LEARNED], ids=["rotary", "learned"])
def test_the_map_holds_each_visible_token_in_its_place(encoder: ViTConfig, config: ViTDecoderConfig) -> None:
    """Blocks apart, a token comes out where its patch lies, and the mask token everywhere else."""
    backbone, decoder = built(encoder, config)
    first, _, hidden = views()
    seen = backbone.encode(first, hidden)
    decoder.blocks = torch.nn.ModuleList()
    got = decoder(seen).flatten(1, 2)
    assert seen.places is not None
    for image in range(2):
        for place in range(16):
            at = (seen.places[image] == place).nonzero()
            own = seen.x[image, seen.class_tokens + int(at)] if len(at) else None
            token = decoder.mask_token if own is None else decoder.embed(own)
            token = token if decoder.places is None else token + decoder.places[place]
            assert_close(f"patch {place}", got[image, place], decoder.norm(token))


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("config", [SMALL, LEARNED], ids=["rotary", "learned"])
def test_the_second_view_is_seen_and_reaches_every_parameter(encoder: ViTConfig, config: ViTDecoderConfig) -> None:
    backbone, decoder = built(encoder, config)
    first, second, hidden = views()
    seen = backbone.encode(first, hidden)
    drawn = decoder(seen, backbone.encode(second))
    assert drawn.shape == (2, 4, 4, 8)
    assert not torch.allclose(drawn, decoder(seen, backbone.encode(second + 1)))
    assert not torch.allclose(drawn, decoder(seen))
    drawn.square().sum().backward()
    missing = {name for name, p in [*decoder.named_parameters(), *backbone.named_parameters()] if p.grad is None}
    assert missing == set()


def test_without_cross_attention_the_map_is_of_one_view() -> None:
    backbone, decoder = built(ENCODER, dataclasses.replace(SMALL, cross=False))
    first, second, hidden = views()
    seen = backbone.encode(first, hidden)
    assert not any("cross" in name or "second" in name for name, _ in decoder.named_parameters())
    with pytest.raises(ValueError, match="the decoder has no cross-attention: build it with cross=True"):
        decoder(seen, backbone.encode(second))
    with_cross = SMALL.build(backbone).double()
    with_cross.load_state_dict(decoder.state_dict(), strict=False)
    assert_close("one view", with_cross(seen), decoder(seen))


def test_views_that_change_places_change_their_maps() -> None:
    backbone, decoder = built(ENCODER, SMALL)
    first, second, hidden = views()
    both, other = torch.cat((first, second)), torch.cat((second, first))
    flags = torch.cat((hidden, hidden))
    drawn = decoder(backbone.encode(both, flags), backbone.encode(other))
    swapped = decoder(backbone.encode(other, flags), backbone.encode(both))
    assert_close("swapped", swapped, drawn.roll(2, 0))


def test_moving_both_views_together_changes_nothing_with_rotary_positions() -> None:
    block = CrossBlock(SMALL, 0, ffn=torch.nn.Identity()).double()
    _, decoder = built(ENCODER, SMALL)
    x, memory = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    places = torch.tensor([[0, 1, 4, 5]])
    turns = [decoder._rotation(Tokens(x, None, (4, 4), 0), places + moved) for moved in (0, 6)]
    assert_close("moved", block(x, turns[1], memory, turns[1]), block(x, turns[0], memory, turns[0]))
    assert not torch.allclose(block(x, turns[1], memory, turns[0]), block(x, turns[0], memory, turns[0]))


def test_learned_positions_refuse_another_grid() -> None:
    backbone, decoder = built(ENCODER, LEARNED)
    with pytest.raises(ValueError, match=r"the image has \(2, 5\) patches, wanted \(4, 4\)"):
        decoder(backbone.encode(torch.randn(1, 3, 8, 20).double()))
    with pytest.raises(ValueError, match="depth is 0, wanted an integer >= 1"):
        ViTDecoderConfig(depth=0)


def test_recomputed_blocks_give_the_same_gradients_and_experts_learn() -> None:
    experts = ExpertsConfig(num_experts=2, blocks=((1,),), capacity=Dropless())
    config = dataclasses.replace(SMALL, experts=experts)
    backbone = ENCODER.build()
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        decoder = dataclasses.replace(config, checkpointed=checkpointed).build(backbone)
        torch.manual_seed(1)
        seen = backbone.encode(torch.randn(2, 3, 16, 16))
        (decoder(seen, seen).square().sum() + aux_loss(decoder)).backward()
        found.append(gradients(decoder))
        assert all(p.grad is not None for name, p in decoder.named_parameters() if name != "mask_token")
    for name, gradient in found[0].items():
        assert_close(name, found[1][name], gradient)


def test_the_count_of_a_decoder_is_that_of_its_layers() -> None:
    _, decoder = built(ENCODER, SMALL)
    own, cross, ffn = 4 * 16 * 64 + 2 * 256 * 8, 2 * 32 * 64 + 2 * 256 * 8, 16 * 2 * 8 * 32
    assert decoder.multiply_adds(4, 16) == 4 * 16 * 8 + 16 * 8 + 2 * (own + ffn + 2 * 16 * 8)
    assert decoder.multiply_adds(4, 16, 16) == 20 * 16 * 8 + 16 * 8 + 2 * (own + cross + ffn + 4 * 16 * 8)
