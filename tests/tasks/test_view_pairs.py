import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from synchromesh.data.images import Preprocess
from synchromesh.data.photographs import PhotographFolder
from synchromesh.data.scene_pairs import PhotographCrops, StereoCrops
from synchromesh.tasks.view_pairs import PairData

SIZE = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
DATA = PairData(preprocess=SIZE, train=6, test=4)


def test_pairs_to_score_on_are_always_the_same_in_their_own_colours_with_a_view_of_another_scene() -> None:
    learnt, scored = DATA.splits()
    assert (len(learnt), len(scored)) == (6, 4)
    one, two = scored.read(1), scored.read(1)
    assert torch.equal(one.pair.first, two.pair.first)
    assert torch.equal(one.wrong, two.wrong)
    assert not torch.equal(one.wrong, one.pair.second)
    assert one.pair.disparity.any()
    assert learnt.read(0).wrong is None


def test_both_views_of_a_new_pair_change_their_colours_alike() -> None:
    still = dataclasses.replace(DATA, also=PhotographCrops(shift=0.0, zoom=0.0), also_share=1.0)
    learnt, _ = still.splits()
    new = learnt.read(0, lambda: np.random.default_rng(3))
    assert torch.equal(new.pair.first, new.pair.second)
    plain, _ = dataclasses.replace(still, colors=None).splits()
    assert not torch.equal(new.pair.first, plain.read(0, lambda: np.random.default_rng(3)).pair.first)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_so_many_pairs_to_learn_from_are_of_photographs(share: float) -> None:
    learnt, _ = dataclasses.replace(DATA, also_share=share).splits()
    unknown = [not learnt.read(i).pair.disparity.any() for i in range(40)]
    assert abs(np.mean(unknown) - share) < 0.2
    assert share == 0.5 or np.mean(unknown) == share


def test_a_folder_gives_pairs_of_its_photographs_to_learn_from_and_others_to_score_on(photo, tmp_path: Path) -> None:
    for number in range(5):
        photo(tmp_path / f"{number}.png", size=(30, 40), seed=number)
    data = DATA.of_folder(tmp_path)
    learnt, scored = data.splits()
    assert isinstance(data.learnt, PhotographCrops)
    assert data.learnt.source == PhotographFolder(tmp_path)
    names = [{path.name for path in one.pairs.photographs.paths} for one in (learnt, scored)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 5
    assert scored.read(0).wrong.shape == (3, 16, 16)


def test_a_file_is_cut_in_the_same_way_every_time(photo, tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", size=(30, 40))
    one, two = DATA.one_of(path), DATA.one_of(path)
    assert torch.equal(one.first, two.first)
    assert torch.equal(one.second, two.second)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"also_share is 1\.5"):
        dataclasses.replace(DATA, also_share=1.5)
    with pytest.raises(ValueError, match="test"):
        dataclasses.replace(DATA, test=0)
    assert isinstance(DATA.scored, StereoCrops)
