"""Two crops whose cells are to agree: what sizes can be."""

import dataclasses

import pytest
import torch

from synchromesh.errors import InputError
from synchromesh.recipes.pixpro_demo import pixpro_demo
from synchromesh.tasks.dense_twins import ViewTwins
from synchromesh.training.run_folder import build_model


@pytest.mark.parametrize("size", [50, 64])
def test_sizes_that_cells_do_not_fill_are_refused(size: int) -> None:
    config = pixpro_demo()
    assert isinstance(config.task, ViewTwins)
    data = config.task.data
    preprocess = dataclasses.replace(data.preprocess, image_size=size)
    task = dataclasses.replace(config.task, data=dataclasses.replace(data, preprocess=preprocess))
    if size == 64:
        build_model(task, config.model, {})
        return
    with pytest.raises(InputError, match="image_size is 50, wanted a multiple of"), torch.device("meta"):
        build_model(task, config.model, {})
