import copy
import pickle

import pytest
import torch
from torch import nn

from synchromesh.models.known import Known, known_here


def counted(of):
    """Return a function of tensors that notes its calls, and the notes."""
    calls = []

    def compute():
        calls.append(1)
        return sum(tensor.sum() for tensor in of) * torch.ones(2)

    return compute, calls


WRITES = {
    "in place": lambda p: p.mul_(2),
    "past the version counter": lambda p: p.data[0].add_(1),
    "other memory": lambda p: setattr(p, "data", torch.full((3,), 7.0)),
    "NaN": lambda p: p.fill_(torch.nan),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_computed_again_whatever_way_a_weight_is_written(write, mode):
    weight, known = nn.Parameter(torch.ones(3)), Known()
    compute, calls = counted([weight])
    with mode():
        first = known.value(compute, [weight])
        assert known.value(compute, [weight]) is first
        assert len(calls) == 1
    with torch.no_grad():
        write(weight)
    with mode():
        torch.testing.assert_close(known.value(compute, [weight]), compute(), equal_nan=True)


def test_it_is_computed_again_under_another_autocast_and_after_forget():
    weight, known = torch.ones(3), Known()
    compute, calls = counted([weight])
    known.value(compute, [weight])
    with torch.autocast("cpu", torch.bfloat16):
        known.value(compute, [weight])
    assert len(calls) == 2
    with torch.autocast("cpu", torch.bfloat16):
        known.value(compute, [weight])
    assert len(calls) == 2
    known.forget()
    known.value(compute, [weight])
    assert len(calls) == 3


@pytest.mark.parametrize("again", [copy.deepcopy, lambda known: pickle.loads(pickle.dumps(known))])
def test_a_copy_knows_nothing(again):
    weight, known = torch.ones(3), Known()
    known.value(*counted([weight])[:1], [weight])
    compute, calls = counted([weight])
    again(known).value(compute, [weight])
    assert calls


def test_numbers_that_cannot_be_read_are_not_compared():
    weight = torch.ones(3)
    assert known_here([weight, nn.Parameter(weight)])
    assert not known_here([weight, weight.to("meta")])
    assert not torch.vmap(lambda x: torch.tensor(known_here([x])))(torch.ones(2, 3)).any()
