"""One command on a folder of pictures: what they are is found, said, trained on and predicted."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synchromesh import cli
from synchromesh.data import stored
from synchromesh.data.sources import stored_at
from synchromesh.data.stored import StoredFiles
from synchromesh.recipes.from_pictures import of_data
from synchromesh.tasks.classification import Classification
from synchromesh.testing.packed import encoded, index_of, parquet_of, tar_of

ENDING = {"parquet": ".parquet", "tar": ".tar", "list": ".tsv"}
KINDS = ("jpg", "png", "gif", "bmp", "tif", "webp")
TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--model.experts.blocks.1", "0",
    "--model.experts.num-experts=2", "--epochs=2", "--batch-size=4", "--loading.workers=1",
]  # fmt: skip


def write_classes(folder: Path, *, colour: bool, size: tuple[int, int] = (40, 52), count: int = 6) -> Path:
    """Dark and light pictures, in a file of each kind."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (*size, 3) if colour else size
            pixels = rng.integers(level - 50, level + 50, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.{KINDS[number % 6]}")
    return folder


def task_of(path: Path) -> Classification:
    task = of_data(path, None).task
    assert isinstance(task, Classification)
    return task


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_classes(tmp_path_factory.mktemp("own") / "photos", colour=True)
    (folder / "nothing").mkdir()
    (folder / "dark" / "phone.heic").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path) -> Path:
    """A run on data alone."""
    assert cli.main(["train", "--data", str(photos), *TINY, f"--run={photos.parent / 'run'}"]) == 0
    return photos.parent / "run"


def test_data_alone_are_trained_on_and_what_was_found_is_said(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data", str(photos), *TINY, f"--run={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    for wanted in (
        f"found in {photos}, to learn from + to score on: dark 5 + 1, light 5 + 1",
        "dark/phone.heic",
        "and so no classes: nothing",
        "there is no val/: 10% of each class",
        "classes: 10 images to learn from, 2 to score on, 2 classes, colour 64 x 64",
    ):
        assert wanted in said
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert (recipe["name"], recipe["task"]["kind"]) == ("classes", "Classification")
    assert recipe["task"]["data"]["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert recipe["task"]["data"]["preprocess"]["std"] == [0.229, 0.224, 0.225]


def test_grey_pictures_stay_grey_in_files_of_every_kind(tmp_path: Path) -> None:
    task = task_of(write_classes(tmp_path / "scans", colour=False))
    assert task.data.preprocess.channels == 1
    assert (task.augment.flip, task.augment.crop) == (0.0, None)
    for number in range(2):  # one of which is learnt from
        Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "scans" / "dark" / f"red{number}.png")
    assert task_of(tmp_path / "scans").data.preprocess.channels == 3


@pytest.mark.parametrize(
    ("size", "side", "share"), [((28, 28), 32, 1.0), ((96, 130), 96, 1.0), ((230, 300), 192, 0.875)]
)
def test_images_have_a_fitting_size(tmp_path: Path, size: tuple[int, int], side: int, share: float) -> None:
    folder = write_classes(tmp_path / "photos", colour=True, size=size, count=2)
    config = of_data(folder, None)
    assert isinstance(config.task, Classification)
    size_of = config.task.data.preprocess
    assert (size_of.image_size, size_of.crop_ratio, config.model.image_size) == (side, share, side)
    assert (config.epochs, config.batch_size) == (100, 1)


def test_a_picture_that_cannot_be_read_is_no_reason_to_look_no_further(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "photos", colour=True, count=2)
    (folder / "dark" / "0.jpg").write_bytes(b"no picture")
    assert task_of(folder).data.preprocess.image_size == 64
    for path in [*folder.rglob("*.jpg"), *folder.rglob("*.png")]:
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read the image .*of no kind that Pillow knows"):
        of_data(folder, None)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["cat/1.png"], "one class folder only, cat, so there is nothing to tell apart"),
        (["train/cat/1.png", "train/dog/1.png", "val/emu/1.png"], "val has classes that"),
        (["1.png"], "it has 1.png, 1 pictures without a class: give each class a folder of its own. Looked for"),
        (["cat/1.txt", "dog/1.txt"], "it has cat, dog, folders without one picture. Looked for"),
        (["cat/1.png", "dog/1.png"], "class cat has 1 image, too few to learn from and to score on: add some, leave"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_the_reason(
    tmp_path: Path, photo: Callable[..., Path], names: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(tmp_path / "data" / name) if name.endswith("png") else (tmp_path / "data" / name).write_text("no picture")
    assert cli.main(["train", "--data", str(tmp_path / "data"), f"--run={tmp_path / 'run'}"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_not_there_says_where_it_looked(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = run.parent / "absent"
    assert cli.main(["train", "--data", str(photos), *TINY, f"--run={absent}", "--resume"]) == 2
    said = capsys.readouterr().err
    assert f"--resume finds no run in {absent}, where there is no recipe.json; beside it are run" in said
    assert not absent.exists()
    assert cli.main(["train", "--data", str(photos), *TINY, f"--run={run}", "--resume"]) == 0


def answers(out: str) -> list[str]:
    return [Path(json.loads(line)["image"]).name for line in out.splitlines()]


def test_predict_takes_files_folders_patterns_and_names_on_stdin(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*given: str, stdin: bytes = b"") -> list[str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        assert cli.main(["predict", *given, f"--run={run}", "--json"]) == 0
        return answers(capsys.readouterr().out)

    light = photos / "light"
    whole = sorted(path.name for path in light.iterdir())
    assert said(*(str(light / name) for name in ("3.bmp", "2.gif"))) == ["3.bmp", "2.gif"]
    assert said(str(light)) == whole
    assert said(f"{photos}/**/*.tif") == ["4.tif", "4.tif"]
    assert said("-", stdin=f"{light / '5.webp'}\n{light / '0.jpg'}\r\n".encode()) == ["5.webp", "0.jpg"]
    assert said("-", stdin=f"{light / '1.png'}\0{light / '4.tif'}\0".encode()) == ["1.png", "4.tif"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["nothing/*.png"], "no picture fits nothing/*.png: wanted JPEG"),
        (["-", "--nproc=2"], "- is read by one process"),
    ],
)
def test_no_picture_at_all_is_said(run: Path, given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", *given, f"--run={run}"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "tar", "list"])
def test_packed_pictures_are_trained_on_by_the_same_command(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = encoded(24)
    if kind == "parquet":
        data = parquet_of(tmp_path / "some.parquet", pictures)
    elif kind == "list":
        data = index_of(tmp_path / "all.tsv", pictures)
    else:
        for number in range(2):
            tar_of(tmp_path / f"shards-00{number}.tar", pictures[12 * number : 12 * number + 12])
        data = tmp_path / "shards-{000..001}.tar"
    assert cli.main(["train", "--data", str(data), *TINY, f"--run={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "to learn from + to score on: dark 11 + 1, light 11 + 1" in said
    assert "classes: 22 images to learn from, 2 to score on, 2 classes, colour 64 x 64" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_images"] == 2
    assert cli.main(["eval", str(tmp_path / "run"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 24


@pytest.mark.parametrize("kind", ["parquet", "tar", "list"])
def test_packed_pictures_are_listed_once_for_recipe_and_training(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"parquet": parquet_of, "tar": tar_of, "list": index_of}[kind]
    write(tmp_path / "data" / f"some{ENDING[kind]}", encoded(48))
    source = stored_at(tmp_path / "data" / f"some{ENDING[kind]}")
    assert source is not None
    monkeypatch.setattr(stored, "LOOKED_AT", 15)
    listed: list[tuple[bool, int]] = []
    read: Callable[..., stored.LabelledStore] = type(source).read

    def counted(self: StoredFiles, files: Sequence[Path], most: int | None = None) -> stored.LabelledStore:
        found = read(self, files, most)
        listed.append((most is None, len(found.labels)))
        return found

    monkeypatch.setattr(type(source), "read", counted)
    assert cli.main(["train", "--data", str(source.path), *TINY, f"--run={tmp_path / 'run'}"]) == 0
    assert listed == [(False, 15), (True, 48)]


@pytest.mark.parametrize("given", [["--data", "a.tar", "b.tar"], ["--data=a.tar", "--data=b.tar"]])
def test_a_pattern_that_the_shell_has_spread_is_to_be_quoted(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *given]) == 2
    assert "in quotes, or give a folder" in capsys.readouterr().err


def test_weights_of_another_backbone_are_refused_before_a_run_begins(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["few_shot", f"--data={photos}", f"--start.weights={run}", f"--run={tmp_path / 'run'}", "--shots=1"]
    given = [option.replace("--shots", "--data.shots") for option in options]
    assert cli.main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert "of the backbone's" in said
    assert "in another shape" in said
    assert cli.main(["train", *given, "--start.partial"]) == 2
    assert "would stay random and frozen" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_broken_picture_is_named_and_left_out_where_data_are_all_that_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = write_classes(tmp_path / "photos", colour=True, count=12) / "dark" / "6.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    run = tmp_path / "run"
    assert cli.main(["train", "--data", str(tmp_path / "photos"), "--run", str(run), *TINY]) == 0
    assert "left out as unreadable" in " ".join(capsys.readouterr().out.split())
    assert "dark/6.jpg" in (run / "left_out.jsonl").read_text()
