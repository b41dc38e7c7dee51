"""Find digits on photographs, pixel by pixel: transformers' Mask2Former on a SwinV2-MoE.

python examples/mask2former.py 3000     # steps; 40 if not given, which show the loss fall and find nothing yet
"""

import sys

import torch

from synchromesh import aux_loss
from synchromesh.compat.huggingface import heads as hf
from synchromesh.data.augment import normalize
from synchromesh.data.images import Preprocess
from synchromesh.data.scenes import ComposedScenes
from synchromesh.models.heads.objects import Objects
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SWIN_MOE, SwinV2Config
from synchromesh.moe.losses import LoadBalance

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 40
SIZE = Preprocess(image_size=64, channels=1, mean=(0.2,), std=(0.2,))
EXPERTS = ExpertsConfig(
    num_experts=4, blocks=((), (), (1,)), router=LinearGate(noise=0.0), losses=(LoadBalance(0.01),), dropout=0.0
)
BACKBONE = SwinV2Config(
    image_size=64, in_channels=1, embed_dim=24, depths=(1, 1, 2), num_heads=(1, 2, 4), drop_path=0.0, init_std=0.1,
    style=SWIN_MOE, experts=EXPERTS,
)  # fmt: skip
HEAD = hf.Mask2Former(
    queries=10, width=64, heads=4, encoder_layers=1, decoder_layers=2, encoder_ffn=128, ffn=128, points=256
)


def batch(scenes, numbers):
    """Return images, their sizes, and the objects in them with their pixels."""
    found = [scenes.read(number) for number in numbers]
    images, truths = normalize(torch.stack([one.image for one in found]), SIZE), [one.truth for one in found]
    image = torch.arange(len(found)).repeat_interleave(torch.tensor([len(one) for one in truths]))
    boxes, labels, masks = (torch.cat([getattr(one, name) for one in truths]) for name in ("boxes", "labels", "masks"))
    return images, torch.full((len(found), 2), 64), Objects(image, boxes, labels, masks)


torch.manual_seed(0)
train, test = ComposedScenes(train=512, test=4, fewest=1, most=3).load(SIZE)
model = HEAD.build(BACKBONE.build(), num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
for step in range(STEPS):
    images, sizes, truth = batch(train, [(8 * step + place) % len(train) for place in range(8)])
    sums, counts = model(images, sizes, truth), HEAD.counts(len(truth), len(images))
    loss = sum(sums[name] / max(1, counts[name]) for name in sums) + aux_loss(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.2f}")
images, sizes, truth = batch(test, range(4))
with torch.inference_mode():
    for number, found in enumerate(model.eval()(images, sizes, least=0.3)):
        digits, pixels = truth.labels[truth.image == number].tolist(), found.masks.flatten(1).sum(1).tolist()
        print(f"scene {number}: digits {digits}, found {found.labels.tolist()} of {pixels} pixels")
