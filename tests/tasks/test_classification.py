import dataclasses
import io
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from synchromesh.data.augment import Affine, Augment
from synchromesh.data.images import MemoryImages, Preprocess, RandomCrop
from synchromesh.data.mixing import Mixing
from synchromesh.data.sources import ImageFolder, ScikitDigits
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.tasks.classification import LISTED_CLASSES, Classification, Data, LabelledImages
from synchromesh.training.task import Answer, Ask, Batch, Run, Scores

CPU = torch.device("cpu")
NAMES = ["ant", "bee", "cat", "dog", "eel"]
FACTS = {"classes": NAMES}
SIZE = Preprocess(image_size=8, channels=1, mean=(0.2,), std=(0.3,))
TASK = Classification(Data(ScikitDigits(), SIZE), Augment(), label_smoothing=0.1)


def samples(*labels: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randint(0, 256, (1, 8, 8), generator=generator, dtype=torch.uint8), label) for label in labels]


class Fixed(nn.Module):
    """Says these logits of the images that it gets, in their order."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.next = nn.Parameter(logits), 0

    def forward(self, images: Tensor) -> Tensor:
        self.next += len(images)
        return self.logits[self.next - len(images) : self.next]


def said(logits: Tensor) -> Run:
    model = Fixed(logits)
    return Run(model, model)


def softmax(logits: list[float]) -> list[float]:
    shares = [math.exp(value) for value in logits]
    return [share / sum(shares) for share in shares]


def training_batch(labels: list[int], task: Classification = TASK) -> Batch:
    return task.prepare(samples(*labels), FACTS, CPU, np.random.default_rng(0))


def test_what_is_scored_is_normalised_and_nothing_else() -> None:
    some = samples(3, 0)
    batch = dataclasses.replace(TASK, augment=Augment(affine=Affine())).prepare(some, FACTS, CPU, None)
    for (image, _), got in zip(some, batch.images, strict=True):
        assert torch.allclose(got, (image / 255 - 0.2) / 0.3, atol=1e-6)
    assert batch.labels.tolist() == [3, 0]
    assert batch.targets is None


def test_targets_are_the_label_and_a_share_of_all_classes() -> None:
    batch = training_batch([4, 1])
    for label, target in zip([4, 1], batch.targets.tolist(), strict=True):
        assert target == pytest.approx([0.1 / 5 + (0.9 if i == label else 0.0) for i in range(5)])


def test_mixed_images_have_mixed_targets_and_their_own_labels() -> None:
    batch = training_batch([4, 1, 1, 0], dataclasses.replace(TASK, augment=Augment(mixing=Mixing(cutmix=0.0))))
    plain = training_batch([4, 1, 1, 0])
    assert batch.labels.tolist() == [4, 1, 1, 0]
    assert torch.allclose(batch.targets.sum(1), torch.ones(4))
    gap = plain.images.flip(0) - plain.images
    shares = ((batch.images - plain.images) * gap).flatten(1).sum(1) / gap.square().flatten(1).sum(1)
    assert 0.01 < float(shares[0]) < 0.99
    assert torch.allclose(shares, shares[0].expand(4), atol=1e-4)
    assert torch.allclose(batch.targets, torch.lerp(plain.targets, plain.targets.flip(0), shares[0]), atol=1e-4)


def test_the_loss_is_the_cross_entropy_with_the_targets_and_what_is_right_is_only_watched() -> None:
    labels, logits = [4, 1, 1, 0], torch.randn(4, 5)
    logits[2, 1] = 9.0
    batch = training_batch(labels)
    total = right = 0.0
    for row, target in zip(logits.tolist(), batch.targets.tolist(), strict=True):
        total -= sum(t * math.log(share) for t, share in zip(target, softmax(row), strict=True))
        right += max(range(5), key=row.__getitem__) == max(range(5), key=target.__getitem__)
    terms = TASK.loss(said(logits), batch)
    assert terms["cross_entropy"].total.item() == pytest.approx(total, rel=1e-5)
    assert terms["cross_entropy"].weight == 1
    assert (terms["accuracy"].total.item(), terms["accuracy"].weight) == (right, 0)
    assert 0 < right < 4


def test_counts_and_losses_of_the_parts_of_a_batch_add_up_to_those_of_all() -> None:
    batch, logits = training_batch([4, 1, 1, 0, 2]), torch.randn(5, 5)
    whole, run = TASK.loss(said(logits), batch), said(logits)
    parts = [batch.part(start, stop) for start, stop in ((0, 2), (2, 2), (2, 5))]
    own = [TASK.loss(run, part) for part in parts]
    for name, term in whole.items():
        assert sum(TASK.counts(part)[name] for part in parts) == TASK.counts(batch)[name] == 5
        assert sum(one[name].total.item() for one in own) == pytest.approx(term.total.item(), rel=1e-5)


LABELS = [0, 1, 1, 3, 0, 3, 3, 1, 0, 0, 3]


def by_loops(logits: Tensor) -> tuple[dict[str, float], dict[str, dict[str, float]], list[float]]:
    """Return the numbers, those of each class, and how sure each answer was: less than 0 where it was wrong."""
    count, right, loss, merits = [0] * 5, [0] * 5, 0.0, []
    for row, label in zip(logits.tolist(), LABELS, strict=True):
        hit = row[label] == max(row)
        count[label] += 1
        right[label] += hit
        loss -= math.log(softmax(row)[label])
        merits.append(max(softmax(row)) * (1 if hit else -1))
    classes = {
        name: {"images": own, "accuracy": hit / own if own else 0.0}
        for name, own, hit in zip(NAMES, count, right, strict=True)
    }
    return {"loss": loss / len(LABELS), "accuracy": sum(right) / len(LABELS)}, classes, merits


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(0, 11), (0, 5, 11), (0, 4, 4, 11)])
def test_scores_are_those_of_a_count_image_by_image_however_ranks_share_them(cuts: tuple[int, ...]) -> None:
    logits = torch.randn(len(LABELS), 5) * 2
    numbers, classes, merits = by_loops(logits)
    states, found = [], []
    for start, stop in itertools.pairwise(cuts):
        scorer = TASK.scorer(FACTS)
        for first in range(start, stop, 3):  # batch by batch
            last = min(first + 3, stop)
            found += scorer.add(said(logits[first:last]), TASK.prepare(samples(*LABELS[first:last]), FACTS, CPU, None))
        assert list(scorer.add(said(logits[:0]), TASK.prepare([], FACTS, CPU, None))) == []
        states.append(scorer.state())
    scores = TASK.scorer(FACTS).scores(states)
    assert scores.numbers == pytest.approx(numbers, rel=1e-5)
    assert scores.details["classes"] == classes
    taken = [(NAMES[label], NAMES[row.index(max(row))]) for label, row in zip(LABELS, logits.tolist(), strict=True)]
    wrong = Counter(pair for pair in taken if pair[0] != pair[1])
    assert {(one["truth"], one["found"]): one["count"] for one in scores.details["confused"]} == wrong
    assert found == pytest.approx(merits, rel=1e-5)
    assert 0 < numbers["accuracy"] < 1


@torch.no_grad()
def test_an_answer_names_the_likeliest_classes_first() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0], [5.0, 0.0, 0.0, 0.0, 0.1]])
    batch = TASK.prepare(samples(-1, -1), FACTS, CPU, None)
    first, second = TASK.predict(said(logits), batch, FACTS, Ask())
    assert [one["class"] for one in first.said["top"]] == ["bee", "dog", "cat"]
    assert first.said["class"] == "bee"
    assert [one["probability"] for one in first.said["top"]] == pytest.approx(
        sorted(softmax([0.0, 3.0, 1.0, 2.0, -1.0]))[::-1][:3], abs=1e-6
    )
    assert second.said["class"] == "ant"
    every = TASK.predict(said(logits), batch, FACTS, Ask(top=9))[0].said["top"]
    assert [one["class"] for one in every] == ["bee", "dog", "cat", "ant", "eel"]
    likely = TASK.predict(said(logits), batch, FACTS, Ask(least=0.2))[0]
    assert [one["class"] for one in likely.said["top"]] == ["bee", "dog"]
    none = TASK.predict(said(logits), batch, FACTS, Ask(least=0.9))[0]
    assert none.said == {"class": "bee", "top": []}
    assert TASK.cells(likely) == {"class": "bee", "probability": "63.6%", "then": "dog 23.4%"}
    assert TASK.cells(none) == {"class": "bee", "probability": "-", "then": ""}


@torch.no_grad()
def test_a_verdict_tells_the_truth_beside_the_answer_and_needs_no_second_caption() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]] * 3)
    some = samples(1, 3, -1)
    answers = TASK.predict(said(logits), TASK.prepare(some, FACTS, CPU, None), FACTS, Ask())
    assert [TASK.verdict(answer) for answer in answers] == ["bee (63.6%), right", "dog, taken for bee (63.6%)", ""]
    heights = [Image.open(io.BytesIO(TASK.draw(one, answer))).height for one, answer in zip(some, answers, strict=True)]
    assert heights[0] == heights[1] < heights[2]  # a file of unknown truth has its caption in the picture


def test_a_picture_shows_the_image_larger_and_the_answer_below() -> None:
    ((image, _),) = samples(1)
    answer = Answer({"class": "bee", "top": [{"class": "bee", "probability": 0.5}]})
    drawn = np.array(Image.open(io.BytesIO(TASK.draw((image, 1), answer))).convert("L"))
    times = drawn.shape[1] // 8
    assert drawn.shape[0] > 8 * times > 8
    assert np.array_equal(drawn[: 8 * times : times, : 8 * times : times], image[0].numpy())
    other = Answer({"class": "cat", "top": [{"class": "cat", "probability": 0.5}]})
    again = np.array(Image.open(io.BytesIO(TASK.draw((image, 1), other))).convert("L"))
    assert np.array_equal(drawn[: 8 * times], again[: 8 * times])
    assert not np.array_equal(drawn[8 * times :], again[8 * times :])


def test_the_report_lists_the_hardest_classes_first_and_no_more_than_fit() -> None:
    classes = {f"c{i}": {"images": 10, "accuracy": ((i * 7) % 30) / 30} for i in range(30)}
    classes["c4"] = {"images": 0, "accuracy": 0.0}
    (sheet,) = TASK.panels(Scores({}, {"classes": classes, "confused": []}))
    shown = [classes[name]["accuracy"] for name, *_ in sheet.rows]
    assert shown == sorted(own["accuracy"] for own in classes.values())[:LISTED_CLASSES]
    assert sheet.rows[0] == ("c4", "0", "-", "-", "-")  # none of it was scored


def test_shots_are_so_many_images_of_each_class_chosen_by_the_seed() -> None:
    few = dataclasses.replace(TASK, data=Data(ScikitDigits(), SIZE, shots=3))
    first, again, other = (few.splits(seed=seed) for seed in (1, 1, 2))
    assert first.train.images.labels.bincount().tolist() == [3] * 10
    assert torch.equal(first.train.images.images, again.train.images.images)
    assert not torch.equal(first.train.images.images, other.train.images.images)
    assert len(first.test) == len(TASK.splits(seed=0).test) == 397
    assert first.facts == {"classes": [str(digit) for digit in range(10)]}


def test_only_training_images_are_cropped_at_random() -> None:
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    images = MemoryImages(torch.tensor([2]), tuple(NAMES), SIZE, pixels)
    split = LabelledImages(images, RandomCrop(scale=(0.2, 0.4)))
    whole, label = split.read(0)
    assert torch.equal(whole, pixels[0])
    assert label == 2
    cut, _ = split.read(0, lambda: np.random.default_rng(0))
    assert cut.shape == whole.shape
    assert not torch.equal(cut, whole)
    assert torch.equal(LabelledImages(images).read(0, lambda: np.random.default_rng(0))[0], whole)


def test_a_folder_takes_the_place_of_the_data_and_nothing_else(photo, tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        for number in range(2):
            photo(tmp_path / "train" / name / f"{number}.png", seed=number)
        photo(tmp_path / "val" / name / "0.png", seed=9)
    there = TASK.reading(tmp_path)
    assert there == dataclasses.replace(TASK, data=Data(ImageFolder(tmp_path), SIZE))
    splits = there.splits(seed=0)
    assert (len(splits.train), len(splits.test), splits.facts) == (4, 2, {"classes": ["ant", "bee"]})
    scored = TASK.scored_on(tmp_path, FACTS)
    assert [scored.read(i)[1] for i in range(len(scored))] == [0, 1]  # numbers of the model's classes
    assert TASK.open(tmp_path / "val" / "ant" / "0.png")[1] == -1


def test_the_model_has_a_logit_for_each_class_and_the_size_of_the_images() -> None:
    swin = SwinV2Config(embed_dim=8, depths=(1,), num_heads=(1,), patch_size=4, window_size=2)
    sized = TASK.sized(swin)
    assert (sized.image_size, sized.in_channels) == (8, 1)
    assert TASK.build(sized, FACTS).eval()(torch.zeros(3, 1, 8, 8)).shape == (3, 5)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_smoothing_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="wanted 0 <= label_smoothing < 1"):
        Classification(label_smoothing=share)
