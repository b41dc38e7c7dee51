import pytest
import torch

from synchromesh.kernels import product_meter
from synchromesh.kernels.product_costs import Cost, Machine
from synchromesh.kernels.product_meter import EXPERTS, ROWS, SMALL, WIDTH, fitted, measure


@pytest.mark.parametrize("calls", [1, EXPERTS])
def test_the_costs_are_found_again(calls):
    law = Cost(call=1e-5, number=3e-10, row=2e-11)

    def seconds(rows: int, width: int) -> float:
        each = EXPERTS // calls
        return calls * law.seconds(experts=each, rows=rows, numbers=width**2)

    found = fitted(seconds(*SMALL), *(seconds(rows, WIDTH) for rows in ROWS), calls=calls)
    for name in ("call", "number", "row"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-6)


def test_noise_gives_no_negative_costs():
    assert fitted(3.0, 2.0, 1.0, calls=1).number == 0


def test_a_machine_measures_itself(monkeypatch: pytest.MonkeyPatch):
    for name, less in (("EXPERTS", 4), ("WIDTH", 96), ("MANY", 8)):
        monkeypatch.setattr(product_meter, name, less)
    found = measure(seconds=0.01, dtypes=[torch.float32])
    assert isinstance(found, Machine)
    assert found.threads == torch.get_num_threads()
    assert list(found.products) == ["float32"]
    assert found.products["float32"].alone.row > 0


@pytest.mark.parametrize("many", [1.0, 1.2, 1.3])
def test_a_library_that_gains_at_few_rows_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch, many: float):
    def timed(dtype: torch.dtype, rows: int, width: int, seconds: float) -> list[float]:
        gain = many if rows == product_meter.MANY else 2.0
        return [gain * rows * width, gain * rows * width, 1.0 * rows * width]

    monkeypatch.setattr(product_meter, "_timed", timed)
    found = measure(dtypes=[torch.float32]).products["float32"]
    assert (found.onednn is not None) == (many == 1.3)
