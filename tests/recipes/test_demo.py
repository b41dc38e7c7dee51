import dataclasses

from synchromesh.models.swin_v2_moe import DEMO, swin_v2_demo, swin_v2_moe_demo
from synchromesh.recipes.demo import demo


def test_the_demo_trains_the_models_of_that_name():
    recipe = demo()
    kind = {"channels": recipe.data.preprocess.channels, "image_size": recipe.data.preprocess.image_size}
    settings = recipe.model.swin.settings(**kind)
    assert dataclasses.replace(settings, pretrained_window_sizes=()) == DEMO
    assert repr(recipe.model.build(10, **kind)) == repr(swin_v2_moe_demo())
    assert recipe.twin is not None
    assert repr(recipe.twin.build(10, **kind)) == repr(swin_v2_demo())


def test_nothing_is_chosen_on_the_test_images():
    assert not demo().keep.best
    assert demo().data.source.held_out == 0
