import pytest
import torch
import torch.nn.functional as F

from synchromesh.adapt.adaptation import adapt
from synchromesh.adapt.mtlora import MTLoRA
from synchromesh.models.heads.multi_task import MultiTaskModel, balanced_cross_entropy, features_of_tasks
from synchromesh.models.swin_v2 import SwinV2Config

CONFIG = SwinV2Config(image_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4, in_channels=1)


def model() -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(CONFIG.build(), {"a": 5, "b": 1}, width=8).eval()


def test_the_backbone_runs_once_and_each_task_has_a_map_of_its_own():
    made, calls = model(), []
    made.backbone.register_forward_hook(lambda *_: calls.append(1))
    for count, size in ((2, (32, 32)), (1, (20, 37)), (0, (32, 32))):
        said = made(torch.randn(count, 1, *size))
        assert {task: x.shape for task, x in said.items()} == {"a": (count, 5, *size), "b": (count, 1, *size)}
    assert len(calls) == 3


def test_a_backbone_that_knows_tasks_lets_each_head_see_its_own_features():
    made, x = model(), torch.randn(2, 1, 32, 32)
    before = made(x)
    adapt(made, "backbone", MTLoRA(tasks=("a", "b", "c"), rank=2, task_rank=1))
    assert all(torch.equal(said, before[task]) for task, said in made(x).items())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".own.a." in name:
                parameter.add_(1.0)
    after = made(x)
    assert not torch.allclose(after["a"], before["a"])
    assert torch.equal(after["b"], before["b"])
    with pytest.raises(ValueError, match=r"not for \['d'\]"):
        features_of_tasks(made.backbone, x, ("a", "d"))


def test_both_answers_weigh_the_same_in_each_image_and_images_add_up():
    logits, truth = torch.randn(3, 4, 5), torch.randint(-1, 2, (3, 4, 5))
    truth[2] = 0  # with one answer alone
    got = balanced_cross_entropy(logits, truth)
    wanted = 0.0
    for said, true in zip(logits, truth, strict=True):
        known = true >= 0
        for answer in (0, 1):
            here = true == answer
            if here.any():
                losses = F.binary_cross_entropy_with_logits(said[here], true[here].float())
                wanted += known.sum() / 2 * losses
    torch.testing.assert_close(got, wanted)
    parts = [balanced_cross_entropy(logits[cut], truth[cut]) for cut in (slice(0, 1), slice(1, 1), slice(1, 3))]
    torch.testing.assert_close(sum(parts), got)


def test_streams_of_a_task_without_a_head_are_refused_in_training():
    made, x = model(), torch.randn(2, 1, 32, 32)
    adapt(made, "backbone", MTLoRA(tasks=(*made.heads, "depth"), rank=2, task_rank=1))
    made.eval()(x)
    with pytest.raises(ValueError, match="learns for depth, which have no head"):
        made.train()(x)
