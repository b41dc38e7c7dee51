import dataclasses

import pytest
import torch

from synchromesh.compat.swin import save_swin
from synchromesh.compat.swin_names import from_released
from synchromesh.models.heads.classifier import Classifier
from synchromesh.models.mixtures import CosineGate
from synchromesh.models.swin_v2_moe import DEMO, DEMO_EXPERTS


@pytest.mark.parametrize("cosine", [False, True])
def test_a_whole_state_has_our_names_and_shapes_again(cosine, tmp_path) -> None:
    experts = dataclasses.replace(DEMO_EXPERTS, **({"router": CosineGate(noise=0.0)} if cosine else {}))
    model = Classifier(dataclasses.replace(DEMO, embed_dim=12, experts=experts).build(), 4)
    (file,) = save_swin(model, tmp_path / "m.pth", ranks=1, everything=True)
    theirs = torch.load(file, weights_only=True)["model"]
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(3)
    found, own = from_released(theirs), model.state_dict()
    assert set(found) == set(own)
    assert all(torch.equal(found[name], own[name]) for name in own)


def test_a_tensor_that_no_model_here_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tensor 'absolute_pos_embed': tables of positions are the first Swin's"):
        from_released({"absolute_pos_embed": torch.zeros(3)})
