import pytest
import torch
from torch import nn

from synchromesh import MLPExperts, MoE, TopKRouter, replace_ffn


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def moe_like(old: nn.Module) -> MoE:
    return MoE(TopKRouter(16, 4, k=2), MLPExperts(4, 16, hidden=old.up.out_features))


def test_chosen_blocks_become_moe_and_train():
    model = nn.Sequential(FFN(), nn.Sequential(FFN(), nn.LayerNorm(16)), FFN()).eval()
    names = replace_ffn(model, lambda name, module: isinstance(module, FFN) and name != "0", moe_like)
    assert names == ["1.0", "2"]
    assert isinstance(model[0], FFN)
    assert isinstance(model[1][0], MoE)
    assert not model[2].training
    model(torch.randn(2, 5, 16)).sum().backward()
    assert model[2].experts.up.grad.abs().sum() > 0


def test_blocks_of_a_foreign_model_are_reached_by_name():
    model = encoder()
    names = replace_ffn(
        model,
        lambda name, module: name.endswith("linear1"),
        lambda old: nn.Sequential(
            MoE(TopKRouter(16, 4), MLPExperts(4, 16, hidden=32)), nn.Linear(16, old.out_features)
        ),
    )
    assert names == [f"layers.{i}.linear1" for i in range(3)]
    assert model(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_a_module_in_two_places_stays_one_module():
    shared = FFN()
    model = nn.Sequential(shared, nn.LayerNorm(16), shared)
    assert replace_ffn(model, lambda name, module: isinstance(module, FFN), moe_like) == ["0", "2"]
    assert model[0] is model[2]


def test_nothing_chosen_or_the_model_itself_is_refused():
    with pytest.raises(ValueError, match="chose no module of Sequential; names look like"):
        replace_ffn(nn.Sequential(FFN()), lambda name, module: False, moe_like)
    with pytest.raises(ValueError, match="the model itself"):
        replace_ffn(FFN(), lambda name, module: True, moe_like)
