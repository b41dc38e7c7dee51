"""What every task keeps to, and what the loop makes of what it says."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from synchromesh.data.augment import Affine, Augment
from synchromesh.data.images import Preprocess, RandomCrop
from synchromesh.data.mixing import Mixing
from synchromesh.data.moves import RandomMoves
from synchromesh.data.pixel_sources import ReaderPair
from synchromesh.data.scenes import ComposedScenes
from synchromesh.data.sources import ScikitDigits
from synchromesh.data.stereo_pair import StereoPair
from synchromesh.data.view_pairs import ViewData
from synchromesh.errors import InputError
from synchromesh.models.features import BackboneConfig
from synchromesh.models.heads.centre_boxes import CentreBoxes
from synchromesh.models.heads.centre_panoptic import CentrePanoptic
from synchromesh.models.heads.dense_twins import Siamese
from synchromesh.models.heads.depth import DepthFPN
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.models.vit import Pooling, Positions, ViTConfig
from synchromesh.models.vit_decoder import ViTDecoderConfig
from synchromesh.parallel.comm.grid import Grid
from synchromesh.parallel.parallelize import parallelize
from synchromesh.recipes.catalog import CATALOG
from synchromesh.tasks.classification import Classification, Data
from synchromesh.tasks.croco import CroCo
from synchromesh.tasks.dense_twins import ViewTwins
from synchromesh.tasks.depth import Depth
from synchromesh.tasks.detection import Detection
from synchromesh.tasks.disparity import Disparity
from synchromesh.tasks.mixed_ae import MixedAE
from synchromesh.tasks.multi_task import MultiTask
from synchromesh.tasks.object_batch import SceneData
from synchromesh.tasks.panoptic import Panoptic
from synchromesh.tasks.pixels import PixelData
from synchromesh.tasks.segmentation import Segmentation
from synchromesh.tasks.simmim import CropData, SimMIM
from synchromesh.tasks.turned_images import TurnedImages
from synchromesh.tasks.view_pairs import PairData
from synchromesh.testing.compare import assert_close
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.agree import ALONE, counted
from synchromesh.training.config import TrainConfig
from synchromesh.training.optim import Optim, build_optimizer
from synchromesh.training.step import Counts, StepNumbers, Trainee, train_step
from synchromesh.training.task import Answer, Ask, Batch, Number, Run, Scorer, Split, Splits, Task, Term

CPU = torch.device("cpu")
SWIN = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4, drop_path=0.0)
VIT = ViTConfig(patch_size=16, width=8, depth=2, num_heads=2, pooling=Pooling.MEAN, positions=Positions.ROTARY)
DECODER = ViTDecoderConfig(width=8, depth=1, num_heads=2)


@dataclasses.dataclass(frozen=True)
class Marked(Batch):
    """Vectors, each with some marks, perhaps none."""

    seen: Tensor | None
    x: Tensor
    marks: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Marks(Task):
    """A linear model comes near to its marks; its outputs are kept small, and it is watched how many are positive."""

    also: str = "size"

    numbers = (Number("distance", "distance", more_is_better=False),)

    def splits(self, *, seed: int) -> Splits:
        raise NotImplementedError  # steps are taken by hand: no run asks

    def build(self, backbone: Any, facts: Any) -> nn.Module:
        return nn.Linear(3, 1)

    def prepare(self, samples: Any, facts: Any, device: torch.device, rng: np.random.Generator | None) -> Marked:
        return Marked(None, torch.stack([x for x, _ in samples]).to(device), tuple(marks for _, marks in samples))

    def counts(self, batch: Batch) -> dict[str, int]:
        assert isinstance(batch, Marked)
        return {"near": sum(map(len, batch.marks)), self.also: len(batch), "positive": len(batch)}

    def loss(self, run: Run, batch: Batch) -> dict[str, Term]:
        assert isinstance(batch, Marked)
        y = run(batch.x)[:, 0]
        own = [(value - marks).square().sum() for value, marks in zip(y, batch.marks, strict=True)]
        near = torch.stack(own).sum() if own else y.sum()
        return {"near": Term(near), "size": Term(y.square().sum(), 0.25), "positive": Term((y > 0).sum(), 0.0)}

    def scorer(self, facts: Any) -> Scorer:
        raise NotImplementedError  # steps are taken by hand: no run asks

    def predict(self, run: Run, batch: Batch, facts: Any, ask: Any) -> list[Answer]:
        raise NotImplementedError  # steps are taken by hand: no run asks


def marked(*sizes: int) -> Marked:
    """Return a batch of samples with so many marks."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(len(sizes), 3, generator=generator, dtype=torch.float64)
    return Marked(None, x, tuple(torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes))


def model_of() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def step(batch: Marked, grid: Grid, parts: int, task: Task = Marks()) -> tuple[StepNumbers, dict[str, Tensor]]:
    """Take a step as the loop does; return its numbers and the gradients of the whole batch."""
    optim = Optim(clip_norm=0.0)
    config = TrainConfig("marks", task, SWIN, optim=optim, batch_size=12, accumulate=parts, bf16=False)
    model, own = model_of(), task.counts(batch)
    samples, *terms = counted(grid, [len(batch), *own.values()], CPU)
    numbers = train_step(
        Trainee(model, parallelize(model, grid), grid), build_optimizer(model, optim), batch, config, step=0, rate=0.0,
        counts=Counts(samples, dict(zip(own, terms, strict=True))), device=CPU,
    )  # fmt: skip
    return numbers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def defined(batch: Marked) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the mean over all marks and over all samples, mark by mark, and the gradients of the loss."""
    model = model_of()
    near, size, count = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for x, marks in zip(batch.x, batch.marks, strict=True):
        y = model(x)[0]
        for mark in marks:
            near, count = near + (y - mark) ** 2, count + 1
        size = size + y**2
    loss = near / max(1, count) + 0.25 * size / len(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), "near": near.item(), "size": size.item()}, gradients


class NoSamples:
    def __len__(self) -> int:
        return 0

    def read(self, index: int, draw: Any = None) -> Any:
        raise IndexError(index)


def test_a_note_that_both_parts_of_a_folder_bring_is_kept_once_where_it_stood_first() -> None:
    splits = Splits(NoSamples(), NoSamples(), notes=("left out: b", "left out: a", "left out: b", "other"))
    assert splits.notes == ("left out: b", "left out: a", "other")
    assert dataclasses.replace(splits, notes=("a", "a")).notes == ("a",)


UNEVEN = (0, 3, 1, 0, 0, 2, 7, 0)


@pytest.mark.parametrize("sizes", [UNEVEN, (0, 0, 0, 0)], ids=["some", "none"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_term_is_divided_by_its_own_count_over_all_parts_of_a_batch(sizes: tuple[int, ...], parts: int) -> None:
    numbers, gradients = step(marked(*sizes), ALONE, parts)
    said, wanted = defined(marked(*sizes))
    assert numbers.loss == pytest.approx(said["loss"], rel=1e-9)
    assert numbers.sums["near"] == pytest.approx(said["near"], rel=1e-9)
    assert numbers.counts == {"near": sum(sizes), "size": len(sizes), "positive": len(sizes)}
    for name, gradient in wanted.items():
        assert_close(name, gradients[name], gradient)


def on_rank(cuts: list[int], parts: int) -> tuple[StepNumbers, dict[str, np.ndarray]]:
    grid = Grid(dist.group.WORLD)
    numbers, gradients = step(marked(*UNEVEN).part(cuts[grid.rank], cuts[grid.rank + 1]), grid, parts)
    return numbers, {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize(("cuts", "parts"), [([0, 1, 8], 1), ([0, 5, 5, 8], 1), ([0, 5, 8], 2)])
def test_ranks_with_other_numbers_of_marks_and_samples_take_the_step_of_one_process(
    cuts: list[int], parts: int
) -> None:
    """One of the ranks has samples without a mark, or no sample at all."""
    said, wanted = defined(marked(*UNEVEN))
    for numbers, gradients in run_ranks(on_rank, len(cuts) - 1, cuts, parts):
        assert numbers.loss == pytest.approx(said["loss"], rel=1e-9)
        assert (numbers.samples, numbers.counts["near"]) == (8, 13)
        for name, gradient in wanted.items():
            assert_close(name, torch.from_numpy(gradients[name]), gradient)


def test_what_is_only_watched_is_counted_and_no_part_of_the_loss() -> None:
    numbers, _ = step(marked(*UNEVEN), ALONE, 2)
    assert numbers.watched == {"positive"}
    assert numbers.sums["positive"] == int((model_of()(marked(*UNEVEN).x) > 0).sum())
    terms = [numbers.sums[name] / numbers.counts[name] * weight for name, weight in (("near", 1.0), ("size", 0.25))]
    assert numbers.loss == numbers.task_loss == pytest.approx(sum(terms), rel=1e-12)


def test_a_term_without_a_count_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Marks\.loss returned the terms .*'size'.*wanted .*'length'"):
        step(marked(1, 2), ALONE, 1, Marks(also="length"))


def test_a_batch_is_cut_and_moved_with_all_that_is_in_it() -> None:
    batch = marked(0, 3, 1)
    assert len(batch) == 3  # a field that is None does not count
    part = batch.part(1, 9)
    assert part.seen is None
    assert torch.equal(part.x, batch.x[1:])
    assert [len(marks) for marks in part.marks] == [3, 1]
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for value in (moved.x, *moved.marks)} == {"meta"}
    assert len(batch.part(3, 3)) == 0


def test_the_better_score_is_the_larger_one_or_the_smaller_one_and_any_beats_none() -> None:
    high, low = Number("a", "a"), Number("b", "b", more_is_better=False)
    assert high.better(0.0, None)
    assert low.better(9.0, None)
    assert high.better(0.2, 0.1)
    assert not high.better(0.1, 0.1)
    assert low.better(0.1, 0.2)
    assert not low.better(0.2, 0.1)


def test_a_number_is_said_with_its_title_and_its_unit() -> None:
    number = Number("loss", "test loss", "{:.2f}", "nats")
    assert number.said(1.234) == "test loss 1.23 nats"
    assert (number.heading, Number("a", "A").heading) == ("test loss, nats", "A")


def test_what_a_task_does_without_is_an_error_that_names_the_method(tmp_path: Path) -> None:
    for method, call in {
        "reading": lambda: Marks().reading(tmp_path),
        "with_pictures": lambda: Marks().with_pictures(tmp_path),
        "scored_on": lambda: Marks().scored_on(tmp_path, {}),
        "open": lambda: Marks().open(tmp_path / "a.png"),
    }.items():
        with pytest.raises(InputError, match=f"the task Marks .* it has no method `{method}`"):
            call()
    assert Marks().draw(None, Answer({})) is None
    assert Marks().cells(Answer({"near": 0.5, "what": "it"})) == {"near": "0.5", "what": "it"}


# What the library's own tasks keep to.

SCENES = ComposedScenes(train=4, test=3, fewest=1)
SHIPPED = {
    "classification": Classification(
        Data(ScikitDigits(), Preprocess(image_size=16)), Augment(crop=RandomCrop(), affine=Affine(), mixing=Mixing())
    ),
    "turned": TurnedImages(Data(ScikitDigits(), Preprocess(image_size=16))),
    "detection": Detection(SceneData(SCENES, Preprocess(image_size=64))),
    "segmentation": Segmentation(PixelData(SCENES, Preprocess(image_size=64)), SemanticFPN(width=8)),
    "panoptic": Panoptic(
        PixelData(SCENES, Preprocess(image_size=64)),
        CentrePanoptic(CentreBoxes(width=8, masks=True), SemanticFPN(width=8)),
    ),
    "multi_task": MultiTask(PixelData(SCENES, Preprocess(image_size=64)), width=8),
    "depth": Depth(
        PixelData(
            ReaderPair(StereoPair("train", crops=4), StereoPair("test", side=100)),
            Preprocess(image_size=64),
            moves=RandomMoves(sizes=((64, 64),), scale=(1.2, 2.5)),
        ),
        DepthFPN(width=8),
    ),
    "simmim": SimMIM(CropData(train=4, test=3), cell=16),
    "view_twins": ViewTwins(ViewData(train=4, test=3), Siamese(width=8, hidden=16)),
    "croco": CroCo(PairData(train=4, test=3), DECODER),
    "disparity": Disparity(PairData(also=None, train=4, test=3), DECODER),
    "mixed_ae": MixedAE(CropData(train=4, test=3), dataclasses.replace(DECODER, cross=False)),
}
ENCODE_SOME = (CroCo, Disparity, MixedAE)  # whose encoder sees some patches alone
OURS = pytest.mark.parametrize("task", SHIPPED.values(), ids=SHIPPED)


def backbone_of(task: Task) -> BackboneConfig:
    """Return a small backbone that the task can stand on."""
    return VIT if isinstance(task, ENCODE_SOME) else SWIN


def numbers_in(sample: Any) -> Iterator[list[float]]:
    """Yield what is in a sample."""
    if isinstance(sample, Tensor):
        yield sample.flatten().tolist()
    elif dataclasses.is_dataclass(sample):
        yield from numbers_in([getattr(sample, field.name) for field in dataclasses.fields(sample)])
    elif isinstance(sample, (tuple, list)):
        for one in sample:
            yield from numbers_in(one)


def test_all_tasks_of_the_catalog_are_tested_here() -> None:
    assert {type(task) for task in SHIPPED.values()} == set(CATALOG.kinds[Task])


@OURS
def test_a_sample_is_that_of_its_number_and_of_what_is_drawn(task: Task) -> None:
    splits = task.splits(seed=0)
    for split in (splits.train, splits.test):
        assert isinstance(split, Split)
        assert len(split) >= 3
        first, second = (list(numbers_in(split.read(index))) for index in (0, 2))
        assert first != second or isinstance(task, Depth)  # whose one picture is cut at random
        assert list(numbers_in(split.read(0))) == first
    drawn = [list(numbers_in(splits.train.read(1, lambda s=s: np.random.default_rng(s)))) for s in (3, 3, 4)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] or isinstance(task, Detection)  # whose scenes are what they are


@OURS
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_holds_every_sample_and_may_hold_none(task: Task, training: bool) -> None:
    splits = task.splits(seed=0)
    rng = np.random.default_rng(0) if training else None
    samples = [splits.train.read(index) for index in range(3)]
    whole, none = (task.prepare(some, splits.facts, CPU, rng) for some in (samples, []))
    assert (len(whole), len(none)) == (3, 0)
    assert min(task.counts(whole).values()) > 0
    assert set(task.counts(none).values()) == {0}
    assert task.counts(none).keys() == task.counts(whole).keys()


@OURS
def test_a_rank_without_samples_reaches_the_parameters_that_the_others_reach(task: Task) -> None:
    """Where gradients are averaged over ranks, one that left a parameter out would keep the others waiting."""
    splits = task.splits(seed=0)
    model = task.build(task.sized(backbone_of(task)), splits.facts).train()
    reached = []
    for count in (2, 0):
        model.zero_grad()
        samples = [splits.train.read(index) for index in range(count)]
        batch = task.prepare(samples, splits.facts, CPU, np.random.default_rng(0))
        terms = task.loss(Run(model, model), batch)
        assert terms.keys() == task.counts(batch).keys()
        torch.stack([term.total * term.weight for term in terms.values() if term.weight]).sum().backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert reached[0] == reached[1]
    assert len(reached[0]) > 10
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert all(term.total.item() == 0 for term in terms.values())


@OURS
@torch.no_grad()
def test_there_is_a_merit_and_an_answer_for_every_sample_and_a_number_for_every_name(task: Task) -> None:
    splits = task.splits(seed=0)
    model = task.build(task.sized(backbone_of(task)), splits.facts).eval()
    run, scorer = Run(model, model), task.scorer(splits.facts)
    for count in (2, 0, 1):
        batch = task.prepare([splits.test.read(i) for i in range(count)], splits.facts, CPU, None)
        assert len(scorer.add(run, batch)) == count
        answers = task.predict(run, batch, splits.facts, Ask())
        assert len(answers) == count
        assert len({tuple(task.cells(answer)) for answer in answers}) <= 1  # the columns of one table
    assert scorer.scores([scorer.state()]).numbers.keys() == {number.name for number in task.numbers}
