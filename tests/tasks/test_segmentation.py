import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from synchromesh import cli, routing_options
from synchromesh.data.images import Preprocess
from synchromesh.data.label_maps import LabelMap
from synchromesh.data.map_scenes import LabelledScene
from synchromesh.data.moves import Fit, Move, RandomMoves
from synchromesh.data.pixel_sources import AnnotatedFiles
from synchromesh.data.scenes import ComposedScenes
from synchromesh.errors import InputError
from synchromesh.models.heads.semantic import SemanticFPN
from synchromesh.models.mixtures import ExpertsConfig, LinearGate
from synchromesh.models.swin_v2 import SwinV2Config
from synchromesh.moe.capacity import Dropless, FixedCapacity, batch_prioritized
from synchromesh.tasks.pixels import UNKNOWN, PixelData
from synchromesh.tasks.segmentation import CLASSES_AT_ONCE, LabelledBatch, Segmentation, likeliest
from synchromesh.training.task import Ask, Run

CPU = torch.device("cpu")
FACTS = {"classes": ["cat", "dog", "sky"]}
DATA = PixelData(ComposedScenes(train=4, test=3), Preprocess(image_size=32, channels=1))
TASK = Segmentation(DATA, SemanticFPN(width=8))
TINY = SwinV2Config(embed_dim=8, depths=(1, 1), num_heads=(1, 2), patch_size=4, window_size=4, drop_path=0.0)


def scene(size: tuple[int, int] = (32, 32), *, whole: tuple[int, int] | None = None, seed: int = 0) -> LabelledScene:
    """A picture of size `whole` whose labels are random squares of 8 pixels, scaled to `size`."""
    rng, whole = np.random.default_rng(seed), whole or size
    squares = rng.integers(0, 4, (-(-whole[0] // 8), -(-whole[1] // 8)))
    squares[squares == 3] = 255
    labels = LabelMap(squares.repeat(8, 0).repeat(8, 1)[: whole[0], : whole[1]].astype(np.uint8))
    move = Fit(size=size).move(*whole)
    image = torch.from_numpy(rng.integers(0, 256, (1, *size), dtype=np.uint8))
    return LabelledScene(image, labels.moved(move), labels, move=move)


def batch_of(*scenes: LabelledScene) -> LabelledBatch:
    return TASK.prepare(scenes, FACTS, CPU, None)


def built(config: SwinV2Config = TINY) -> Run:
    model = TASK.build(TASK.sized(config), FACTS).eval()
    return Run(model, model)


def saying(model: torch.nn.Module, *scenes: LabelledScene) -> Run:
    """A run whose logits are highest, in the image, where the class is true; unknown pixels are said to be cats."""

    def called(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        labels = batch_of(*scenes).labels[: len(images)]
        return F.one_hot(labels.clamp(min=0), 3).permute(0, 3, 1, 2).float() * 9

    return Run(model, called)


def test_what_is_unknown_or_padding_counts_in_no_loss() -> None:
    batch = batch_of(scene((32, 24)), scene((20, 32), seed=1))
    assert batch.images.shape == (2, 1, 32, 32)
    assert batch.sizes == ((32, 24), (20, 32))
    known = sum(int((one.truth.values != 255).sum()) for one in (scene((32, 24)), scene((20, 32), seed=1)))
    assert TASK.counts(batch) == {"cross_entropy": known}
    assert (batch.labels[0, :, 24:] == UNKNOWN).all()
    assert (batch.labels[1, 20:] == UNKNOWN).all()
    assert not batch.images[0, :, :, 24:].any()


@torch.no_grad()
def test_counts_and_losses_of_the_parts_of_a_batch_add_up_to_those_of_all() -> None:
    run, batch = built(), batch_of(*(scene(seed=seed) for seed in range(4)))
    parts = [batch.part(0, 1), batch.part(1, 1), batch.part(1, 4)]
    whole, weights = TASK.loss(run, batch), TASK.head.weights()
    assert whole.keys() == TASK.counts(batch).keys()
    for name, term in whole.items():
        assert sum(TASK.counts(one)[name] for one in parts) == TASK.counts(batch)[name] > 0
        assert sum(float(TASK.loss(run, one)[name].total) for one in parts) == pytest.approx(
            float(term.total), rel=1e-4
        )
        assert term.weight == weights[name]


def test_a_batch_without_pictures_has_a_loss_that_reaches_every_parameter() -> None:
    run = built()
    sum(term.total for term in TASK.loss(run, batch_of()).values()).backward()
    assert all(one.grad is not None and not one.grad.any() for one in run.model.parameters())
    assert TASK.scorer(FACTS).add(run, batch_of()) == []
    assert TASK.predict(run, batch_of(), FACTS, Ask()) == []


@torch.no_grad()
def test_a_model_that_says_what_is_true_scores_one_and_one_class_for_all_its_share() -> None:
    scenes = [scene(seed=seed) for seed in range(3)]
    model, batch = built().model, batch_of(*scenes)
    right, cats = TASK.scorer(FACTS), TASK.scorer(FACTS)
    assert right.add(saying(model, *scenes), batch) == [1, 1, 1]
    assert right.scores([right.state()]).numbers == {"mIoU": 1, "mean_accuracy": 1, "pixel_accuracy": 1}
    nothing = [dataclasses.replace(one, truth=LabelMap(np.full_like(one.truth.values, 255))) for one in scenes]
    cats.add(saying(model, *nothing), batch)
    found = cats.scores([cats.state()])
    share = int((batch.labels == 0).sum()) / int((batch.labels != UNKNOWN).sum())
    assert found.numbers["pixel_accuracy"] == pytest.approx(share)
    assert found.numbers["mIoU"] == pytest.approx(share / 3)
    assert found.details["classes"]["dog"]["IoU"] == 0
    assert {pair["found"] for pair in found.details["confused"]} == {"cat"}


@torch.no_grad()
def test_pictures_are_scored_at_their_own_size_without_padding() -> None:
    """Labels as fine as the picture's own pixels are told apart at its size only."""
    one, other = scene((16, 32), whole=(40, 80)), scene((32, 16), whole=(64, 32), seed=1)
    scorer = TASK.scorer(FACTS)
    scorer.add(saying(built().model, one, other), batch_of(one, other))
    pixels = sum(int((each.whole.values != 255).sum()) for each in (one, other))
    assert int(scorer.state().sum()) == pixels
    assert scorer.scores([scorer.state()]).numbers["mIoU"] > 0.7


@pytest.mark.parametrize("size", [(9, 14), (5, 6), (3, 4)])
def test_the_likeliest_class_is_that_of_all_logits_at_once(size: tuple[int, int]) -> None:
    logits = torch.randn(2 * CLASSES_AT_ONCE + 3, 5, 6)
    whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    assert torch.equal(likeliest(logits, size), whole.argmax(0))
    assert torch.equal(likeliest(torch.zeros(40, 5, 6), size), torch.zeros(size, dtype=torch.int64))


@torch.no_grad()
def test_the_scores_of_ranks_are_those_of_all_pictures() -> None:
    batch, run = batch_of(*(scene(whole=(40, 48), seed=seed) for seed in range(5))), built()
    whole, ranks = TASK.scorer(FACTS), [TASK.scorer(FACTS) for _ in range(3)]
    whole.add(run, batch)
    for rank, (start, stop) in zip(ranks, [(0, 2), (2, 5), (5, 5)], strict=True):
        rank.add(run, batch.part(start, stop))
    got, wanted = ranks[0].scores([one.state() for one in ranks]), whole.scores([whole.state()])
    assert got == wanted
    assert 0 < wanted.numbers["pixel_accuracy"] < 1


@torch.no_grad()
def test_a_file_of_any_size_is_answered_in_its_own_pixels(photo, tmp_path) -> None:
    sample = TASK.open(photo(tmp_path / "wide.png", size=(128, 64)))
    assert sample.image.shape == (1, 16, 32)
    (answer,) = TASK.predict(built(), batch_of(sample), FACTS, Ask())
    assert (answer.said["height"], answer.said["width"]) == (64, 128)
    assert answer.seen[0].shape == (64, 128)
    shares = {name: float((answer.seen[0] == label).float().mean()) for label, name in enumerate(FACTS["classes"])}
    assert {one["class"]: one["share"] for one in answer.said["classes"]} == pytest.approx(
        {name: share for name, share in shares.items() if share}, abs=1e-5
    )
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(sample, answer))))
    assert drawn.shape[1] == 256  # one picture, not two, enlarged to be seen
    assert drawn.shape[0] > 128
    (most,) = TASK.predict(built(), batch_of(sample), FACTS, Ask(top=1))
    assert len(most.said["classes"]) == 1


@torch.no_grad()
def test_the_picture_shows_what_was_found_beside_what_is_true() -> None:
    one = scene((50, 100), whole=(100, 200))
    (answer,) = TASK.predict(saying(built().model, one), batch_of(one), FACTS, Ask())
    drawn = np.array(Image.open(io.BytesIO(TASK.draw(one, answer)))).astype(int)
    assert drawn.shape[1] == 2 * 200 + 6
    found, true = drawn[:100, :200], drawn[:100, 206:]
    known = one.whole.values != 255
    assert (found[known] == true[known]).all(-1).mean() > 0.8  # but for edges, which the image shows coarsely
    assert (found[~known] != true[~known]).any(-1).all()


@torch.no_grad()
def test_one_picture_changes_the_score_of_another_only_where_a_capacity_is_shared() -> None:
    """docs/dense.md: evaluate dropless, or one picture at a time."""
    experts = ExpertsConfig(
        num_experts=4,
        blocks=((), (0,)),
        router=LinearGate(noise=0.0),
        capacity=FixedCapacity(0.5, priority=batch_prioritized),
        dropout=0.0,
    )
    run = built(dataclasses.replace(TINY, experts=experts, init_std=0.5))
    scenes = [scene(seed=seed) for seed in range(4)]

    def logits(*own: LabelledScene) -> torch.Tensor:
        batch = batch_of(*own)
        return run(batch.images, torch.tensor(batch.sizes))[0]

    assert not torch.allclose(logits(*scenes), logits(scenes[0]), atol=1e-3)
    with routing_options(run.model, capacity=Dropless()):
        assert torch.allclose(logits(*scenes), logits(scenes[0]), atol=1e-5)
    ways = []
    for order in (scenes, scenes[::-1]):
        scorer = TASK.scorer(FACTS)
        for one in order:
            scorer.add(run, batch_of(one))
        ways.append(scorer.state())
    assert torch.equal(*ways)


def test_all_crops_of_a_batch_have_one_of_the_sizes_and_every_size_comes() -> None:
    moves = RandomMoves(sizes=((32, 32), (24, 24), (16, 16)), scale=(1.0, 1.0))
    task = dataclasses.replace(TASK, data=dataclasses.replace(DATA, moves=moves))
    samples = [scene(seed=0), scene((32, 20), seed=1)]
    sides = set()
    for seed in range(20):
        batch = task.prepare(samples, FACTS, CPU, np.random.default_rng(seed))
        side = batch.images.shape[2]
        assert batch.images.shape == (2, 1, side, side)
        assert batch.sizes == ((side, side), (side, round(20 * side / 32)))
        assert batch.labels.shape == (2, side, side)
        sides.add(side)
    assert sides == {32, 24, 16}
    assert task.prepare(samples, FACTS, CPU, None).images.shape[2] == 32


def test_composed_scenes_say_the_digit_of_each_pixel_and_the_background() -> None:
    splits = TASK.splits(seed=0)
    assert splits.facts == {"classes": [*"0123456789", "background"]}
    assert (len(splits.train), len(splits.test)) == (4, 3)
    one = splits.test.read(0)
    assert one.move == Move.none(32, 32)
    assert one.whole is one.truth
    assert splits.train.read(0, lambda: np.random.default_rng(0)).whole is None


@pytest.fixture
def folder(tmp_path, photo):
    """Six pictures of 48 x 40 pixels with labels, two classes and some pixels that nobody knows."""
    for number in range(6):
        photo(tmp_path / "images" / f"{number}.png", size=(48, 40), seed=number)
        labels = np.zeros((40, 48), dtype=np.uint8)
        labels[10:30, 5 : 20 + number], labels[:3] = 1, 255
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number}.png")
    return tmp_path


def test_a_folder_of_label_files_is_learnt_from_and_scored_on(folder) -> None:
    task = TASK.reading(folder)
    assert task.data.source == AnnotatedFiles(folder)
    assert task.data.moves == RandomMoves(sizes=((32, 32),))
    assert task.reading(folder / "other").data.moves == task.data.moves
    splits = task.splits(seed=0)
    assert (len(splits.train), len(splits.test)) == (5, 1)
    assert splits.facts == {"classes": ["0", "1"]}
    batch = task.prepare([splits.test.read(0)], splits.facts, CPU, None)
    assert batch.images.shape == (1, 1, 27, 32)
    assert batch.wholes[0].values.shape == (40, 48)
    assert set(batch.labels.unique().tolist()) == {UNKNOWN, 0, 1}
    assert len(task.scored_on(folder, splits.facts)) == 6


def test_what_both_parts_of_a_folder_say_is_told_once(folder) -> None:
    (folder / "labels" / "3.png").unlink()
    (note,) = TASK.reading(folder).splits(seed=0).notes
    assert "1 pictures without labels, left out: 3.png" in note


def test_the_commands_train_score_and_predict_on_a_folder_of_label_files(folder, capsys) -> None:
    model = ["--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--head.width=8"]
    model += ["--model.experts.blocks.1", "0", "--model.experts.num-experts=4", "--twin=none", "--nproc=1"]
    model += ["--data.preprocess.image-size=32", "--model.window-size=4"]
    run = f"--run={folder / 'run'}"
    assert cli.main(["train", "segment_demo", *model, "--epochs=1", "--batch-size=3", run, f"--data={folder}"]) == 0
    assert "5 pictures to learn from, 1 to score on, 2 classes" in capsys.readouterr().out
    assert cli.main(["eval", run[6:], f"--data={folder}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 6
    assert cli.main(["predict", run, str(folder / "images" / "0.png"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["height"], said["width"]) == (40, 48)
    assert sum(one["share"] for one in said["classes"]) == pytest.approx(1, abs=1e-4)
    assert (folder / "run" / "predictions" / "0.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_other_classes_or_another_kind_are_refused(folder) -> None:
    with pytest.raises(InputError, match=r"\['0', '1'\], and the model was trained on \['cat', 'dog', 'sky'\]"):
        TASK.scored_on(folder, FACTS)
    (folder / "labels").rename(folder / "depth")
    for number in range(6):
        Image.fromarray(np.full((40, 48), 2000, dtype=np.uint16)).save(folder / "depth" / f"{number}.png")
    with pytest.raises(InputError, match="wanted a label map of each picture"):
        TASK.reading(folder).splits(seed=0)


def test_the_report_shows_the_worst_class_first_also_where_nothing_was_scored() -> None:
    scorer = TASK.scorer(FACTS)
    classes, pairs = TASK.panels(scorer.scores([scorer.state()]))
    assert [row[1] for row in classes.rows] == ["-"] * 3
    assert pairs.rows == ()
    confusion = torch.tensor([[8, 2, 0], [5, 5, 0], [0, 0, 9]])
    classes, pairs = TASK.panels(scorer.scores([confusion]))
    assert [row[0] for row in classes.rows] == ["dog", "cat", "sky"]
    assert pairs.rows[0] == ("dog", "cat", "5", "50.0%")
