"""Classifier: a linear head on what a backbone pools."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.models.features import Backbone
from synchromesh.models.initialize import initialize_own


class Classifier(nn.Module):
    """Images to logits.

    Args:
        backbone: sees the images.
        num_classes: N.

    Raises:
        ValueError: there are no classes.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, wanted an integer >= 1")
        self.backbone = backbone
        self.head = nn.Linear(backbone.widths[-1], num_classes)
        initialize_own(self.head, backbone.init_std)

    def reset_parameters(self) -> None:
        """Initialise backbone and head."""
        self.backbone.reset_parameters()
        initialize_own(self.head, self.backbone.init_std)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
        return self.head(self.backbone(images).pooled)
