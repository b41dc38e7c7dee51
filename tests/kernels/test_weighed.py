import pytest
import torch

from synchromesh.kernels.product_costs import Cost, Machine, Machines, ProductCosts, cpu_model
from synchromesh.kernels.products import Batch, Matrices, Piece, batched_here, multiply
from synchromesh.kernels.weighed import ALONE, ONEDNN, TOGETHER, weighed

SLOW = Cost(1.0, 1.0, 1.0)


def machines(costs: ProductCosts, cpu: str) -> Machines:
    return Machines((Machine(cpu, 2, "2.13", {"float32": costs}),))


@pytest.mark.parametrize(
    ("costs", "taken"),
    [
        (ProductCosts(SLOW, Cost(1.0, 3.0, 3.0)), ALONE),
        (ProductCosts(SLOW, SLOW), TOGETHER),
        (ProductCosts(SLOW, SLOW, onednn=Cost(1.0, 0.1, 0.1)), ONEDNN),
        (ProductCosts(SLOW, Cost(1.0, 0.1, 0.1), onednn=Cost(1.0, 0.1, 0.1)), TOGETHER),
    ],
)
def test_the_way_that_runs_is_said_with_the_seconds_of_all(costs, taken):
    found = weighed(experts=4, rows=64, numbers=100, dtype=torch.float32, machines=machines(costs, cpu_model()))
    assert found.taken == taken
    assert found.seconds[ALONE] == 4 * (1 + 100 * (1 + 64))
    assert (ONEDNN in found.seconds) == (costs.onednn is not None)
    assert "measures this CPU" not in str(found)


def test_one_expert_is_no_batch_and_another_cpus_costs_say_so():
    found = weighed(
        experts=1, rows=64, numbers=100, dtype=torch.float32, machines=machines(ProductCosts(SLOW, SLOW), "another")
    )
    assert found.taken == ALONE
    assert "measured on another, threads 2; `synchromesh profile --products` measures this CPU" in str(found)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (64, 16), (64, 256), (256, 64)])
def test_what_is_said_is_what_products_do(monkeypatch: pytest.MonkeyPatch, rows: int, width: int):
    said, ran = weighed(experts=3, rows=rows, numbers=width**2, dtype=torch.float32), []
    for name in ("bmm", "mm"):
        own = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, _own=own, _name=name, **named: (ran.append(_name), _own(*args, **named))
        )
    monkeypatch.setattr(
        "synchromesh.kernels.matmul.onednn_linear",
        lambda a, b, bias, *, gelu: (ran.append("oneDNN"), a @ b.t())[1],
    )
    matrices, x = torch.randn(3, width, width), torch.randn(3 * rows + 64, width)
    together = batched_here(x.dtype, matrices)(1, rows)
    batches = [Batch(0, 3, rows)] if together else [Batch(e, e + 1, rows) for e in range(3)]
    multiply(x[: 3 * rows], Matrices.of(matrices), Piece(0, 3 * rows, batches), torch.empty(3 * rows, width))
    assert set(ran) == {{ALONE: "mm", TOGETHER: "bmm", ONEDNN: "oneDNN"}[said.taken]}
