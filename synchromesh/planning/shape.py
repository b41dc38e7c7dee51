"""What a planner knows of a model: its MoE layers, kind by kind, and the size of the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from synchromesh.types import Workload


@dataclass(frozen=True)
class LayerKind:
    """MoE layers of one shape.

    Attributes:
        name: for people.
        count: how many of them the model has.
        tokens: that each gets from one sample.
        work: of one layer; its rows and training are not read.
    """

    name: str
    count: int
    tokens: int
    work: Workload

    def with_samples(self, samples: int, *, training: bool) -> Workload:
        """Return the work of one layer for so many samples of a rank."""
        return dataclasses.replace(self.work, rows=self.tokens * samples, training=training)


@dataclass(frozen=True)
class ModelShape:
    """What a planner knows of a model.

    Attributes:
        name: for people.
        unit: what a batch is counted in, "image" or "sequence".
        layers: its MoE layers, kind by kind.
        dense_products: multiply-adds of one sample's forward in the dense part, which is all but the experts.
        dense_parameters: of the dense part.
        dense_saved: numbers that the dense part keeps for the backward of one sample.
        dense_share: of the peak of products that the dense part reaches, in forward and in training; a calibration.
        calibrated_by: where dense_share is from.
        blocks: that are recomputed, and whose dense parameters FSDP gathers, one at a time.
        block_inputs: numbers of one sample that go into all blocks together: all that recomputed blocks keep.
    """

    name: str
    unit: str
    layers: tuple[LayerKind, ...]
    dense_products: float
    dense_parameters: float
    dense_saved: float
    dense_share: tuple[float, float]
    calibrated_by: str
    blocks: int = 1
    block_inputs: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of products and of what is kept."""
        return self.layers[0].work.dtype if self.layers else torch.bfloat16
