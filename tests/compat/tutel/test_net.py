"""Every name of `tutel.net` takes the arguments that scripts give it, in their order and by their names."""

import inspect

import pytest

from synchromesh.compat.tutel import net, system

SIGNATURES = {
    "get_world_size": "group",
    "get_world_rank": "group",
    "barrier": "group",
    "create_groups_from_world": "group_count include_init parent_group",
    "create_standalone_group": "",
    "simple_all_reduce": "x group op inplace",
    "simple_all_to_all": "x group background",
    "simple_split": "x group",
    "simple_reduce_scatter": "x group op",
    "simple_all_gather": "x group",
    "all_to_all": "x input_dim output_dim group background use_2dh",
    "all_to_all_single": "x group",
    "all_gather": "x dim fused group",
    "zero_gather": "x full_shape group",
    "zero_scatter": "x scatter_fn group",
    "spatial_split": "x dim group",
    "reduce_scatter": "x dim group",
    "allreduce_forward": "x op group",
    "allreduce_backward": "x op group",
    "batch_all_to_all_v": "datas partition_sizes group",
    "batch_all_gather_v": "datas group",
    "TutelDistributedOptimizer": "params group average_shared",
}
OF_SYSTEM = {
    "init_data_model_parallel": "group_count backend",
    "get_local_session": "",
    "record_time": "is_cuda",
    "cache": "",
    "save": "t path",
    "load": "path device",
    "apply_rank_size_from_pattern": "filename rank size create_dir",
    "init_affinity_at_program_beginning": "",
}
GIVEN = [(net, *item) for item in SIGNATURES.items()] + [(system, *item) for item in OF_SYSTEM.items()]


@pytest.mark.parametrize(("module", "name", "arguments"), GIVEN, ids=[name for _, name, _ in GIVEN])
def test_arguments_have_their_names_and_order(module, name, arguments):
    assert " ".join(inspect.signature(getattr(module, name)).parameters) == arguments


def test_nothing_is_forgotten():
    assert set(net.__all__) == set(SIGNATURES)
