"""The spectrum mixer: its transform, its order of frequencies, its bands; the backbone's sizes, experts and costs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synchromesh.models.costs import costs
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.spectrum import (
    SpectrumMixer,
    SpectrumNet,
    SpectrumNetConfig,
    bands_of,
    cosines,
    spectrum_tiny,
    zigzag,
)
from synchromesh.moe.capacity import Dropless
from synchromesh.moe.layer import MoE
from synchromesh.moe.record import aux_loss
from synchromesh.testing.compare import assert_close
from synchromesh.testing.randomised import gradients, randomise

DOUBLE = torch.zeros((), dtype=torch.float64)
SMALL = SpectrumNetConfig(image_size=32, embed_dim=8, depths=(1, 2), bands=6, band_hidden=5, drop_path=0.0)
SIZES = [(1, 1), (1, 5), (4, 4), (3, 7), (8, 5)]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 56])
def test_the_transform_is_orthonormal(size: int) -> None:
    matrix = cosines(size, like=DOUBLE)
    assert float((matrix @ matrix.t() - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-14


@pytest.mark.parametrize("size", SIZES)
def test_the_transform_is_that_of_scipy(size: tuple[int, int]) -> None:
    x = torch.randn(*size, dtype=torch.float64)
    got = cosines(size[0], like=x) @ x @ cosines(size[1], like=x).t()
    assert_close("spectrum", got, torch.from_numpy(dctn(x.numpy(), norm="ortho")))


def by_walking(height: int, width: int) -> list[int]:
    """The order of JPEG, a step after the other."""
    row, column, up, order = 0, 0, True, []
    for _ in range(height * width):
        order.append(row * width + column)
        if up and column == width - 1:
            row, up = row + 1, False
        elif up and row == 0:
            column, up = column + 1, False
        elif up:
            row, column = row - 1, column + 1
        elif row == height - 1:
            column, up = column + 1, True
        elif column == 0:
            row, up = row + 1, True
        else:
            row, column = row + 1, column - 1
    return order


@pytest.mark.parametrize("size", [*SIZES, (7, 3), (5, 1), (14, 14)])
def test_the_zigzag_visits_each_place_once_as_jpeg_does(size: tuple[int, int]) -> None:
    order = zigzag(*size)
    assert sorted(order.tolist()) == list(range(size[0] * size[1]))
    assert order.tolist() == by_walking(*size)


def test_bands_are_even_runs_of_frequencies() -> None:
    assert bands_of(10, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert bands_of(3, 6).tolist() == [0, 2, 4]  # a band for each


def plain(mixer: SpectrumMixer) -> SpectrumMixer:
    """Both linear layers change nothing."""
    for layer in (mixer.enter, mixer.proj):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return mixer


@pytest.mark.parametrize("size", SIZES)
def test_equal_weights_of_bands_change_nothing(size: tuple[int, int]) -> None:
    mixer = plain(SpectrumMixer(3, bands=6, hidden=4).double())
    nn.init.zeros_(mixer.down.weight)
    nn.init.zeros_(mixer.down.bias)
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    assert float((mixer(x) - x).detach().abs().max()) < 1e-14


def by_definition(mixer: SpectrumMixer, x: Tensor) -> Tensor:
    """Each image and channel by itself, each frequency by itself."""
    x = mixer.enter(x)
    images = []
    for image in x:
        channels = []
        for channel in image.unbind(-1):
            height, width = channel.shape
            rows, columns = cosines(height, like=x), cosines(width, like=x)
            spectrum = rows @ channel @ columns.t()
            line = torch.stack([spectrum.flatten()[place] for place in by_walking(height, width)])
            band = [number * mixer.bands // len(line) for number in range(len(line))]
            own = [[value for value, b in zip(line, band, strict=True) if b == k] for k in range(mixer.bands)]
            means = torch.stack([torch.stack(values).mean() if values else x.new_zeros(()) for values in own])
            weights = mixer.down(F.gelu(mixer.up(mixer.norm(means)))).softmax(0) * mixer.bands
            flat: list[Tensor] = [x.new_zeros(())] * len(line)
            for number, place in enumerate(by_walking(height, width)):
                flat[place] = line[number] * weights[band[number]]
            channels.append(rows.t() @ torch.stack(flat).view(height, width) @ columns)
        images.append(torch.stack(channels, -1))
    return mixer.proj(torch.stack(images))


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (2, 2)])
def test_the_mixer_and_its_gradients_are_those_of_the_definition(size: tuple[int, int]) -> None:
    mixer = SpectrumMixer(3, bands=6, hidden=4).double()
    randomise(mixer)
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (mixer, lambda y: by_definition(mixer, y)):
        mixer.zero_grad()
        y = function(x)
        (own,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
        y.sin().sum().backward()
        found.append((y, own, gradients(mixer)))
    assert_close("mixed", found[0][0], found[1][0])
    assert_close("gradient", found[0][1], found[1][1])
    for name, gradient in found[1][2].items():
        assert_close(name, found[0][2][name], gradient)


def test_a_constant_map_excites_the_lowest_band_alone_and_energy_is_kept() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    rows, columns = cosines(5, like=x), cosines(7, like=x)
    assert float((rows @ x @ columns.t()).square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-13)
    flat = (rows @ torch.full_like(x, 3.0) @ columns.t()).flatten()[zigzag(5, 7)]
    assert float(flat[0]) == pytest.approx(3 * 35**0.5)
    assert float(flat[1:].abs().max()) < 1e-13


@pytest.mark.parametrize("size", [(32, 32), (17, 30)])
def test_any_size_gives_features_and_none_of_no_image(size: tuple[int, int]) -> None:
    backbone = SpectrumNet(dataclasses.replace(SMALL, layer_scale=0.1)).eval()
    for count in (2, 0):
        found = backbone(torch.randn(count, 3, *size))
        for part, width, stride in zip(found.maps, backbone.widths, backbone.strides, strict=True):
            assert part.shape == (count, width, -(-size[0] // stride), -(-size[1] // stride))


def test_recomputed_blocks_give_the_same_gradients_and_a_mask_token_hides() -> None:
    found, x = [], torch.randn(2, 3, 32, 32)
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    hidden[:, :8] = True
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = dataclasses.replace(SMALL.hiding(), checkpointed=checkpointed).build()
        changed = x.clone()
        changed[:, :, :4] += 1
        assert torch.equal(model(x, hidden).pooled, model(changed, hidden).pooled)
        model(x, hidden).pooled.square().sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_close(name, found[1][name], gradient)


def test_experts_stand_in_the_chosen_blocks_and_learn() -> None:
    experts = ExpertsConfig(num_experts=4, blocks=((), (1,)), capacity=Dropless())
    model = Classifier(dataclasses.replace(SMALL, experts=experts, layer_scale=0.5).build(), 5)
    assert [isinstance(place.ffn, MoE) for place in model.backbone.feed_forwards()] == [False, False, True]
    (F.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([1, 4])) + aux_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="bands is 0, wanted an integer >= 1"):
        dataclasses.replace(SMALL, bands=0)
    with pytest.raises(ValueError, match="wanted a rate"):
        dataclasses.replace(SMALL, drop_path=1.0)


def test_the_count_is_what_torch_counts_as_the_model_runs() -> None:
    with torch.device("meta"):
        model = spectrum_tiny().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 224, 224))
    assert costs(model).multiply_adds == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
