import dataclasses

from synchromesh.models.swin_v2_moe import swin_v2_demo, swin_v2_moe_demo
from synchromesh.recipes.demo import demo
from synchromesh.training.run_folder import build_model


def test_the_demo_trains_the_models_of_that_name():
    recipe, facts = demo(), {"classes": list("0123456789")}
    assert repr(build_model(recipe.task, recipe.model, facts)) == repr(swin_v2_moe_demo())
    assert recipe.twin == dataclasses.replace(recipe.model, experts=None)
    assert repr(build_model(recipe.task, recipe.twin, facts)) == repr(swin_v2_demo())


def test_nothing_is_chosen_on_the_test_images():
    assert not demo().keep.best
    assert demo().task.data.source.held_out == 0
