import pytest
import torch

from synchromesh.compat.tutel.dispatch import fast_cumsum_sub_one, fast_decode, fast_dispatcher, fast_encode
from synchromesh.compat.tutel.routing import extract_critical
from synchromesh.testing.compare import assert_close, check

T, D, E = 11, 6, 4


def routed(k, factor=0.5, dtype=torch.float64):
    scores = torch.rand(T, E, dtype=dtype).softmax(1)
    return extract_critical(scores, k, capacity_factor=factor)[0]


def places(critical):
    """One-hot [T, K, E, C] of where each kept pair lies."""
    experts, ids, locations, _, capacity, _ = critical
    where = torch.zeros(T, len(ids), experts, capacity, dtype=torch.float64)
    for choice, (own, at) in enumerate(zip(ids, locations, strict=True)):
        for token in range(T):
            if at[token] < capacity:
                where[token, choice, own[token], at[token]] = 1
    return where


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize("postscore", [True, False])
def test_encode_and_decode_are_the_dense_products(k, factor, postscore):
    critical = routed(k, factor)
    where = places(critical)
    weights = torch.stack(critical[3], 1)

    def with_weights(w):
        return (*critical[:3], list(w.unbind(1)), *critical[4:])

    def encoded(x, w):
        return fast_encode(x, with_weights(w), postscore)

    def decoded(y, w):
        return fast_decode(y, with_weights(w), postscore)

    def there(x, w):
        return torch.einsum("tkec,tk,td->ecd", where, torch.ones_like(w) if postscore else w, x) + 0 * w.sum()

    def back(y, w):
        return torch.einsum("tkec,tk,ecd->td", where, w if postscore else torch.ones_like(w), y) + 0 * w.sum()

    x = torch.randn(T, D, dtype=torch.float64)
    applied = {"x": x, "w": weights}
    if postscore:  # then encode has no use for the weights
        assert_close("encoded", encoded(x, weights), there(x, weights))
    else:
        check(encoded, there, applied)
    y = torch.randn(E, critical[4], D, dtype=torch.float64)
    if postscore:
        check(decoded, back, {"y": y, "w": weights})
    else:
        assert_close("decoded", decoded(y, weights), back(y, weights))


def test_a_dispatcher_keeps_its_dtype_and_takes_its_capacity_from_either_place():
    x = torch.randn(T, D, dtype=torch.bfloat16)
    critical = routed(2, dtype=torch.float32)
    dispatcher = fast_dispatcher(E, critical[4], D, x.dtype)
    dispatcher.update(*critical[1:4])
    rows = dispatcher.encode(x)
    assert rows.dtype == torch.bfloat16
    assert rows.shape == (E * critical[4], D)
    dispatcher.update(*critical[1:4], capacity=critical[4] + 2)
    assert dispatcher.encode(x).shape == (E * (critical[4] + 2), D)
    assert dispatcher.decode(dispatcher.encode(x)).dtype == torch.bfloat16


def test_cumsum_counts_from_zero():
    mask = torch.tensor([[1, 0], [1, 1], [0, 1]])
    assert fast_cumsum_sub_one(mask).tolist() == [[0, -1], [1, 0], [1, 1]]
    with pytest.raises(ValueError, match=r"wanted a .T E. mask and dim=0"):
        fast_cumsum_sub_one(mask, dim=1)
