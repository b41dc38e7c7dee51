import dataclasses

import numpy as np
import pytest
import torch

from synchromesh.data.patch_mixing import random_sources
from synchromesh.models.attention import SelfAttention
from synchromesh.models.heads.mixed_ae import MixedAutoencoder, same_source
from synchromesh.models.homologous_attention import HomologousAttention
from synchromesh.models.vit import Pooling, Positions, Tokens, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig

VIT = ViTConfig(
    image_size=16, patch_size=4, width=8, depth=3, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY
)
DECODER = ViTDecoderConfig(width=8, depth=1, num_heads=2, cross=False)


def built(config: ViTConfig = VIT, ratio: float = 0.25) -> MixedAutoencoder:
    torch.manual_seed(0)
    model = MixedAutoencoder(config.build(), DECODER, 3, ratio=ratio, projection=5).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3).add_(1.0 if p.ndim == 1 else 0.0)
    return model


def groups(count: int, mixtures: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    drawn = [torch.from_numpy(random_sources(4, 16, rng)[:mixtures]) for _ in range(count)]
    return torch.randn(count, 4, 3, 16, 16).double(), torch.stack(drawn)


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLASS_TOKEN])
def test_each_picture_is_drawn_from_its_own_part_of_a_mixture_as_one_by_one(pooling: Pooling) -> None:
    model = built(dataclasses.replace(VIT, pooling=pooling))
    images, sources = groups(2, 3)
    found = model(images, sources)
    assert found.drawn.shape == (2, 3, 4, 16, 48)
    extra = model.backbone.config.class_tokens
    for b in range(2):
        for m in range(3):
            shown = torch.empty(1, 3, 16, 16).double()
            for at, source in enumerate(sources[b, m].tolist()):
                rows, columns = (slice(4 * n, 4 * n + 4) for n in divmod(at, 4))
                shown[0, :, rows, columns] = images[b, source, :, rows, columns]
            seen = model.backbone.encode(shown)
            torch.testing.assert_close(found.tokens[b, m], seen.x[0, extra:])
            torch.testing.assert_close(found.projected[b, m], model.projector(seen.x[0, extra:]))
            for i in range(4):
                places = [at for at in range(16) if sources[b, m, at] == i]
                kept = torch.cat((seen.x[:, :extra], seen.x[:, [extra + at for at in places]]), 1)
                own = model.decoder(Tokens(kept, torch.tensor([places]), (4, 4), extra))
                torch.testing.assert_close(found.drawn[b, m, i], model.pixels(own).flatten(1, 2)[0])


def test_a_rank_without_groups_gets_nothing_and_reaches_all_parameters() -> None:
    model, (images, sources) = built(), groups(2, 1)
    found = model(images[:0], sources[:0])
    assert found.drawn.shape == (0, 1, 4, 16, 48)
    (found.drawn.sum() + found.projected.sum()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters())


def test_all_blocks_but_the_first_attend_homologously_and_weights_have_the_names_of_a_plain_vit() -> None:
    model = built()
    kinds = [type(block.attention) for block in model.backbone.blocks]
    assert kinds == [SelfAttention, HomologousAttention, HomologousAttention]
    plain = VIT.build()
    assert plain.load_state_dict(model.backbone.state_dict()).missing_keys == []


def test_with_a_ratio_of_1_the_encoder_is_the_plain_one() -> None:
    images, sources = groups(1, 1)
    some, whole = built(ratio=0.25), built(ratio=1.0)
    plain = VIT.build().double().eval()
    plain.load_state_dict(whole.backbone.state_dict())
    x = images[0]
    assert torch.equal(whole.backbone(x).last, plain(x).last)
    assert not torch.allclose(some(images, sources).tokens, whole(images, sources).tokens)


def test_places_of_one_source_are_told_from_others() -> None:
    outer, inner = [True, False, True], [False, True, False]
    assert same_source(torch.tensor([[0, 1, 0]])).tolist() == [[outer, inner, outer]]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="cross=False"):
        MixedAutoencoder(VIT.build(), dataclasses.replace(DECODER, cross=True), 3, ratio=1.0, projection=4)
    uneven = torch.zeros(1, 1, 16, dtype=torch.long)
    with pytest.raises(ValueError, match="as many places"):
        built()(groups(1, 1)[0], uneven)
