from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from synchromesh.parallel import clock as module
from synchromesh.parallel.clock import Clock


class Slow(torch.autograd.Function):
    """Lets seconds pass, twice as many in backward."""

    @staticmethod
    def forward(ctx, x, now, seconds):
        ctx.now, ctx.seconds = now, seconds
        now.seconds += seconds
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.now.seconds += 2 * ctx.seconds
        return grad, None, None


@pytest.fixture
def now():
    """The time of day, which passes where a test says so."""
    now = SimpleNamespace(seconds=100.0)
    with patch.object(module, "time", SimpleNamespace(perf_counter=lambda: now.seconds)):
        yield now


def test_forward_and_backward_of_a_layer_are_timed_and_nothing_around_it(now):
    clock = Clock()
    x, weight = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    before = Slow.apply(x, now, 0.2)
    inner, own = clock.enter([before, weight])
    assert not clock.ready(wait=True)
    y = clock.leave(Slow.apply(inner, now, 0.05) * own)
    Slow.apply(y, now, 0.2).sum().backward()
    assert clock.ready(wait=True)
    assert clock.seconds() == pytest.approx((0.05, 0.1))
    assert torch.equal(weight.grad, before.detach())


def test_the_gradient_of_a_weight_that_comes_last_is_waited_for(now):
    clock = Clock()
    x, weight = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    inner, own = clock.enter([x, weight])
    slow = Slow.apply(own, now, 0.05)
    clock.leave(inner * slow).sum().backward()
    assert clock.seconds()[1] == pytest.approx(0.1)


def test_without_gradients_there_is_a_forward_only():
    clock = Clock()
    clock.note(torch.tensor([1, 3]))
    with torch.no_grad():
        (x,) = clock.enter([torch.randn(4)])
        clock.leave(x)
    assert clock.ready(wait=True, backward=False)
    assert not clock.ready(wait=True)
    assert clock.seconds()[1] == 0
    assert clock.noted() == [1, 3]
