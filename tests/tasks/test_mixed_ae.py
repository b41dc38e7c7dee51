import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.images import Preprocess
from synchromesh.models.heads.mixed_ae import Restored
from synchromesh.models.homologous_attention import HomologousAttention
from synchromesh.models.patches import normalized_patches, patches_of
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.tasks.mixed_ae import Groups, MixedAE
from synchromesh.tasks.simmim import CropData
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
VIT = ViTConfig(patch_size=4, width=8, depth=2, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY)
TASK = MixedAE(
    CropData(preprocess=SIZE, train=6, test=4),
    ViTDecoderConfig(width=8, depth=1, num_heads=2, cross=False),
    patch=4,
    mixtures=2,
    projection=5,
)


def built(task: MixedAE = TASK) -> Run:
    model = task.build(task.sized(VIT), {}).eval()
    return Run(model, model)


def batch_of(count: int) -> Groups:
    test = TASK.splits(seed=0).test
    return TASK.prepare([test.read(i) for i in range(count)], {}, CPU, None)


@torch.no_grad()
def test_the_losses_are_their_definitions_by_loops() -> None:
    run, batch = built(), batch_of(2)
    found = run(batch.images, batch.sources)
    restored, contrast = 0.0, 0.0
    for b in range(2):
        target = normalized_patches(patches_of(batch.images[b], 4))
        for m in range(2):
            own = batch.sources[b, m].tolist()
            z = torch.nn.functional.normalize(found.projected[b, m], dim=1)
            for at in range(16):
                for i in range(4):
                    if own[at] != i:
                        restored += (found.drawn[b, m, i, at] - target[i, at]).square().mean().item()
                below = sum(math.exp(z[at] @ z[k] / 0.25) for k in range(16) if k != at)
                positive = [j for j in range(16) if j != at and own[j] == own[at]]
                contrast -= sum(math.log(math.exp(z[at] @ z[j] / 0.25) / below) for j in positive) / 3
    terms = TASK.loss(run, batch)
    assert terms["restored_mse"].total.item() == pytest.approx(restored, rel=1e-4)
    assert terms["contrast"].total.item() == pytest.approx(contrast, rel=1e-4)
    assert (terms["restored_mse"].weight, terms["contrast"].weight) == (1.0, 0.1)
    assert TASK.counts(batch) == {"restored_mse": 2 * 2 * 16 * 3, "contrast": 2 * 2 * 16}


@torch.no_grad()
def test_parts_of_a_batch_add_up_to_it() -> None:
    run, batch = built(), batch_of(4)
    parts = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)]
    for name, term in TASK.loss(run, batch).items():
        total = sum(TASK.loss(run, one)[name].total.item() for one in parts)
        assert total == pytest.approx(term.total.item(), rel=1e-5)


def test_a_model_that_restores_and_recognises_all_scores_so() -> None:
    batch, model = batch_of(3), built().model
    target = normalized_patches(patches_of(batch.images.flatten(0, 1), 4)).unflatten(0, (3, 4))
    tokens = torch.nn.functional.one_hot(batch.sources, 4).float() + 0.01 * torch.rand(3, 2, 16, 4)
    known = Restored(target[:, None].expand(-1, 2, -1, -1, -1), tokens, tokens)
    scorer = TASK.scorer({})
    merits = scorer.add(Run(model, lambda *_: known), batch)
    numbers = scorer.scores([scorer.state()]).numbers
    assert numbers["restored_mse"] == pytest.approx(0, abs=1e-10)
    assert merits == pytest.approx([0.0] * 3, abs=1e-10)
    assert numbers["homologous"] == 1
    assert numbers["homologous_chance"] == pytest.approx(3 / 15)
    assert numbers["flat_mse"] == pytest.approx(1, abs=0.1)


def test_naive_mixing_has_plain_attention_and_no_contrast() -> None:
    naive = dataclasses.replace(TASK, keys=1.0, contrast=0.0)
    kinds = [
        [module.ratio for module in built(task).model.modules() if isinstance(module, HomologousAttention)]
        for task in (TASK, naive)
    ]
    assert kinds == [[0.25], [1.0]]
    run, batch = built(naive), batch_of(1)
    terms = naive.loss(run, batch)
    assert terms["contrast"].weight == 0
    terms["restored_mse"].total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in run.model.parameters()), "what ranks wait for"


def test_a_group_is_that_of_its_number_or_of_what_is_drawn() -> None:
    splits = TASK.splits(seed=0)
    one, two = splits.test.read(1), splits.test.read(1)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.sources, two.sources)
    assert one.images.shape == (4, 3, 16, 16)
    assert one.sources.shape == (2, 16)
    new, newer = (splits.train.read(1, lambda seed=seed: np.random.default_rng(seed)) for seed in (0, 1))
    assert not torch.equal(new.images, newer.images)
    assert not torch.equal(new.sources, newer.sources)


def test_a_picture_of_a_file_is_drawn_and_said_with_its_own_turns(photo, tmp_path: Path) -> None:
    group = TASK.open(photo(tmp_path / "one.jpg", size=(50, 20)))
    assert torch.equal(group.images[1], group.images[0].rot90(1, (1, 2)))
    run = built()
    (answer,) = TASK.predict(run, TASK.prepare([group], {}, CPU, None), {}, Ask())
    assert answer.said["restored_mse"] > 0
    assert set(TASK.cells(answer)) == {"error of restored patches", "nearest patch of the same picture"}
    assert TASK.draw(group, answer)[:4] == b"\x89PNG"
    for i in range(4):
        own = (group.sources[0] == i).view(1, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
        assert ((answer.seen[i].int() - group.images[i].int()).abs() * own).max() <= 1, "what is seen is shown as it is"
    assert TASK.predict(run, TASK.prepare([], {}, CPU, None), {}, Ask()) == []


def test_a_folder_is_learnt_from_or_scored_on_as_a_whole(photo, tmp_path: Path) -> None:
    for number in range(5):
        photo(tmp_path / f"{number}.png", size=(30, 40), seed=number)
    splits = TASK.reading(tmp_path).splits(seed=0)
    assert (len(splits.train.photographs), len(splits.test.photographs)) == (4, 1)
    assert len(TASK.scored_on(tmp_path, {}).photographs) == 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group": 1}, "group 1"),
        ({"mixtures": 5}, "mixtures 5"),
        ({"temperature": 0.0}, r"temperature 0\.0"),
        ({"keys": 1.5}, r"keys 1\.5"),
        ({"group": 3}, "whose number 3 divides"),
        ({"patch": 5}, "patches of 5"),
    ],
)
def test_settings_out_of_range_are_refused(changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TASK, **changes)


def test_a_backbone_of_other_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="mixed patches have 8 pixels, those of the backbone 4"):
        built(dataclasses.replace(TASK, patch=8))
