"""CPUs by NUMA node, as far as this process may use them."""

import os

import pytest

from synchromesh.compat.tutel.numa import nodes_of_cpus


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux says so")  # of which CPUs to use
def test_only_usable_cpus_count(tmp_path, monkeypatch):
    for node, cpus in ((0, (0, 1)), (1, (2, 10)), (2, (4,))):
        for cpu in cpus:
            (tmp_path / f"node{node}" / f"cpu{cpu}").mkdir(parents=True)
        (tmp_path / f"node{node}" / "cpulist").touch()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 10})
    assert nodes_of_cpus(tmp_path) == {0: {1}, 1: {2, 10}}
    assert nodes_of_cpus(tmp_path / "absent") == {}


def test_this_machine_has_some():
    used = nodes_of_cpus()
    assert not used or set().union(*used.values()) <= os.sched_getaffinity(0)
