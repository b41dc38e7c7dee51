import pytest

from synchromesh.compat.tutel.environment import Switches, read_switches


def test_variables_are_switches():
    assert read_switches({}) == Switches()
    said = {"SKIP_MOE": "1", "SKIP_EXPERT": "0", "BATCH_PRIO": "1", "CAP_FACTOR": "1.25"}
    assert read_switches(said) == Switches(skip_moe=True, prioritized=True, capacity_factor=1.25)
    assert read_switches({"SKIP_EXPERT": "1"}).skip_expert


def test_what_cannot_be_done_is_said():
    with pytest.warns(UserWarning, match="never skips an exchange"):
        read_switches({"SKIP_A2A": "1"})
    with pytest.raises(ValueError, match="CAP_FACTOR is 'much', wanted a number"):
        read_switches({"CAP_FACTOR": "much"})
