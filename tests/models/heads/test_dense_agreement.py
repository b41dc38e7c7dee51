import math

import pytest
import torch
import torch.nn.functional as F

from synchromesh.models.heads.dense_agreement import PixelContrast, Propagation, PropagationLoss, Seen
from synchromesh.testing.compare import assert_close

B, L, D = 3, 6, 5


def seen(seed=0):
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randn(B, L, D, dtype=torch.float64, generator=generator) for _ in range(4)]
    positive = torch.rand(B, L, L, generator=generator) < 0.2
    positive[1] = False  # a picture whose views do not overlap
    return Seen((cells[0].requires_grad_(), cells[1].requires_grad_()), (cells[2], cells[3]), positive)


def cos(a, b):
    a, b = a.detach(), b.detach()
    return float(a @ b / (a.norm() * b.norm()))


def propagated_by_loops(loss, view):
    with torch.no_grad():
        mixed = loss.transform(view)
        return torch.stack([
            torch.stack([
                sum(max(0.0, cos(own[i], own[j])) ** loss.power * new[j] for j in range(L)) for i in range(L)
            ])
            for own, new in zip(view, mixed, strict=True)
        ])  # fmt: skip


def propagation_by_loops(loss, one):
    mine, theirs = propagated_by_loops(loss, one.student[0]), one.twin[1]
    found = []
    for b in range(B):
        pairs = one.positive[b].nonzero().tolist()
        found.append(sum(1 - cos(mine[b, i], theirs[b, j]) for i, j in pairs) / max(1, len(pairs)))
    return found


def test_propagation_is_what_loops_say():
    torch.manual_seed(1)
    loss, given = Propagation(power=2.0).build(D).double(), seen()
    wanted = [a + b for a, b in zip(*(propagation_by_loops(loss, one) for one in (given, given.turned())), strict=True)]
    assert_close("loss", loss(given), torch.tensor(wanted, dtype=torch.float64))


def contrast_by_loops(temperature, one):
    found = []
    for b in range(B):
        terms = []
        for i in range(L):
            every = [math.exp(cos(one.student[0][b, i], one.twin[1][b, j]) / temperature) for j in range(L)]
            own = [value for j, value in enumerate(every) if one.positive[b, i, j]]
            if own:
                terms.append(-math.log(sum(own) / sum(every)))
        found.append(sum(terms) / max(1, len(terms)))
    return found


def test_contrast_is_what_loops_say():
    loss, given = PixelContrast(temperature=0.3).build(D), seen()
    wanted = [a + b for a, b in zip(*(contrast_by_loops(0.3, one) for one in (given, given.turned())), strict=True)]
    assert_close("loss", loss(given), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("config", [Propagation(), PixelContrast()], ids=lambda config: type(config).__name__)
def test_gradients_are_those_of_finite_differences_and_finite_without_positives(config):
    torch.manual_seed(1)
    loss, given = config.build(D).double(), seen()
    one, other = given.student
    assert torch.autograd.gradcheck(lambda a, b: loss(Seen((a, b), given.twin, given.positive)), (one, other))
    loss(given).sum().backward()
    assert torch.isfinite(one.grad).all()
    assert not one.grad[1].any()


def test_power_zero_mixes_all_cells_alike():
    torch.manual_seed(1)
    loss = Propagation(power=0.0).build(D).double()
    assert isinstance(loss, PropagationLoss)
    cells = seen().student[0]
    wanted = loss.transform(cells).mean(1, keepdim=True).expand_as(cells)
    assert_close("directions", F.normalize(loss.propagated(cells), dim=2), F.normalize(wanted, dim=2))


def test_cells_that_have_nothing_in_common_stay_themselves_and_agree():
    loss = Propagation().build(L).double()
    torch.nn.init.eye_(loss.transform.weight)
    torch.nn.init.zeros_(loss.transform.bias)
    cells = torch.eye(L, dtype=torch.float64).expand(B, -1, -1)
    same = Seen((cells, cells), (cells, cells), torch.eye(L, dtype=torch.bool).expand(B, -1, -1))
    assert_close("loss", loss(same), torch.zeros(B, dtype=torch.float64))


@pytest.mark.parametrize(("config", "wrong"), [(Propagation, {"power": -1.0}), (PixelContrast, {"temperature": 0.0})])
def test_settings_that_make_no_sense_are_refused(config, wrong):
    with pytest.raises(ValueError, match="wanted"):
        config(**wrong)
