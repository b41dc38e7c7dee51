"""Old names go on working, and say what to use and until when."""

import warnings

import pytest

import synchromesh
from synchromesh import FullySharded, Replicated
from synchromesh.deprecation import Renamed, renamed
from synchromesh.parallel import shared

OLD = {"DDP": Replicated, "FSDP2": FullySharded}


@pytest.mark.parametrize("old", OLD)
@pytest.mark.parametrize("module", [synchromesh, shared], ids=["package", "module"])
def test_an_old_name_is_the_new_thing_and_warns_each_time(module: object, old: str) -> None:
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match=f"shared.{old} is called {OLD[old].__name__} since version 0.1, "):
            assert getattr(module, old) is OLD[old]


def test_old_names_are_not_among_the_public_ones() -> None:
    assert not set(OLD) & set(synchromesh.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec("from synchromesh import *", {})


def test_a_warning_says_until_when_and_what_to_use() -> None:
    said = Renamed("New", since="0.2", until="0.4").warning("a.b", "Old")
    assert said == "a.b.Old is called New since version 0.2, and goes with version 0.4: use a.b.New"


def test_other_names_are_still_unknown() -> None:
    with pytest.raises(AttributeError, match=r"module 'a\.b' has no attribute 'x'"):
        renamed("a.b", {})("x")


def test_no_name_outlives_the_version_that_drops_it() -> None:
    """When the version reaches what a warning says, the old name has to go."""
    version = tuple(map(int, synchromesh.__version__.split(".")[:2]))
    for old in OLD:
        with pytest.warns(DeprecationWarning, match="goes with version") as seen:
            getattr(shared, old)
        until = str(seen[0].message).partition("goes with version ")[2].partition(":")[0]
        assert version < tuple(map(int, until.split(".")))
