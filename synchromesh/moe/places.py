"""Routers that see where a token lies in its map, beside what it holds."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from synchromesh.kernels import Kernels
from synchromesh.moe.routing import Places, Router, routed
from synchromesh.types import Routing


def places_of(x: Tensor) -> Places:
    """Return row and column of each token of maps, from 0 at one edge to 1 at the other: those of the cell's middle.

    Args:
        x: input of a layer, [B, H, W, D].

    Raises:
        ValueError: it is no batch of maps.

    >>> places_of(torch.zeros(1, 1, 2, 8))
    tensor([[0.5000, 0.2500],
            [0.5000, 0.7500]])
    """
    if x.dim() != 4:
        raise ValueError(
            f"a router that sees places got an input of shape {tuple(x.shape)}, wanted maps [B, H, W, D], as SwinV2, "
            "FocalNet, PVT and SpectrumNet have them: set places to 0 for other models"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = ((torch.arange(side, device=x.device, dtype=dtype) + 0.5) / side for side in x.shape[1:3])
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), 2)
    return cells.expand(len(x), -1, -1, -1).reshape(-1, 2)


def waves(places: Places, frequencies: int) -> Float[Tensor, "T F"]:
    """Return sines and cosines of pi, 2 pi, 4 pi, ... times row and column, 4 for each frequency (arXiv 2003.08934)."""
    turns = torch.pi * 2.0 ** torch.arange(frequencies, device=places.device, dtype=places.dtype)
    angles = (places[:, :, None] * turns).flatten(1)
    return torch.cat((angles.sin(), angles.cos()), 1)


class PlacedRouter(Router):
    """Another router, which is shown each token with a learnt code of its place added.

        routing = router(x + f(place) C),   f: `waves` of row and column

    Experts get x alone. Places are shares of a map's sides, so that maps of all sizes have one code. C is zero at
    first: the router begins as the other one.

    Args:
        router: the other one; it has a `width`.
        frequencies: of the waves; the finest one turns every 2^(1 - frequencies) of a side.

    Raises:
        ValueError: no frequency; in forward, no places.
    """

    undecayed = frozenset({"code"})

    def __init__(self, router: nn.Module, *, frequencies: int = 4) -> None:
        super().__init__()
        if frequencies < 1:
            raise ValueError(f"a router that sees places has {frequencies} frequencies, wanted at least 1")
        self.router, self.frequencies = router, frequencies
        self.k: int = getattr(router, "k", 1)
        self.width, self.num_experts = int(getattr(router, "width")), int(getattr(router, "num_experts"))  # noqa: B009
        self.code = nn.Parameter(torch.zeros(4 * frequencies, self.width))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.code)

    def initialize(self, std: float) -> None:
        """Keep the code at zero, whatever deviation other weights are drawn with."""
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "T D"],
        k: int | None = None,
        *,
        kernels: Kernels | None = None,
        places: Places | None = None,
    ) -> Routing:
        if places is None:
            raise ValueError("a router that sees places got none, wanted them of its layer, or those of `places_of`")
        code = waves(places, self.frequencies).to(self.code.dtype) @ self.code
        return routed(self.router, x + code.to(x.dtype), k, kernels)
