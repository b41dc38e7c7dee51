import json
import sys

from synchromesh.testing.calls import count_calls
from synchromesh.testing.distributed import run_ranks
from synchromesh.types import Plan


def counted():
    one = count_calls(lambda: str(Plan()))
    three = count_calls(lambda: [str(Plan()) for _ in range(3)])
    return one > 0, three == 3 * one, count_calls(lambda: json.dumps({"a": [1]})), sys.getprofile()


def test_calls_of_the_package_are_counted_and_no_others():
    assert run_ranks(counted, 1) == [(True, True, 0, None)]
