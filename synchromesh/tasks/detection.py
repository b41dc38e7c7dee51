"""Detection: which objects are in a picture, the box around each, and where the head says so its pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from synchromesh.data.instances import Instances
from synchromesh.data.object_sources import ObjectFiles
from synchromesh.data.scene import Scene
from synchromesh.data.scenes import ComposedScenes
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.objects import ObjectHead
from synchromesh.tasks.category_ids import CLASSES, category_ids_of
from synchromesh.tasks.object_answers import drawn, told
from synchromesh.tasks.object_batch import SceneData, Scenes, batch_of
from synchromesh.tasks.object_panels import object_panels
from synchromesh.tasks.object_scorer import BOX_NUMBERS, MASK_NUMBERS, ObjectScorer
from synchromesh.training.panels import Panel
from synchromesh.training.task import (
    Answer,
    Ask,
    Batch,
    Facts,
    Number,
    Run,
    Scorer,
    Scores,
    Split,
    Splits,
    Task,
    Term,
)

LEAST_SCORED = 0.01  # lowest probability of a box that is scored
LEAST_TOLD = 0.3  # lowest probability of a box in a prediction, where nobody asks for another


@final
@dataclass(frozen=True)
class Detection(Task):
    """Find objects, their boxes and, with a head that says masks, their pixels. A sample is a `Scene`.

    What is ignored or a crowd is neither learnt from nor missed; with a head of masks, what has no region neither.

    Attributes:
        data: which scenes.
        head: finds objects in the maps of the backbone.
    """

    data: SceneData = field(default_factory=SceneData)
    head: ObjectHead = field(default_factory=CentreBoxes)

    unit = "scenes"
    pipeline = "object-detection"

    @property
    def numbers(self) -> tuple[Number, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """AP of boxes, and where the head says masks, of these too."""
        return (*BOX_NUMBERS, *MASK_NUMBERS) if self.head.says_masks else BOX_NUMBERS

    def splits(self, *, seed: int) -> Splits:
        return self.data.splits(masks=self.head.says_masks, seed=seed)

    def reading(self, folder: Path) -> Detection:
        """Return this task on a json file or a folder; composed scenes on backgrounds from a folder of photographs."""
        return dataclasses.replace(self, data=self.data.on(folder))

    def with_pictures(self, folder: Path) -> Detection:
        if not isinstance(self.data.source, ObjectFiles):
            return super().with_pictures(folder)  # pyright: ignore[reportReturnType]
        source = dataclasses.replace(self.data.source, images=folder)
        return dataclasses.replace(self, data=dataclasses.replace(self.data, source=source))

    def scored_on(self, folder: Path, facts: Facts) -> Split:
        return self.data.scored_on(folder, facts[CLASSES], masks=self.head.says_masks)

    def sized(self, backbone: BackboneConfig) -> BackboneConfig:
        size = self.data.preprocess
        return backbone.sized(image_size=size.image_size, channels=size.channels)

    def build(self, backbone: BackboneConfig, facts: Facts) -> nn.Module:
        return self.head.build(backbone.build(), len(facts[CLASSES]))

    def prepare(
        self, samples: Sequence[Any], facts: Facts, device: torch.device, rng: np.random.Generator | None
    ) -> Scenes:
        known = rng is not None or isinstance(self.data.source, ComposedScenes)
        masks = self.head.says_masks and known
        return batch_of(samples, self.data, device, learning=rng is not None, masks=masks)

    def shaped(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Return the batch so small that its crops fit into one of the sizes of the data's moves."""
        moves = self.data.moves
        if moves is None or len(moves.sizes) == 1:
            return batch
        assert isinstance(batch, Scenes)
        return batch.resized(moves.shrunk(moves.sizes[int(rng.integers(len(moves.sizes)))]))

    def counts(self, batch: Batch) -> Mapping[str, int]:
        assert isinstance(batch, Scenes)
        return self.head.counts(sum(len(own) for own in batch.labels), len(batch))

    def loss(self, run: Run, batch: Batch) -> Mapping[str, Term]:
        """Return the losses of the head, each a sum over what `counts` says."""
        assert isinstance(batch, Scenes)
        sums, weights = run(batch.images, batch.image_sizes(), batch.objects()), self.head.weights()
        return {name: Term(total, weights[name]) for name, total in sums.items()}

    def scorer(self, facts: Facts) -> Scorer:
        found = partial(self.found, least=LEAST_SCORED)
        return ObjectScorer(found, facts[CLASSES], masks=self.head.says_masks, least_told=LEAST_TOLD)

    def found(self, run: Run, batch: Batch, *, least: float) -> list[Instances]:
        """Run the model and return the objects of each picture."""
        assert isinstance(batch, Scenes)
        # Without a picture it runs too: other ranks wait for its part in their exchanges.
        seen = run(batch.images, batch.image_sizes(), least=least)
        masks = [one.masks if self.head.says_masks else None for one in seen]
        return [
            Instances(one.boxes.cpu(), one.labels.cpu(), one.scores.cpu(), None if mask is None else mask.cpu())
            for one, mask in zip(seen, masks, strict=True)
        ]

    def open(self, path: Path) -> Scene:
        """Read a picture of any size, as those that are scored."""
        return self.data.open(path)

    def predict(self, run: Run, batch: Batch, facts: Facts, ask: Ask) -> list[Answer]:
        assert isinstance(batch, Scenes)
        found = self.found(run, batch, least=LEAST_TOLD if ask.least is None else ask.least)
        pictures, moves = batch.pictures or (None,) * len(batch), batch.moves or (None,) * len(batch)
        as_given = [
            told(one, scale, move, whole=picture is not None).first(ask.top)
            for one, scale, picture, move in zip(found, batch.scales, pictures, moves, strict=True)
        ]
        return [Answer(one.said(facts[CLASSES]), one) for one in as_given]

    def records(self, answer: Answer, facts: Facts) -> Sequence[Mapping[str, Any]]:
        """Return an answer as COCO's result files have it, by the category ids of the data it was trained on."""
        return answer.seen.results(category_ids_of(facts))

    def records_head(self, facts: Facts) -> Mapping[str, Any]:
        named = zip(category_ids_of(facts), facts[CLASSES], strict=True)
        return {"categories": [{"id": number, "name": name} for number, name in named]}

    def cells(self, answer: Answer) -> Mapping[str, str]:
        names = [f"{one['class']} {one['probability']:.0%}" for one in answer.said["objects"]]
        return {"objects": str(len(names)), "what": ", ".join(names) or "-"}

    def draw(self, sample: Any, answer: Answer) -> bytes:
        """Draw what was found in colour, and the truth, where it is known, in white."""
        return drawn(sample, answer.said["objects"])

    def pictures_by_default(self) -> bool:
        return True

    def about(self, facts: Facts) -> str:
        return f"{len(facts[CLASSES]):,} classes"

    def panels(self, scores: Scores) -> Sequence[Panel]:
        return object_panels(scores.details)
