import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.images import Preprocess
from synchromesh.models.features import BackboneConfig
from synchromesh.models.patches import normalized_patches, patches_of
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.tasks.croco import CroCo, HiddenPair, HiddenPairs
from synchromesh.tasks.view_pairs import PairData
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
VIT = ViTConfig(patch_size=4, width=8, depth=2, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY)
TASK = CroCo(
    PairData(preprocess=SIZE, train=6, test=4), ViTDecoderConfig(width=8, depth=1, num_heads=2), patch=4, ratio=0.75
)


def built(task: CroCo = TASK, backbone: BackboneConfig = VIT) -> Run:
    model = task.build(task.sized(backbone), {}).eval()
    return Run(model, model)


def batch_of(count: int) -> HiddenPairs:
    test = TASK.splits(seed=0).test
    return TASK.prepare([test.read(i) for i in range(count)], {}, CPU, None)


def test_as_many_patches_of_each_first_view_are_hidden_and_other_ones_in_each() -> None:
    batch = batch_of(4)
    assert batch.hidden.shape == (4, 16)
    assert batch.hidden.sum(1).tolist() == [12] * 4
    assert len({tuple(row) for row in batch.hidden.tolist()}) == 4
    assert TASK.counts(batch) == {"hidden_mse": 48}


def test_the_loss_is_the_mean_square_of_hidden_normalised_patches_and_of_nothing_else() -> None:
    run, batch = built(), batch_of(3)
    drawn = run(batch.first, batch.second, batch.hidden)
    target = normalized_patches(patches_of(batch.first, 4))
    wanted = sum(
        (drawn[b, at] - target[b, at]).square().mean() for b in range(3) for at in range(16) if batch.hidden[b, at]
    )
    got = TASK.loss(run, batch)["hidden_mse"].total
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    still = Run(run.model, lambda *_: drawn.detach())
    seen = (~batch.hidden).view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = dataclasses.replace(batch, first=torch.where(seen, torch.randn_like(batch.first), batch.first))
    assert TASK.loss(still, other)["hidden_mse"].total.item() == TASK.loss(still, batch)["hidden_mse"].total.item()


@torch.no_grad()
def test_parts_of_a_batch_add_up_to_it() -> None:
    run, batch = built(), batch_of(4)
    parts = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)]
    total = sum(TASK.loss(run, one)["hidden_mse"].total.item() for one in parts)
    assert total == pytest.approx(TASK.loss(run, batch)["hidden_mse"].total.item(), rel=1e-5)


@torch.no_grad()
def test_a_model_that_copies_the_second_view_is_told_from_one_that_gets_a_wrong_one_or_none() -> None:
    model, batch = built().model, batch_of(4)
    same = dataclasses.replace(batch, second=batch.first)

    def copied(first, second, hidden):
        seen = torch.zeros_like(first) if second is None else second
        return normalized_patches(patches_of(seen, 4))

    scorer = TASK.scorer({})
    merits = scorer.add(Run(model, copied), same)
    numbers = scorer.scores([scorer.state()]).numbers
    assert numbers["hidden_mse"] == pytest.approx(0, abs=1e-10)
    assert merits == pytest.approx([0.0] * 4, abs=1e-10)
    assert numbers["wrong_view_mse"] > 1
    assert numbers["no_view_mse"] == numbers["flat_mse"] == pytest.approx(1, abs=0.1)


def test_a_picture_of_a_file_is_drawn_and_said(photo, tmp_path: Path) -> None:
    sample = TASK.open(photo(tmp_path / "one.jpg", size=(50, 20)))
    assert torch.equal(sample.hidden, TASK.open(tmp_path / "one.jpg").hidden), "the same patches every time"
    run = built()
    (answer,) = TASK.predict(run, TASK.prepare([sample], {}, CPU, None), {}, Ask())
    assert answer.said["hidden"] == 0.75
    assert TASK.cells(answer)["hidden"] == "75%"
    assert TASK.draw(sample, answer)[:4] == b"\x89PNG"
    seen = (~sample.hidden).view(1, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    difference = (answer.seen.int() - sample.first.int()).abs() * seen
    assert difference.max() <= 1, "visible patches are shown as they are"
    assert TASK.predict(run, TASK.prepare([], {}, CPU, None), {}, Ask()) == []


def test_pairs_to_learn_from_are_new_ones_for_each_draw() -> None:
    train = TASK.splits(seed=0).train
    one, same, other = (train.read(0, lambda seed=seed: np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert isinstance(one, HiddenPair)
    assert torch.equal(one.first, same.first)
    assert torch.equal(one.hidden, same.hidden)
    assert not torch.equal(one.first, other.first)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"patch": 0}, "patch is 0"),
        ({"ratio": 1.0}, r"ratio 1\.0"),
        ({"ratio": 0.999}, r"at least one of \d+ patches to be seen"),
        ({"patch": 5}, "16 pixels do not consist of patches"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TASK, **changes)


def test_a_backbone_of_other_patches_or_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden patches have 8 pixels, those of the backbone 4"):
        built(dataclasses.replace(TASK, patch=8))
    with pytest.raises(ValueError, match="wanted a ViTConfig"):
        built(TASK, SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=2, window_size=4))
