import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synchromesh.errors import InputError
from synchromesh.recipes.catalog import RECIPES
from synchromesh.tasks.viewed import seen_by_pixels, seen_whole
from synchromesh.training.task import Run
from synchromesh.training.views import Views

VIEWS = [Views(), Views(flip=True), Views(scales=(0.5, 1.0)), Views(flip=True, scales=(1.0, 1.5))]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


class Pooled(nn.Module):
    """Logits of an image that its mirror image has not."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 3, 3, padding=1).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.filters(images).relu().mean((2, 3))


class Pixels(nn.Module):
    """Logits of pixels, by what is around each."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(1, 3, 3, padding=1).double()
        self.seen: list[list[list[int]]] = []

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        self.seen.append(sizes.tolist())
        assert all(
            float(x[:, h:].abs().sum() + x[:, :, w:].abs().sum()) == 0 for x, (h, w) in zip(images, sizes, strict=True)
        )
        return self.filters(images)


@pytest.mark.parametrize("views", VIEWS)
def test_the_probabilities_of_an_image_are_the_mean_over_its_views(views: Views) -> None:
    model, images = Pooled(), torch.randn(2, 1, 8, 6).double()
    found = seen_whole(Run(model, model), views)(images).softmax(1)
    wanted = []
    for scale in views.scales:
        own = resized(images, (round(8 * scale), round(6 * scale)))
        wanted += [model(own).softmax(1), *([model(own.flip(3)).softmax(1)] if views.flip else [])]
    torch.testing.assert_close(found.double(), torch.stack(wanted).mean(0), rtol=1e-5, atol=1e-6)
    assert seen_whole(Run(model, model), views)(images[:0]).shape == (0, 3)


@pytest.mark.parametrize("views", VIEWS)
def test_the_probabilities_of_pixels_are_the_mean_over_views_without_padding(views: Views) -> None:
    model, sizes = Pixels(), torch.tensor([[8, 6], [4, 10]])
    images = torch.zeros(2, 1, 8, 10).double()
    for number, (h, w) in enumerate(sizes.tolist()):
        images[number, :, :h, :w] = torch.randn(1, h, w)
    found = seen_by_pixels(Run(model, model), views)(images, sizes).softmax(1)
    assert found.shape == (2, 3, 8, 10)
    for number, (h, w) in enumerate(sizes.tolist()):
        own, wanted = images[number : number + 1, :, :h, :w], []
        for scale in views.scales:
            size = round(h * scale), round(w * scale)
            for flip in (False, True) if views.flip else (False,):
                x = resized(own, size).flip(3) if flip else resized(own, size)
                # The canvas around it is as large as in the batch: what lies at the edge sees zeros there.
                share = resized(model.filters(x).float().softmax(1), (h, w))
                wanted.append(share.flip(3) if flip else share)
        torch.testing.assert_close(found[number, :, :h, :w], torch.stack(wanted).mean(0)[0], rtol=1e-4, atol=1e-5)
    assert len(model.seen) == len(list(views))
    assert seen_by_pixels(Run(model, model), views)(images[:0], sizes[:0]).shape == (0, 3, 8, 10)


def test_logits_of_views_are_finite_where_a_probability_is_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e4, 0.0], [-1e4, 0.0]]))
    run = Run(model, lambda images: model(images[:, 0, 0, :2]))
    assert np.isfinite(seen_whole(run, Views(flip=True))(torch.ones(1, 1, 1, 2)).detach().numpy()).all()


def test_a_task_whose_answers_have_no_mean_says_so() -> None:
    with pytest.raises(InputError, match="Detection has no answers that could be averaged over views"):
        RECIPES["detect_demo"]().task.viewed(Run(nn.Identity(), nn.Identity()), Views(flip=True))


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0)])
def test_scales_that_leave_nothing_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"tta\.scales are"):
        Views(scales=scales)
