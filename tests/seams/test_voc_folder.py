"""A VOC folder trained on with all that changes its pictures: crops of several sizes, colours, four pictures as one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from synchromesh import cli
from synchromesh.testing.programs import run_program
from synchromesh.testing.squares import write_squares

DIES = Path(__file__).parent.parent / "commands" / "dies.py"
STEPS, QUARTER = 16, 4
OPTIONS = [
    "--model.embed-dim=8", "--model.depths", "1", "1", "--model.num-heads", "1", "2", "--model.experts.blocks.1", "0",
    "--model.experts.num-experts=2", "--head.width=16", "--epochs=1", "--batch-size=4", "--loading.workers=1",
    "--optim.lr=1e-2", "--optim.lr-batch=4", "--optim.warmup-epochs=0", "--keep.log-steps=1",
    "--keep.checkpoint-steps=3", "--nproc=1", "--data.mosaic.chance=0.5", "--data.colors.invert=0.2",
    "--data.moves.sizes", "64", "64", "48", "48", "32", "32",
]  # fmt: skip


def write_voc(folder: Path) -> Path:
    """Write coloured squares as VOC has them: an XML file for each picture, lists of the pictures of both parts."""
    for part, count in (("train", STEPS * 4), ("val", 4)):
        found = json.loads(write_squares(folder, part, count).read_text())
        names = {one["id"]: one["name"] for one in found["categories"]}
        for image in found["images"]:
            stem, objects = Path(image["file_name"]).stem, ""
            for one in (own for own in found["annotations"] if own["image_id"] == image["id"]):
                left, top, width, height = one["bbox"]
                sides = {"xmin": left + 1, "ymin": top + 1, "xmax": left + width, "ymax": top + height}
                box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
                objects += f"<object><name>{names[one['category_id']]}</name><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
            path = folder / "Annotations" / f"{stem}.xml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"<annotation>{size}{objects}</annotation>")
        lists = folder / "ImageSets" / "Main"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{part}.txt").write_text("".join(f"{Path(one['file_name']).stem}\n" for one in found["images"]))
        (folder / f"instances_{part}.json").unlink()
    (folder / "images").rename(folder / "JPEGImages")
    return folder


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def run(voc: Path) -> Path:
    """One short epoch that nothing disturbed."""
    assert cli.main(["train", f"--data={voc}", *OPTIONS, f"--run={voc / 'run'}"]) == 0
    return voc / "run"


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "scenes_per_second")} for line in found]


def test_losses_are_finite_and_fall_in_one_short_epoch(run: Path) -> None:
    steps = [line for line in lines(run) if line["kind"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for line in steps for value in line.values() if isinstance(value, float))
    total = [line["loss"] for line in steps]
    assert sum(total[-QUARTER:]) < 0.8 * sum(total[:QUARTER])


def test_the_recipe_is_for_objects_with_all_that_changes_pictures_and_is_scored_by_the_own_part(run: Path) -> None:
    recipe, summary = (json.loads((run / name).read_text()) for name in ("recipe.json", "summary.json"))
    data = recipe["task"]["data"]
    assert (recipe["name"], recipe["task"]["head"]["masks"]) == ("objects", False)
    assert (data["mosaic"]["chance"], data["colors"]["invert"]) == (0.5, 0.2)
    assert data["moves"]["sizes"] == [[64, 64], [48, 48], [32, 32]]
    assert summary["test_scenes"] == 4
    assert math.isfinite(summary["test_AP"])


def test_a_run_that_was_killed_goes_on_bit_for_bit(run: Path, voc: Path, weights: Any) -> None:
    cut = voc / "cut"
    options = [f"--data={voc}", *OPTIONS, f"--run={cut}"]
    killed = run_program(DIES, "backward", 11, "train", *options)
    assert killed.returncode == -9, killed.stderr
    assert not (cut / "summary.json").exists()
    assert cli.main(["train", *options, "--resume"]) == 0
    assert lines(cut) == lines(run)
    assert weights(cut) == weights(run)
