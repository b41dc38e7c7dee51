"""From a user's own annotated pictures to AP: the task is found, trained, scored, and told in COCO's own format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synchromesh import cli
from synchromesh.data.depth_maps import DepthPng
from synchromesh.data.label_files import read_values
from synchromesh.recipes.from_data import of_data
from synchromesh.testing.squares import write_squares

TINY = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--model.experts.blocks.1", "0",
    "--model.experts.num-experts=2", "--head.width=16", "--epochs=1", "--batch-size=4", "--loading.workers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects")
    for part, count in (("train", 8), ("val", 4)):
        write_squares(folder, part, count)
    return folder


@pytest.fixture(scope="module")
def run(files: Path) -> Path:
    """A run on data alone."""
    assert cli.main(["train", f"--data={files / 'instances_train.json'}", *TINY, f"--run={files / 'run'}"]) == 0
    return files / "run"


def test_the_task_its_masks_and_the_size_of_images_are_found_from_the_data(run: Path) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["name"], recipe["task"]["kind"]) == ("objects", "Detection")
    assert recipe["task"]["head"]["masks"] is True
    assert recipe["task"]["data"]["preprocess"]["image_size"] == recipe["model"]["image_size"] == 64
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["test_scenes"], summary["recipe"]) == (4, "objects")
    assert {"test_AP", "test_mask_AP"} <= summary.keys()
    page = (run / "report.html").read_text()
    for said in (
        "Precision and recall",
        "AP of each class",
        "As COCO scores it",
        "worst 1",
        "Objects taken for others",
    ):
        assert said in page


def test_eval_on_a_json_gives_the_twelve_numbers_of_boxes_and_of_masks(
    run: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    given = f"--data={files / 'instances_val.json'}"
    assert cli.main(["eval", str(run), given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["boxes"]) == len(found["masks"]) == 12
    summary = json.loads((run / "summary.json").read_text())
    assert found["AP"] == pytest.approx(summary["test_AP"])
    assert cli.main(["eval", str(run), given, f"--images={files / 'images'}"]) == 0
    said = capsys.readouterr().out
    assert [name for name in found["boxes"] if name not in said] == []


def test_a_folder_is_told_as_cocos_results_by_the_numbers_and_categories_of_its_json(run: Path, files: Path) -> None:
    from faster_coco_eval import COCO, COCOeval_faster

    val = files / "val"
    for picture in (files / "images").glob("val*.png"):
        (val / "deep").mkdir(parents=True, exist_ok=True)
        (val / "deep" / picture.name).write_bytes(picture.read_bytes())
    command = ["predict", str(val), f"--run={run}", "--least=0.0", f"--draw={files / 'drawn'}"]
    assert cli.main([*command, f"--ids={files / 'instances_val.json'}"]) == 0
    records = json.loads((files / "drawn" / "predictions.json").read_text())
    assert {one["image_id"] for one in records} == {10, 11, 12, 13}
    assert {one["category_id"] for one in records} <= {3, 7}
    assert {picture.name for picture in (files / "drawn").glob("*.png")} == {f"val{n}.png" for n in range(4)}
    assert not (files / "drawn" / "images.json").exists()
    truth = json.loads((files / "instances_val.json").read_text())
    known = COCO(truth, print_function=lambda *_: None)
    judge = COCOeval_faster(known, known.loadRes(records), "bbox", print_function=lambda *_: None)
    judge.run()
    assert len(judge.stats) >= 12


def test_without_a_json_a_table_tells_the_numbers_of_the_files(
    run: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = files / "two"
    pictures.mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (40, 30)).save(pictures / name)
    capsys.readouterr()
    assert cli.main(["predict", str(pictures), f"--run={run}", "--least=0.0", "--top=2", "--json"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(one["image"]).name for one in said] == ["a.png", "b.png"]
    assert all(one["objects"][0]["mask"]["size"] == [30, 40] for one in said)
    table = json.loads((run / "predictions" / "images.json").read_text())
    assert [(one["id"], Path(one["file_name"]).name) for one in table["images"]] == [(1, "a.png"), (2, "b.png")]
    assert table["categories"] == [{"id": 3, "name": "blue"}, {"id": 7, "name": "red"}]
    records = json.loads((run / "predictions" / "predictions.json").read_text())
    assert [one["image_id"] for one in records] == [1, 1, 2, 2]


def broken(files: Path, **changes: Any) -> Path:
    found = json.loads((files / "instances_train.json").read_text())
    path = files / "broken.json"
    path.write_text(json.dumps({**found, **changes}))
    return path


def test_what_is_wrong_with_a_file_is_said_in_one_line_that_names_it(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = files / "half.json"
    half.write_text((files / "instances_train.json").read_text()[:-40])
    none = broken(files, annotations=[{"id": 5, "image_id": 10, "category_id": 99, "bbox": [1, 1, 5, 5]}])
    words = {half: "half.json", none: "unknown categories"}
    for path, wanted in words.items():
        capsys.readouterr()
        assert cli.main(["train", f"--data={path}", f"--run={files / 'never'}"]) == 2
        error = capsys.readouterr().err.strip()
        assert wanted in error
        assert str(path) in error
        assert "Traceback" not in error
    assert not (files / "never").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["train", "--data=missing.json"], "missing.json does not exist"),
        (["train", "detect_demo", "--images=x"], "give --data too"),
        (["train", "--data"], "--data wants"),
        (["train", "demo", "--data=photos", "--images=x"], "with_pictures"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options) == 2
    assert says in capsys.readouterr().err


def test_faults_are_counted_and_named_and_boxes_alone_want_no_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_squares(tmp_path, "all", 6, regions=False)
    found = json.loads(path.read_text())
    found["annotations"].append({"id": 90, "image_id": 10, "category_id": 3, "bbox": [1, 1, 0, 5]})
    path.write_text(json.dumps(found))
    assert cli.main(["train", f"--data={path}", *TINY, f"--run={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    assert "annotation 90 of all0.png" in said
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["task"]["head"]["masks"] is False
    assert cli.main(["train", f"--data={path}", *TINY, "--head.masks", f"--run={tmp_path / 'run2'}"]) == 2
    assert "give a head that says no masks" in capsys.readouterr().err


@pytest.mark.parametrize(("names", "says"), [(["other.png"], "names no image"), (["val0.png"] * 2, "2 images")])
def test_numbers_that_a_json_does_not_tell_are_refused(
    run: Path, files: Path, tmp_path: Path, names: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"images": [{"id": n, "file_name": f"{n}/{name}"} for n, name in enumerate(names)]}))
    picture = files / "images" / "val0.png"
    assert cli.main(["predict", str(picture), f"--run={run}", f"--ids={ids}", f"--draw={tmp_path / 'd'}"]) == 2
    assert says in capsys.readouterr().err


def test_large_pictures_get_a_third_stage_and_few_pictures_many_epochs(tmp_path: Path) -> None:
    path = write_squares(tmp_path, "all", 5)
    small = of_data(path, None)
    assert (small.epochs, small.batch_size, small.model.depths) == (120, 1, (2, 4))  # 600 steps
    found = json.loads(path.read_text())
    for one in found["images"]:
        Image.new("RGB", (500, 200)).save(tmp_path / "images" / one["file_name"])
        one |= {"height": 200, "width": 500}
    path.write_text(json.dumps(found))
    large = of_data(path, None)
    assert (large.model.image_size, large.model.depths) == (320, (2, 4, 2))
    assert large.task.build(large.model, {"classes": ["a"]}).backbone.strides == (4, 8, 16)


def label_folder(folder: Path) -> Path:
    """Pictures with a bright half, and label files that say which."""
    for number in range(6):
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        labels = np.zeros((48, 64), dtype=np.uint8)
        labels[:, number * 8 :] = 1
        Image.fromarray(labels * 200).convert("RGB").save(folder / "images" / f"{number}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{number}.png")
    return folder


def depth_folder(folder: Path) -> Path:
    for number in range(6):
        for name in ("images", "depth"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        metres = np.full((48, 64), 1000 + 500 * number, dtype=np.uint16)
        Image.fromarray((metres / 16).astype(np.uint8)).convert("RGB").save(folder / "images" / f"{number}.png")
        Image.fromarray(metres).save(folder / "depth" / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("write", "name", "kind", "headline"),
    [(label_folder, "labels", "Segmentation", "mIoU"), (depth_folder, "distances", "Depth", "abs_rel")],
)
def test_folders_with_a_value_for_every_pixel_are_trained_on(
    tmp_path: Path, write: Callable[[Path], Path], name: str, kind: str, headline: str
) -> None:
    folder, run = write(tmp_path / "data"), tmp_path / "run"
    assert cli.main(["train", f"--data={folder}", *TINY, f"--run={run}"]) == 0
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["name"], recipe["task"]["kind"]) == (name, kind)
    assert recipe["task"]["data"]["preprocess"]["image_size"] == 64
    assert f"test_{headline}" in json.loads((run / "summary.json").read_text())
    assert cli.main(["predict", str(folder / "images"), f"--run={run}", f"--draw={tmp_path / 'drawn'}"]) == 0
    values = tmp_path / "drawn" / ("predicted_labels" if kind == "Segmentation" else "predicted_depth")
    about, said = (json.loads(path.read_text()) for path in (values / "values.json", tmp_path / "drawn" / "0.json"))
    assert {path.name for path in values.glob("*.png")} == {f"{number}.png" for number in range(6)}
    found = read_values(values / "0.png")
    assert found.shape == (48, 64)
    if kind == "Segmentation":
        share = {name: float((found == label).mean()) for label, name in enumerate(about["classes"])}
        assert {one["class"]: one["share"] for one in said["classes"]} == pytest.approx(
            {name: value for name, value in share.items() if value > 0}, abs=1e-6
        )
    else:
        again = DepthPng(values / "0.png", about["metres_of_one"]).read().metres
        assert (again.min(), again.max()) == pytest.approx((said["nearest"], said["farthest"]), abs=6e-4)
    assert not (tmp_path / "drawn" / "predictions.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
