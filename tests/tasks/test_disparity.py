import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.images import Preprocess
from synchromesh.errors import InputError
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.tasks.croco import CroCo
from synchromesh.tasks.disparity import BINS, Disparity, StereoPairs, best_constant_error
from synchromesh.tasks.view_pairs import PairData
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
VIT = ViTConfig(patch_size=4, width=8, depth=2, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY)
DECODER = ViTDecoderConfig(width=8, depth=1, num_heads=2)
TASK = Disparity(PairData(also=None, preprocess=SIZE, train=6, test=4), DECODER)


def built(task: Disparity = TASK) -> Run:
    model = task.build(task.sized(VIT), {}).eval()
    return Run(model, model)


def batch_of(count: int) -> StereoPairs:
    test = TASK.splits(seed=0).test
    return TASK.prepare([test.read(i) for i in range(count)], {}, CPU, None)


def test_the_loss_is_a_sum_over_pixels_of_known_disparity_and_parts_add_up() -> None:
    run, batch = built(), batch_of(3)
    known = batch.disparity > 0
    assert 0 < known.sum() < known.numel()
    assert TASK.counts(batch) == {"laplacian": int(known.sum())}
    found = run(batch.first, batch.second)
    TASK.loss(run, batch)["laplacian"].total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in run.model.parameters()), "what ranks wait for"
    error = (found[:, 0] - batch.disparity).abs()[known]
    wanted = (error / found[:, 1][known].exp() + found[:, 1][known]).sum()
    assert TASK.loss(run, batch)["laplacian"].total.item() == pytest.approx(wanted.item(), rel=1e-5)
    parts = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 3)]
    total = sum(TASK.loss(run, one)["laplacian"].total.item() for one in parts)
    assert total == pytest.approx(wanted.item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_scores_of_ranks_are_means_over_all_pixels_beside_the_best_constant(ranks: int) -> None:
    run, batch = built(), batch_of(4)
    scorers = [TASK.scorer({}) for _ in range(ranks)]
    cuts = [0, 4] if ranks == 1 else [0, 1, 4]
    merits = [scorer.add(run, batch.part(*cuts[i : i + 2])) for i, scorer in enumerate(scorers)]
    numbers = scorers[0].scores([one.state() for one in scorers]).numbers
    known = batch.disparity > 0
    for name, other in (("epe", batch.second), ("wrong_view_epe", batch.wrong)):
        error = (run(batch.first, other)[:, 0] - batch.disparity)[known].abs().mean()
        assert numbers[name] == pytest.approx(error.item(), rel=1e-5)
    values = batch.disparity[known].double()
    constants = torch.linspace(0, 16, 1601).double()
    least = (values[:, None] - constants).abs().mean(0).min()
    assert numbers["constant_epe"] == pytest.approx(least.item(), abs=1 / BINS)
    assert sum(len(own) for own in merits) == 4


def test_the_best_constant_of_one_value_is_off_by_nothing_and_of_two_by_half_their_distance() -> None:
    bins = np.zeros(4 * BINS, dtype=np.int64)
    bins[BINS] = 5
    assert best_constant_error(bins) == 0
    bins[3 * BINS] = 5
    assert best_constant_error(bins) == pytest.approx(1.0)


@torch.no_grad()
def test_pairs_without_any_known_disparity_are_refused_when_scored(photo, tmp_path: Path) -> None:
    for number in range(3):
        photo(tmp_path / f"{number}.png", size=(30, 40), seed=number)
    own = dataclasses.replace(TASK, data=TASK.data.of_folder(tmp_path))
    batch, scorer = own.prepare([own.splits(seed=0).test.read(0)], {}, CPU, None), own.scorer({})
    run = built(own)
    scorer.add(run, batch)
    with pytest.raises(InputError, match="known disparity"):
        scorer.scores([scorer.state()])
    assert own.predict(run, batch, {}, Ask())[0].said["epe"] is None


@torch.no_grad()
def test_a_pair_is_drawn_with_its_truth_and_a_file_without() -> None:
    sample = TASK.splits(seed=0).test.read(0)
    run = built()
    (answer,) = TASK.predict(run, TASK.prepare([sample], {}, CPU, None), {}, Ask())
    assert answer.said["epe"] > 0
    assert set(TASK.cells(answer)) == {"median disparity, pixels", "end-point error, pixels"}
    with_truth = TASK.draw(sample, answer)
    alone = dataclasses.replace(sample.pair, disparity=torch.zeros(16, 16))
    assert with_truth[:4] == TASK.draw(dataclasses.replace(sample, pair=alone), answer)[:4] == b"\x89PNG"
    assert TASK.predict(run, TASK.prepare([], {}, CPU, None), {}, Ask()) == []


def test_encoder_and_decoder_have_the_names_of_those_that_croco_learnt() -> None:
    pretext = CroCo(TASK.data, DECODER, patch=4)
    learnt = pretext.build(pretext.sized(VIT), {}).state_dict()
    own = built().model.state_dict()
    assert {name for name in own if name not in learnt} == {"disparity.weight", "disparity.bias"}
    assert all(own[name].shape == learnt[name].shape for name in own if name in learnt)


def test_a_measure_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="measure is 0"):
        dataclasses.replace(TASK, measure=0.0)
