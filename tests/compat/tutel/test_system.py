"""What a script does first, and what it keeps."""

import os
import time

import numpy as np
import pytest
import torch

from synchromesh.compat.tutel import system


def test_a_session_of_one_process():
    session = system.init_data_model_parallel(backend="gloo")
    assert system.get_local_session() is session
    assert (session.global_size, session.is_distributed, session.is_cuda) == (1, False, False)
    before = time.perf_counter()
    assert before <= system.record_time() <= time.perf_counter()
    assert system.record_time(is_cuda=False) >= before


def test_a_session_begins_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(system, "_SESSIONS", [])
    with pytest.raises(RuntimeError, match=r"call system\.init_data_model_parallel\(\) first"):
        system.record_time()


def test_the_cache_gives_one_value_or_all():
    cache = system.cache()
    assert cache is system.cache()
    cache.reset()
    cache.set("a", 1)
    cache.set("b", 2)
    assert (cache.get("a"), cache.get()) == (1, [1, 2])
    cache.reset()
    assert cache.get() == []


def test_tensors_are_kept_as_arrays(tmp_path):
    x = torch.rand(2, 3, requires_grad=True)
    system.save(x, tmp_path / "x.npy")
    assert torch.equal(system.load(tmp_path / "x.npy"), x)
    assert system.load(tmp_path / "x.npy", "cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="no bfloat16"):
        system.save(x.bfloat16(), tmp_path / "y.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        system.load(tmp_path / "objects.npy")


def test_names_of_ranks(tmp_path, caplog):
    name = system.apply_rank_size_from_pattern(str(tmp_path / "new" / "{rank}-of-{size}"), 1, 4)
    assert name == str(tmp_path / "new" / "1-of-4")
    assert (tmp_path / "new").is_dir()
    system.apply_rank_size_from_pattern(str(tmp_path / "x" / "{rank}"), 0, 1, create_dir=False)
    assert not (tmp_path / "x").exists()


def test_a_process_is_kept_on_a_node(monkeypatch):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")  # macOS; Linux runs it
    kept = []
    monkeypatch.setattr(system, "nodes_of_cpus", lambda: {0: {0, 1}, 3: {2, 3}})
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: kept.append((process, cpus)))
    for rank, ranks_per_node in (("0", "1"), ("1", "1"), ("2", "1"), ("1", "2"), ("2", "2"), ("0", "0")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("NUMA_TYPE", ranks_per_node)
        system.init_affinity_at_program_beginning()
    assert kept == [(0, {0, 1}), (0, {2, 3}), (0, {0, 1}), (0, {0, 1}), (0, {2, 3})]
