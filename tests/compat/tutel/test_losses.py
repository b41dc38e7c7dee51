import pytest
import torch
from torch.distributions import Normal

from synchromesh.compat.tutel.losses import gshard_loss, load_importance_loss
from synchromesh.testing.compare import check

T, E = 9, 4


def test_gshard_loss_is_its_formula():
    ids = torch.randint(E, (T, 2))

    def formula(scores):
        fraction = torch.stack([(ids[:, 0] == e).double().mean() for e in range(E)])
        return E * (scores.mean(0) * fraction).sum()

    check(lambda scores: gshard_loss(scores, ids), formula, {"scores": torch.rand(T, E, dtype=torch.float64)})
    assert gshard_loss(torch.rand(0, E), torch.zeros(0, 1, dtype=torch.int64)) == 0


def test_load_importance_loss_is_its_formula():
    logits = torch.randn(T, 2, dtype=torch.float64).sort(descending=True).values

    def formula(scores):
        load = Normal(0.0, 0.5 / E).cdf(scores - logits[:, 1:]).sum(0)
        return sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (load, scores.sum(0))) / 2

    check(
        lambda scores: load_importance_loss(scores, logits, 0.5),
        formula,
        {"scores": torch.randn(T, E, dtype=torch.float64).softmax(1)},
    )
    assert load_importance_loss(torch.ones(T, 1), torch.ones(T, 1), 1.0) == 0
    with pytest.raises(ValueError, match=r"got gate_noise 0.0, wanted more than 0"):
        load_importance_loss(torch.ones(T, E), torch.ones(T, 1), 0.0)
