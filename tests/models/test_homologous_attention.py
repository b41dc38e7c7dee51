import math

import pytest
import torch

from synchromesh.models.attention import SelfAttention, dot_product_attention, grid_places, rotation_of
from synchromesh.models.homologous_attention import (
    HomologousAttention,
    homologous_attention,
    homologous_contrast,
    nearest_of_same_source,
)
from synchromesh.testing.compare import assert_close, check


def test_each_query_attends_to_its_best_keys_as_defined_by_loops_with_gradients() -> None:
    def defined(q, k, v):
        heads = []
        for b in range(2):
            rows = []
            for n in range(5):
                parts = []
                for h in range(3):
                    logits = [(q[b, h, n] @ k[b, h, m]) / 2.0 for m in range(6)]  # sqrt of 4
                    best = sorted(range(6), key=lambda m: -logits[m].item())[:2]
                    total = sum(logits[m].exp() for m in best)
                    parts.append(sum(logits[m].exp() / total * v[b, h, m] for m in best))
                rows.append(torch.cat(parts))
            heads.append(torch.stack(rows))
        return torch.stack(heads)

    shapes = {"q": (2, 3, 5, 4), "k": (2, 3, 6, 4), "v": (2, 3, 6, 4)}
    check(
        lambda q, k, v: homologous_attention(q, k, v, 2),
        defined,
        {name: torch.randn(*shape).double() for name, shape in shapes.items()},
    )


def test_with_all_keys_it_is_plain_attention() -> None:
    plain = SelfAttention(12, 3).double()
    module, x = HomologousAttention(plain, 1.0), torch.randn(2, 6, 12).double()
    turns = rotation_of(grid_places(2, 3), 4, 100.0, dtype=torch.float64)
    assert torch.equal(module(x), plain(x))
    assert torch.equal(module(x, turns), plain(x, turns))
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert not torch.allclose(HomologousAttention(plain, 0.5)(x), plain(x))
    assert HomologousAttention(plain, 0.5)(x[:0]).shape == (0, 6, 12)
    assert module.multiply_adds(6) == plain.multiply_adds(6)
    q, k, v = torch.randn(3, 2, 3, 6, 4).double()
    logits = q @ k.mT / 2  # the way through the best keys too, as far as it may go
    best = logits.topk(6, -1).indices
    assert torch.zeros_like(logits).scatter(-1, best, 1.0).all()
    assert_close("all keys", homologous_attention(q, k, v, 6), dot_product_attention(q, k, v))


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_a_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="wanted a share"):
        HomologousAttention(SelfAttention(4, 1), ratio)
    with pytest.raises(ValueError, match="dropout"):
        HomologousAttention(SelfAttention(4, 1, dropout=0.1), 0.5)


def test_the_contrast_is_its_definition_by_loops_with_its_gradient() -> None:
    sources = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 2, 1]])  # the last two have no other of their source
    same = sources[:, :, None] == sources[:, None]

    def defined(z):
        totals = []
        for rows, own in zip(z, sources.tolist(), strict=True):
            rows = rows / rows.norm(dim=1, keepdim=True)
            total = z.new_zeros(())
            for i in range(5):
                positive = [j for j in range(5) if j != i and own[j] == own[i]]
                below = sum((rows[i] @ rows[k] / 0.25).exp() for k in range(5) if k != i)
                for j in positive:
                    total = total - ((rows[i] @ rows[j] / 0.25).exp() / below).log() / len(positive)
            totals.append(total)
        return torch.stack(totals)

    check(lambda z: homologous_contrast(z, same, 0.25), defined, {"z": torch.randn(2, 5, 3).double()})


def test_equal_rows_of_one_source_cost_the_logarithm_of_all_others() -> None:
    z, same = torch.ones(2, 7, 3).double(), torch.ones(2, 7, 7, dtype=torch.bool)
    assert homologous_contrast(z, same, 0.25).tolist() == pytest.approx([7 * math.log(6)] * 2)


def test_a_place_is_recognised_where_its_nearest_other_one_has_its_source() -> None:
    z = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.1, 3.0]]])
    for sources, share in (([0, 1, 0, 1], 1.0), ([0, 0, 1, 1], 0.0), ([0, 1, 0, 0], 0.5)):
        own = torch.tensor([sources])
        assert nearest_of_same_source(z, own[:, :, None] == own[:, None]).tolist() == [share]
    none = torch.zeros(0, 4, 4, dtype=torch.bool)
    assert nearest_of_same_source(z[:0], none).shape == (0,)
