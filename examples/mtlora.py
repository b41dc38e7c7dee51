"""MTLoRA: two dense tasks learn on one frozen backbone, each with its own updates of low rank, in one pass."""

import torch
import torch.nn.functional as F

from synchromesh import MTLoRA
from synchromesh.adapt.adaptation import adapt
from synchromesh.models.heads.multi_task import MultiTaskModel
from synchromesh.models.swin_v2 import SwinV2Config

torch.manual_seed(0)
config = SwinV2Config(image_size=32, in_channels=1, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4)


def squares(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures of bright squares in noise, and where these are."""
    inside = torch.zeros(count, 32, 32)
    for one, (top, left) in zip(inside, torch.randint(2, 18, (count, 2)).tolist(), strict=True):
        one[top : top + 12, left : left + 12] = 1
    return (inside + 0.5 * torch.randn(count, 32, 32))[:, None], inside


model = MultiTaskModel(config.build(), {"inside": 1, "edges": 1}, width=16)
images, _ = squares(4)
before = model.eval()(images)
adaptation = adapt(model, "backbone", MTLoRA(tasks=("inside", "edges"), rank=8, task_rank=2))
assert all(torch.equal(said, before[task]) for task, said in model(images).items())  # bit for bit

learns = [p for p in model.parameters() if p.requires_grad]
whole = sum(p.numel() for p in model.backbone.parameters())
print(f"{sum(p.numel() for p in adaptation.trained().values()):,} of the backbone's {whole:,} numbers learn")
optimizer = torch.optim.AdamW(learns, lr=5e-3)
for step in range(60):
    images, inside = squares(8)
    edges = (F.max_pool2d(inside[:, None], 3, 1, 1)[:, 0] > inside).float()
    said = model.train()(images)
    losses = {
        task: F.binary_cross_entropy_with_logits(said[task][:, 0], truth)
        for task, truth in (("inside", inside), ("edges", edges))
    }
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    if step % 20 == 19:
        print(", ".join(f"{task} {loss.item():.3f}" for task, loss in losses.items()))

shared = model.eval().backbone(images).last
adaptation.merge()  # the backbone with what both tasks share
assert torch.allclose(model.backbone(images).last, shared, atol=1e-4)
