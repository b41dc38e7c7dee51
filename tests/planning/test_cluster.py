import dataclasses
import json

import pytest

from synchromesh.planning.cluster import ClusterProfile, Curve, Matmul, load_profile, shipped_profiles


def test_a_curve_runs_through_its_points_and_on_beyond_them():
    curve = Curve(((10.0, 1.0), (20.0, 3.0), (40.0, 4.0)))
    assert [curve.at(size) for size in (0, 10, 15, 20, 40, 60)] == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert Curve(((0.0, 1.0), (1.0, 0.5))).at(100) == 0.0  # a falling end never gives negative seconds


@pytest.mark.parametrize("points", [((0.0, 1.0),), ((1.0, 0.0), (0.0, 1.0)), ((0.0, -1.0), (1.0, 0.0))])
def test_a_curve_that_is_none_is_refused(points):
    with pytest.raises(ValueError, match="bytes rising"):
        Curve(points)


def test_half_of_the_peak_is_reached_where_the_law_says():
    law = Matmul(peak=100.0, half=64.0)
    huge = 10**9
    assert law.seconds(64, huge, huge) == pytest.approx(2 * (2 * 64 * huge * huge) / 100, rel=1e-6)
    assert law.seconds(0, 8, 8) == 0


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_number_of_a_shipped_profile_has_its_source(name):
    profile = load_profile(name)
    assert profile.name == name
    assert ClusterProfile.from_json(profile.to_json()) == profile
    plain = {"name", "about", "per_node", "backend", "sources", *(("cores",) if profile.cores is None else ())}
    given = {field.name for field in dataclasses.fields(profile)} - plain
    wanted = {f"matmul.{dtype}" for dtype in profile.matmul} | (given - {"matmul"})
    named = set(profile.sources) | (
        {f"matmul.{dtype}" for dtype in profile.matmul} if "matmul" in profile.sources else set()
    )
    assert wanted <= named
    assert all(profile.sources.values())


def test_links_between_nodes_that_nobody_measured_are_unknown():
    found = json.loads(load_profile("cpu_gloo").to_json())
    assert found["network"] is None
    profile = ClusterProfile.from_json(json.dumps(found))
    assert profile.across is profile.node  # no network is faster than that
    older = found | {"network": found["node"]}  # as files of 0.1 have it
    assert ClusterProfile.from_json(json.dumps(older)) == profile
    measured = ClusterProfile.from_json(load_profile("a100_hdr").to_json())
    assert measured.across is measured.network is not None


def test_files_without_cores_are_of_ranks_that_have_one():
    found = json.loads(load_profile("a100_hdr").to_json())
    del found["cores"], found["node"]["busy"]
    profile = ClusterProfile.from_json(json.dumps(found))
    assert (profile.cores, profile.waits, profile.node.busy) == (None, 1.0, 1.0)


def test_an_unknown_cluster_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"wanted a file.*a100_hdr"):
        load_profile("b200_xdr")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found.pop("node"), "holds the fields"),
        (lambda found: found.update(more=1), "holds the fields"),
        (lambda found: found.update(memory_rate=0), "memory_rate"),
        (lambda found: found.update(backend="mpi"), "backend"),
        (lambda found: found["node"]["message"].update(points=[[0, 1]]), "two points"),
        (lambda found: found.update(step=None), "not the profile"),
        (lambda found: found.update(cores=0), "cores"),
        (lambda found: found["matmul"].update(float32={"peak": 1.0}), "not the profile"),
    ],
)
def test_a_damaged_profile_says_what_is_wrong(change, says):
    found = json.loads(load_profile("a100_hdr").to_json())
    change(found)
    with pytest.raises(ValueError, match=says):
        ClusterProfile.from_json(json.dumps(found))


def test_a_dtype_without_a_speed_is_named():
    with pytest.raises(ValueError, match="float64"):
        load_profile("a100_hdr").rate_of("float64")
