import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from synchromesh.adapt.feed_forward import read_feed_forward
from synchromesh.models.mixtures import FeedForward


def test_a_block_is_read_as_the_experts_that_compute_it(block):
    found = read_feed_forward(block)
    x = torch.randn(4, 8).double()
    experts = found.experts(1, found.hidden, down_bias="down_bias" in found.weights())
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            parameter.copy_(found.weights()[name][None])
    assert {name for name, _ in experts.named_parameters()} == set(found.weights())
    own = {name: weight[0] for name, weight in experts.weights().items()}
    hidden = x @ own["up"].T + own.get("up_bias", 0)
    if found.gate is None:
        hidden = found.activation(hidden)
    else:
        hidden = found.activation(x @ own["gate"].T + own.get("gate_bias", 0)) * hidden
    y = hidden @ own["down"] + own.get("down_bias", 0)
    torch.testing.assert_close(y, block(x))


@pytest.mark.parametrize(
    ("module", "activation"),
    [(nn.GELU(), F.gelu), (nn.SiLU(), F.silu), (nn.ReLU(), F.relu)],
    ids=["gelu", "silu", "relu"],
)
def test_a_common_activation_is_the_one_that_kernels_fuse(module, activation):
    assert read_feed_forward(nn.Sequential(nn.Linear(4, 8), module, nn.Linear(8, 4))).activation is activation


def test_a_block_that_is_masked_is_refused_in_a_sentence():
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    parametrize.register_parametrization(block[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match="is masked or adapted already, wanted plain weights"):
        read_feed_forward(block)


@pytest.mark.parametrize("own", [nn.Mish(), nn.Mish(inplace=True), nn.LeakyReLU(inplace=True)], ids=str)
def test_an_activation_of_its_own_is_taken(own):
    assert read_feed_forward(nn.Sequential(nn.Linear(4, 8), own, nn.Linear(8, 4))).activation is own
    tanh = nn.Sequential(nn.Linear(4, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 4))
    assert read_feed_forward(tanh).activation is not F.gelu


def test_a_block_of_zeros_is_not_taken_for_any_activation():
    block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        block[2].weight.zero_()
    assert read_feed_forward(block).activation is F.relu


def test_dropout_is_told_by_its_place():
    inside = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 4), nn.Dropout(0.3))
    found = read_feed_forward(inside)
    assert (found.dropout, found.output_dropout) == (0.2, 0.3)
    assert read_feed_forward(FeedForward(4, 8, dropout=0.1)).output_dropout == 0.1


def test_a_square_block_is_read_by_trial():
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.gate, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(F.silu(self.inner(x)) * self.gate(x))

    found = read_feed_forward(Square())
    assert (found.gate, found.up, found.down) == ("inner", "gate", "out")


def test_a_block_is_read_where_its_numbers_are_not():
    with torch.device("meta"):
        block = FeedForward(4, 8)
    found = read_feed_forward(block)
    assert found.activation is F.gelu
    assert found.experts(2, 4, down_bias=False).up.is_meta


@pytest.mark.parametrize(
    "between",
    [nn.Softmax(-1), nn.GroupNorm(4, 24, affine=False), nn.LayerNorm(24, elementwise_affine=False)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_block_whose_hidden_units_depend_on_each_other_is_no_feed_forward_to_split(between):
    block = nn.Sequential(nn.Linear(8, 24), between, nn.Linear(24, 8))
    with pytest.raises(ValueError, match=r"cannot be read: its output is not down\(act\(up\(x\)\)\)"):
        read_feed_forward(block)


@pytest.mark.parametrize("drop", [nn.AlphaDropout(0.1), nn.Dropout1d(0.1)], ids=lambda layer: type(layer).__name__)
def test_a_dropout_that_experts_do_not_have_is_not_lost_in_silence(drop):
    with pytest.raises(ValueError, match=r"got the dropout 1 .*wanted `nn.Dropout`"):
        read_feed_forward(nn.Sequential(nn.Linear(4, 8), drop, nn.ReLU(), nn.Linear(8, 4)))
