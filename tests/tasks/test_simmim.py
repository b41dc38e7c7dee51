import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Swinv2Config as TheirConfig
from transformers import Swinv2ForMaskedImageModeling

from synchromesh.compat.huggingface.swin.weights import from_transformers
from synchromesh.data.hiding import filled_bilinearly
from synchromesh.data.images import Preprocess
from synchromesh.data.local_norm import surroundings
from synchromesh.data.photographs import PhotographFolder
from synchromesh.models.heads.pixels import PixelDecoder
from synchromesh.models.mixtures import ExpertsConfig
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.vit import ViTConfig
from synchromesh.moe.capacity import Dropless
from synchromesh.tasks.simmim import Crop, CropData, Hidden, SimMIM, loads_apart
from synchromesh.testing.compare import assert_close
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
TINY = SwinV2Config(
    image_size=16, embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=2, window_size=4, drop_path=0.0
)
MIXED = dataclasses.replace(
    TINY, experts=ExpertsConfig(num_experts=4, blocks=((), (0,)), capacity=Dropless(), dropout=0.0)
)
TASK = SimMIM(data=CropData(preprocess=SIZE, train=6, test=4), cell=4)


def task(folder: Path, photo, **changes) -> SimMIM:
    for number in range(5):
        photo(folder / f"{number}.png", size=(30, 40), seed=number)
    return dataclasses.replace(TASK.reading(folder), **changes)


def built(own: SimMIM, backbone: SwinV2Config = TINY) -> Run:
    model = own.build(own.sized(backbone), {}).eval()
    return Run(model, model)


def batch_of(count: int) -> Hidden:
    rng = np.random.default_rng(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    crops = [Crop(image, TASK.hidden_of(image, rng)) for image in images]
    return TASK.prepare(crops, {}, CPU, None)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every parameter a value that matters, biases, norms and the mask token too."""
    for p in model.parameters():
        p.normal_(std=0.2).add_(1.0 if p.ndim == 1 else 0.0)


def test_loss_and_all_gradients_equal_transformers_in_float64() -> None:
    config = TheirConfig(
        image_size=16, patch_size=2, num_channels=3, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4,
        drop_path_rate=0.0, encoder_stride=4,
    )  # fmt: skip
    reference = Swinv2ForMaskedImageModeling(config).double()
    randomise(reference)
    run = built(TASK)
    run.model.double().load_state_dict(from_transformers(reference.state_dict()))
    batch = batch_of(3)
    batch = Hidden(batch.images.double(), batch.hidden)

    patches = batch.hidden[:, ::2, ::2].flatten(1)
    wanted = reference(batch.images, bool_masked_pos=patches).loss
    pixels = batch.hidden.sum()
    wanted = wanted * float(pixels + 1e-5) / float(pixels)  # theirs adds that to what it divides by
    got = TASK.loss(run, batch)["masked_l1"].total / TASK.counts(batch)["masked_l1"]
    assert_close("loss", got, wanted)
    wanted.backward()
    got.backward()
    theirs = from_transformers({name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
    ours = {name: p.grad for name, p in run.model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad is not None
        assert_close(f"gradient of {name}", grad, theirs[name])


def test_the_loss_knows_nothing_of_visible_pixels_of_the_target() -> None:
    run, batch = built(TASK), batch_of(3)
    drawn = run(batch.images, batch.hidden).detach()
    still = Run(run.model, lambda *_: drawn)
    other = Hidden(torch.where(batch.hidden[:, None], batch.images, torch.randn_like(batch.images)), batch.hidden)
    assert TASK.loss(still, batch)["masked_l1"].total == TASK.loss(still, other)["masked_l1"].total
    more = Hidden(batch.images + 1, batch.hidden)
    assert TASK.loss(still, batch)["masked_l1"].total != TASK.loss(still, more)["masked_l1"].total


@torch.no_grad()
def test_counts_and_losses_of_the_parts_of_a_batch_add_up_to_those_of_all() -> None:
    run, batch = built(TASK), batch_of(5)
    parts = [batch.part(0, 2), batch.part(2, 2), batch.part(2, 5)]
    assert sum(TASK.counts(one)["masked_l1"] for one in parts) == TASK.counts(batch)["masked_l1"]
    total = sum(float(TASK.loss(run, one)["masked_l1"].total) for one in parts)
    assert total == pytest.approx(float(TASK.loss(run, batch)["masked_l1"].total), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 3])
def test_the_scores_of_ranks_are_those_of_all_crops(photo, tmp_path, ranks) -> None:
    own = task(tmp_path, photo)
    run, test = built(own, MIXED), own.splits(seed=0).test
    crops = [test.read(i) for i in range(len(test))]
    whole = own.scorer({})
    merits = whole.add(run, own.prepare(crops, {}, CPU, None))
    scorers = [own.scorer({}) for _ in range(ranks)]
    for rank, scorer in enumerate(scorers):  # the last of three has no crop
        scorer.add(run, own.prepare(crops[rank * 2 : rank * 2 + 2], {}, CPU, None))
    if ranks == 1:
        scorers[0].add(run, own.prepare(crops[2:], {}, CPU, None))
    got, wanted = (
        scorers[0].scores([one.state() for one in scorers]),
        whole.scores([whole.state()]),
    )
    assert got.numbers == pytest.approx(wanted.numbers, rel=1e-6)
    assert got.details == wanted.details
    mean = np.mean([-merit for merit in merits])  # every crop hides as many pixels
    assert wanted.numbers["masked_l1"] == pytest.approx(mean, rel=1e-5)


def test_a_model_that_draws_what_is_there_scores_zero() -> None:
    batch, scorer = batch_of(2), TASK.scorer({})
    model = built(TASK).model
    scorer.add(Run(model, lambda images, hidden: images), batch)
    assert scorer.scores([scorer.state()]).numbers["masked_l1"] == 0


def test_normalised_targets_are_learnt_drawn_back_and_scored_beside_normalised_fillings() -> None:
    own, batch = dataclasses.replace(TASK, window=5), batch_of(3)
    target = own.target(batch.images)
    run = Run(built(own).model, lambda images, hidden: own.target(images))
    assert float(own.loss(run, batch)["masked_l1"].total) == 0
    assert float(TASK.loss(run, batch)["masked_l1"].total) > 0
    torch.testing.assert_close(own.seen_as(target, batch.images), batch.images, rtol=0, atol=1e-4)
    scorer = own.scorer({})
    scorer.add(run, batch)
    numbers = scorer.scores([scorer.state()]).numbers
    assert numbers["masked_l1"] == 0
    filled = [filled_bilinearly(i.numpy(), h.numpy()) for i, h in zip(batch.images, batch.hidden, strict=True)]
    units = surroundings(batch.images, 5)
    wrong = (units.leave(torch.from_numpy(np.stack(filled))) - target).abs() * batch.hidden[:, None]
    assert numbers["bilinear_l1"] == pytest.approx(float(wrong.sum() / batch.hidden.sum() / 3), rel=1e-5)


def test_the_gap_is_one_where_hidden_and_visible_tokens_share_no_expert_and_zero_where_they_go_alike() -> None:
    apart = _scores_with({"a": torch.tensor([[4, 4, 0, 0], [0, 0, 3, 1]])})
    alike = _scores_with({"a": torch.tensor([[4, 4, 0, 0], [2, 2, 0, 0]])})
    half = _scores_with({"a": torch.tensor([[1, 0], [0, 1]]), "b": torch.tensor([[1, 1], [1, 1]])})
    assert [one.numbers["routing_gap"] for one in (apart, alike, half)] == [1.0, 0.0, 0.5]


def test_experts_loads_of_hidden_and_visible_tokens_are_told_apart() -> None:
    run, batch, loads = built(TASK, MIXED), batch_of(3), {}
    seen = []
    layer = run.model.backbone.stages[1].blocks[0].ffn
    layer.router.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.expert_ids))
    with loads_apart(run.model, batch.hidden, loads):
        run(batch.images, batch.hidden)
    run(batch.images, batch.hidden)  # outside of the block nothing is counted
    (found,) = loads.values()
    flags = batch.hidden[:, ::4, ::4].flatten()  # its map has a position for each of these cells
    for row, of_hidden in enumerate((True, False)):
        assert found[row].tolist() == seen[0][flags == of_hidden].flatten().bincount(minlength=4).tolist()
    assert [bars.labels for bars in TASK.panels(_scores_with(loads))] == [("0", "1", "2", "3")]


def test_a_class_token_counts_as_visible() -> None:
    experts = ExpertsConfig(num_experts=4, blocks=((0,),), capacity=Dropless())
    config = ViTConfig(image_size=32, patch_size=8, width=8, depth=1, num_heads=2, mask_token=True, experts=experts)
    model, hidden = PixelDecoder(config.build(), 3), torch.zeros(2, 32, 32, dtype=torch.bool)
    hidden[0, :8], hidden[1, :, :16] = True, True  # 4 and 8 patches of 16
    loads: dict[str, torch.Tensor] = {}
    with loads_apart(model, hidden, loads):
        model(torch.randn(2, 3, 32, 32), hidden)
    (found,) = loads.values()
    assert found.sum(1).tolist() == [12, 2 * 17 - 12]


def _scores_with(loads):
    scorer = TASK.scorer({})
    scorer._loads = loads
    return scorer.scores([scorer.state()])


def test_crops_to_score_on_are_always_the_same_in_their_own_colours_and_those_to_learn_from_new(
    photo, tmp_path
) -> None:
    splits = task(tmp_path, photo).splits(seed=0)
    one, two = splits.test.read(1), splits.test.read(1)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.hidden, two.hidden)
    rng = np.random.default_rng(0)
    new, newer = (splits.train.read(1, lambda: rng) for _ in range(2))
    assert not torch.equal(new.image, newer.image)
    plain = dataclasses.replace(TASK.data, colors=None, flip=0.0, source=PhotographFolder(tmp_path))
    unchanged = dataclasses.replace(TASK, data=plain).splits(seed=0)
    same = [unchanged.train.read(1, lambda: np.random.default_rng(3)).image for _ in range(2)]
    assert torch.equal(*same)


def test_a_picture_of_a_file_is_drawn_and_said(photo, tmp_path) -> None:
    own = task(tmp_path, photo)
    run = built(own)
    crop = own.open(photo(tmp_path / "one.jpg", size=(50, 20)))
    assert torch.equal(crop.hidden, own.open(tmp_path / "one.jpg").hidden), "the same cells every time"
    (answer,) = own.predict(run, own.prepare([crop], {}, CPU, None), {}, Ask())
    assert answer.said["hidden"] == 0.625  # 10 of 16 cells
    assert answer.said["masked_l1"] > 0
    assert own.draw(crop, answer)[:4] == b"\x89PNG"
    assert own.cells(answer)["hidden"] == "62%"
    assert own.predict(run, own.prepare([], {}, CPU, None), {}, Ask()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"cell": 0}, "cell is 0"), ({"ratio": 0.0}, "ratio 0.0"), ({"ratio": 1.5}, "ratio 1.5"), ({"window": 4}, "is 4")],
)
def test_settings_out_of_range_are_refused(changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TASK, **changes)


def test_cells_that_are_no_whole_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        built(dataclasses.replace(TASK, cell=3))
