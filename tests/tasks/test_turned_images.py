import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from synchromesh.data.augment import normalize_turned
from synchromesh.data.images import Preprocess
from synchromesh.data.sources import ScikitDigits
from synchromesh.tasks.classification import Data
from synchromesh.tasks.turned_images import TurnedImage, TurnedImages
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
SIZE = Preprocess(image_size=8, channels=1, mean=(0.3,), std=(0.37,))
TASK = TurnedImages(Data(ScikitDigits(), SIZE), seen=(0.0, 90.0), unseen=(180.0,), label_smoothing=0.1)
FACTS = {"classes": ["0", "1", "2", "3"]}


class Quadrant(nn.Module):
    """Names the quarter of the picture that is brightest: top left, top right, bottom left, bottom right."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, r : r + 4, c : c + 4].mean((1, 2)) for r in (0, 4) for c in (0, 4)], 1)


def bright(quarter: int) -> Tensor:
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    row, column = 4 * (quarter // 2), 4 * (quarter % 2)
    image[:, row : row + 4, column : column + 4] = 255
    return image


def samples(*quarters: int, degrees: float = 0.0) -> list[TurnedImage]:
    return [TurnedImage(bright(quarter), quarter, torch.tensor(degrees)) for quarter in quarters]


def run() -> Run:
    model = Quadrant()
    return Run(model, model)


def test_an_image_is_turned_about_its_middle_and_black_comes_in() -> None:
    upright, turned = (normalize_turned(bright(0)[None], torch.tensor([angle]), SIZE)[0, 0] for angle in (0.0, 90.0))
    torch.testing.assert_close(upright, (bright(0)[0] / 255 - 0.3) / 0.37)
    torch.testing.assert_close(turned, torch.rot90(upright), rtol=1e-4, atol=1e-4)
    corner = normalize_turned(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([45.0]), SIZE)[0, 0, 0, 0]
    assert float(corner) == pytest.approx(-0.3 / 0.37)
    assert normalize_turned(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0), SIZE).shape == (0, 1, 8, 8)


def test_an_image_is_scored_at_every_angle_of_each_kind() -> None:
    """A quarter turn moves every bright quarter: of two seen angles one is right, of the unseen one none."""
    scorer = TASK.scorer(FACTS)
    merits = scorer.add(run(), TASK.prepare(samples(0, 3, 1), FACTS, CPU, None))
    assert merits == [0.5, 0.5, 0.5]
    assert scorer.scores([scorer.state()]).numbers == {"seen": 0.5, "unseen": 0.0}


def test_training_images_are_turned_by_seen_angles_alone_and_scored_ones_are_upright() -> None:
    splits = dataclasses.replace(TASK, seen=(10.0, 20.0)).splits(seed=0)
    drawn = {float(splits.train.read(0, lambda s=s: np.random.default_rng(s)).degrees) for s in range(20)}
    assert drawn == {10.0, 20.0}
    assert {float(splits.test.read(index).degrees) for index in range(9)} == {0.0}
    assert len(splits.test) == 397


def test_the_loss_is_that_of_the_turned_image_with_smoothed_targets() -> None:
    batch = TASK.prepare(samples(0, 2, degrees=90.0), FACTS, CPU, None)
    logits = Quadrant()(normalize_turned(batch.images, batch.degrees, SIZE))
    shares = logits.log_softmax(1)
    wanted = -(0.9 * (shares[0, 0] + shares[1, 2]) + 0.1 / 4 * shares.sum())
    assert TASK.loss(run(), batch)["cross_entropy"].total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert TASK.counts(batch) == {"cross_entropy": 2}


def test_shots_take_as_many_images_of_each_class() -> None:
    task = dataclasses.replace(TASK, data=dataclasses.replace(TASK.data, shots=2))
    assert len(task.splits(seed=0).train) == 20


def test_a_file_is_read_upright_named_and_drawn(tmp_path: Path) -> None:
    Image.fromarray(bright(2)[0].numpy()).save(tmp_path / "a.png")
    sample = TASK.open(tmp_path / "a.png")
    (answer,) = TASK.predict(run(), TASK.prepare([sample], FACTS, CPU, None), FACTS, Ask())
    assert (answer.said["class"], answer.seen) == ("2", None)
    assert Image.open(io.BytesIO(TASK.draw(sample, answer))).size >= (8, 8)
    assert TASK.cells(answer)["class"] == "2"
    (known,) = TASK.predict(run(), TASK.prepare(samples(1), FACTS, CPU, None), FACTS, Ask())
    assert TASK.verdict(known).endswith("right")


def test_a_folder_is_learned_from_and_scored_on(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for quarter in range(2):
            folder = tmp_path / part / str(quarter)
            folder.mkdir(parents=True)
            Image.fromarray(bright(quarter)[0].numpy()).save(folder / "a.png")
    splits = TASK.reading(tmp_path).splits(seed=0)
    assert (len(splits.train), splits.facts) == (2, {"classes": ["0", "1"]})
    scored = TASK.scored_on(tmp_path, splits.facts)
    assert torch.equal(scored.read(1).image, bright(1))
    assert TASK.about(splits.facts) == "2 classes, grey 8 x 8, turned by 0, 90 degrees, scored at 180 too"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"unseen": ()}, "wanted some of each"),
        ({"unseen": (30.0, 90.0)}, "and none in both"),
        ({"label_smoothing": 1.0}, "wanted 0 <= label_smoothing < 1"),
    ],
)
def test_angles_that_show_nothing_are_refused(changes, says) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TASK, **changes)
