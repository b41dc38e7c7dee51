import dataclasses
import json
from pathlib import Path

import pytest
import torch

from synchromesh.errors import InputError
from synchromesh.kernels.product_costs import Cost, Machine, Machines, ProductCosts, cpu_model, known, shipped

CALLS = ProductCosts(alone=Cost(10.0, 1.0, 0.1), batched=Cost(12.0, 1.0, 0.1))
SLOW_BATCHES = ProductCosts(alone=Cost(1.0, 1.0, 1.0), batched=Cost(1.0, 3.0, 3.0))
FREE_CALLS = ProductCosts(alone=Cost(0.0, 1.0, 1.0), batched=Cost(0.0, 1.0, 1.0))


def machine(cpu: str, threads: int, costs: ProductCosts = CALLS, dtype: str = "float32") -> Machine:
    return Machine(cpu, threads, "2.13", {"float32": costs, dtype: costs})


def test_one_call_for_two_experts_unless_it_costs_clearly_more():
    assert CALLS.batches(rows=4, numbers=2)
    assert FREE_CALLS.batches(rows=4, numbers=2)
    assert not SLOW_BATCHES.batches(rows=4, numbers=2)


@pytest.mark.parametrize(
    ("costs", "skipped", "count", "joins"),
    [
        (CALLS, 0, 5, True),  # nothing added, a call saved
        (CALLS, 0, 9, True),  # four places for the first: 4 x 10 numbers x 0.1 < 8
        (CALLS, 0, 14, False),  # nine places
        (CALLS, 1, 5, False),  # the matrix of an expert without rows is read: 10 numbers, and five places
        (FREE_CALLS, 0, 6, False),
        (FREE_CALLS, 0, 5, True),
        (SLOW_BATCHES, 0, 5, False),
    ],
)
def test_padding_is_bought_with_calls(costs, skipped, count, joins):
    assert costs.joins(experts=1, rows=5, skipped=skipped, count=count, numbers=10) == joins


def test_the_own_cpu_comes_first_then_the_nearest_threads():
    other = ProductCosts(Cost(3.0, 1.0, 1.0), Cost(3.0, 1.0, 1.0))
    machines = Machines((machine("a", 1), machine("b", 2, other), machine("a", 16, SLOW_BATCHES)))
    assert machines.costs("b", 64, torch.float32) == other
    assert machines.costs("a", 2, torch.float32) == CALLS
    assert machines.costs("a", 12, torch.float32) == SLOW_BATCHES
    assert machines.costs("unknown", 1, torch.float32) == CALLS


def test_the_library_is_chosen_by_measurements_of_the_same_family_of_cpu_alone():
    wide, narrow = "AMD one, cpu family 26, model 2", "AMD one, cpu family 25, model 17"
    onednn = Cost(1.0, 1.0, 0.05)
    gains = machine(wide, 1, dataclasses.replace(CALLS, onednn=onednn))
    machines = Machines((gains, machine(narrow, 1, SLOW_BATCHES), machine("Other 2", 1)))
    assert Machines.from_json(machines.to_json()) == machines
    assert machines.costs(wide, 4, torch.float32, wide=False).onednn == onednn
    kin = "AMD two, cpu family 26, model 68"
    assert machines.costs(kin, 4, torch.float32).onednn == onednn
    assert machines.costs(kin, 4, torch.float32, wide=False).onednn is None
    assert machines.costs("AMD two, cpu family 25, model 1", 4, torch.float32) == SLOW_BATCHES
    for cpu in ("Intel one, cpu family 26, model 2", "AMD two, cpu family 27, model 1", narrow, "Other 2", "AMD64", ""):
        assert machines.costs(cpu, 1, torch.float32).onednn is None
    assert machines.costs(wide, 1, torch.float64).onednn is None


def test_a_batch_is_weighed_against_the_faster_library():
    costs = dataclasses.replace(FREE_CALLS, onednn=Cost(0.0, 0.5, 0.5))
    assert FREE_CALLS.batches(rows=4, numbers=2)
    assert not costs.batches(rows=4, numbers=2)


def test_short_dtypes_that_nobody_measured_are_not_batched():
    machines = Machines((machine("a", 1, dtype="bfloat16"),))
    assert machines.costs("a", 1, torch.bfloat16).batches(rows=1, numbers=1)
    assert machines.costs("a", 1, torch.float64).batches(rows=1, numbers=1)
    assert not machines.costs("a", 1, torch.float16).batches(rows=1, numbers=1)


def test_a_file_adds_to_what_is_shipped_and_replaces_its_like(tmp_path: Path):
    file = tmp_path / "costs.json"
    assert known(file) == shipped()
    first = shipped().measured[0]
    again = machine(first.cpu, first.threads, SLOW_BATCHES)
    file.write_text(Machines((machine("here", 3), again)).to_json())
    found = known(file)
    assert found.costs("here", 3, torch.float32) == CALLS
    assert found.costs(first.cpu, first.threads, torch.float32) == SLOW_BATCHES
    assert found.costs("unknown", first.threads, torch.float32) == SLOW_BATCHES


def test_tables_survive_json():
    assert Machines.from_json(shipped().to_json()) == shipped()


GOOD = json.loads(Machines((machine("a", 1),)).to_json())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((), []),
        (("measured",), []),
        (("measured",), {}),
        (("more",), 1),
        (("measured", 0, "cpu"), 3),
        (("measured", 0, "threads"), 0),
        (("measured", 0, "threads"), True),
        (("measured", 0, "products"), {}),
        (("measured", 0, "products", "float32"), None),
        (("measured", 0, "products", "float32", "alone", "call"), -1.0),
        (("measured", 0, "products", "float32", "alone", "call"), float("nan")),
        (("measured", 0, "products", "float32", "alone", "row"), "1"),
        (("measured", 0, "products", "float32", "onednn"), 1.0),
        (("measured", 0, "products", "float32", "onednn"), {"call": 1.0}),
    ],
)
def test_what_is_no_table_is_refused_by_name_of_the_file(tmp_path: Path, place, value):
    found = json.loads(json.dumps(GOOD))
    inside = found
    for key in place[:-1]:
        inside = inside[key]
    if place:
        inside[place[-1]] = value
    else:
        found = value
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match=r"costs\.json.*delete it, or measure again"):
        known(file)
    file.write_bytes(b"\xff{")
    with pytest.raises(InputError, match="measure again"):
        known(file)


def test_costs_are_finite_seconds():
    with pytest.raises(ValueError, match=r"Cost\.row is inf"):
        dataclasses.replace(CALLS.alone, row=float("inf"))
    assert cpu_model()
