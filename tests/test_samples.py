"""benchmarks/samples.py and benchmarks/trees.py, on archives, photographs and arrays made here."""

import importlib
import json
import sys
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synchromesh.data.coco_json import CocoJson
from synchromesh.data.regions import RunLengths
from synchromesh.data.rle import parsed
from synchromesh.data.voc import VocFolder
from synchromesh.errors import InputError
from synchromesh.testing.programs import run_program

ROOT = Path(__file__).parents[1]
BENCHMARKS, SAMPLES = ROOT / "benchmarks", ROOT / "samples"


@pytest.fixture
def samples(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("samples")
    sys.modules.pop("samples")


@pytest.fixture
def trees(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("trees")
    sys.modules.pop("trees")


def packed(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_pictures_and_annotations_are_unzipped_and_nothing_that_runs(samples, tmp_path):
    names = ("a/data/one.png", "a/b/two.XML", "a/run.py", "a/lib.so", "a/three.tif")
    archive = packed(tmp_path / "a.whl", **{name: name.encode() for name in names})
    found = samples.unzip_data(archive, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.png", "three.tif", "two.XML"]
    assert {path.name: path.read_text() for path in found}["two.XML"] == "a/b/two.XML"


@pytest.mark.parametrize("name", ["../up.png", "a/../../up.png", "/tmp/up.png", "..\\up.png", "C:/up.png", "../up.py"])
def test_an_archive_with_a_name_that_leads_out_of_the_folder_is_refused_as_a_whole(samples, tmp_path, name):
    archive = packed(tmp_path / "a.whl", **{"fine.png": b"1", name: b"2"})
    with pytest.raises(InputError, match="leads out of the folder"):
        samples.unzip_data(archive, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep" / "out").iterdir()) == []
    assert not (tmp_path / "deep" / "up.png").exists()


def test_an_archive_that_is_cut_short_or_grows_beyond_bounds_is_refused(samples, tmp_path, monkeypatch):
    archive = packed(tmp_path / "a.whl", **{"one.png": b"1" * 100})
    monkeypatch.setattr(samples, "LARGEST", 99)
    with pytest.raises(InputError, match=r"one\.png has 100 bytes, wanted 99 at most"):
        samples.unzip_data(archive, tmp_path / "out")
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(InputError, match=r"no whole zip file .* run `make samples` again"):
        samples.unzip_data(archive, tmp_path / "out")


@pytest.mark.parametrize("length", [1, 7, 64, 100, 101, 1249])
@pytest.mark.parametrize("side", [8, 33, 100, 320])
@pytest.mark.parametrize("overlap", [False, True])
def test_tiles_cover_a_photograph_and_where_they_overlap_every_crop_of_half_a_side_lies_in_one(
    samples, length, side, overlap
):
    found = samples.starts(length, side, overlap=overlap)
    assert found[0][0] == 0
    assert found[-1][1] == length
    assert all(0 <= first < stop <= length for first, stop in found)
    if overlap:
        crop = min(length, side // 2)
        assert all(any(a <= at and at + crop <= b for a, b in found) for at in range(length - crop + 1))
    else:
        assert [stop for _, stop in found[:-1]] == [first for first, _ in found[1:]]


XML = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
# Left, top, right and bottom from 0; tiles end at 50 and 100 along, at 40 and 80 down.
WHOLE, CUT, CORNER = (3, 5, 13, 25), (44, 10, 64, 20), (40, 30, 60, 44)


def photograph(folder, stem, boxes, height=80, width=100):
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{stem}.png")
    objects = "".join(XML.format(left + 1, top + 1, right, bottom) for left, top, right, bottom in boxes)
    (folder / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    return pixels


def test_trees_keep_their_pixels_and_places_in_tiles_and_count_where_half_of_them_is_seen(samples, tmp_path):
    pixels = photograph(tmp_path / "in", "p", [WHOLE, CUT, CORNER])
    counts = samples.trees(tmp_path / "in", tmp_path / "out", [samples.Photograph("p", "t", "test", 45)])
    assert counts == {"test": 4}
    found = VocFolder(tmp_path / "out", "test").load()
    assert found.classes == ("Tree",)
    assert not found.faults
    seen = {}
    for picture in found.pictures:
        top, left = (int(part) for part in picture.path.stem.split("_")[1:])
        own = np.asarray(Image.open(picture.path))
        assert (own == pixels[top : top + picture.height, left : left + picture.width]).all()
        for one in picture.objects:
            box = tuple(int(side + shift) for side, shift in zip(one.box, (left, top, left, top), strict=True))
            seen[left, top, box] = one.ignored
    assert seen == {
        (0, 0, WHOLE): False,
        (0, 0, (44, 10, 50, 20)): True,  # 6 of 20 columns
        (50, 0, (50, 10, 64, 20)): False,
        (0, 0, (40, 30, 50, 40)): True,  # 100 of 280 pixels; so in the three tiles beside it
        (50, 0, (50, 30, 60, 40)): True,
        (0, 40, (40, 40, 50, 44)): True,
        (50, 40, (50, 40, 60, 44)): True,
    }


def test_a_box_with_a_side_missing_is_told_with_its_file(samples, tmp_path):
    (tmp_path / "p.xml").write_text("<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>")
    with pytest.raises(InputError, match=r"p\.xml has a box with a side missing"):
        samples.boxes_of(tmp_path / "p.xml")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_run_lengths_of_a_mask_are_read_as_the_same_mask(samples, share):
    mask = np.random.default_rng(1).random((13, 9)) < share
    counts = parsed(samples.run_lengths(mask))
    assert counts.sum() == mask.size
    assert (RunLengths(counts, 13, 9).mask(13, 9) == mask).all()


def test_halves_of_the_nuclei_are_read_with_their_masks_and_a_sliver_at_the_cut_is_ignored(samples, tmp_path):
    labels = np.zeros((20, 30), dtype=np.uint16)
    labels[2:6, 3:9], labels[8:12, 9:17], labels[14:18, 20:27] = 7, 300, 9  # 300: 6 of 8 columns on the left
    Image.fromarray(labels).save(tmp_path / "mask2d.tif")
    ramp = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    Image.fromarray(ramp).save(tmp_path / "img2d.tif")
    assert samples.nuclei(tmp_path, tmp_path / "out") == {"train": 2, "test": 2}
    ignored = {}
    for split, part in (("train", labels[:, :15]), ("test", labels[:, 15:])):
        found = CocoJson(tmp_path / "out" / f"{split}.json", tmp_path / "out" / "images").load()
        (picture,) = found.pictures
        assert found.classes == ("nucleus",)
        assert not found.faults
        assert (np.asarray(Image.open(tmp_path / "out" / "labels" / f"{split}.png")) == part).all()
        for one in picture.objects:
            mask = part == one.number
            assert (one.region.mask(20, 15) == mask).all()
            assert one.area == mask.sum()
            rows, columns = mask.nonzero()
            assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            ignored[split, one.number] = one.ignored
    assert ignored == {("train", 7): False, ("train", 300): False, ("test", 300): True, ("test", 9): False}
    shown = np.asarray(Image.open(tmp_path / "out" / "images" / "train.png"))
    assert shown[0, 0] == 0
    assert (np.diff(shown[:, 0].astype(int)) >= 0).all()
    low, high = np.percentile(ramp, [1, 99.8])
    assert shown[10, 0] == round((30_000 - low) / (high - low) * 255)


def test_without_a_network_the_script_says_so_and_what_pip_said(tmp_path):
    done = run_program(BENCHMARKS / "samples.py", tmp_path / "s", environment={"PIP_NO_INDEX": "1"})
    assert done.returncode == 1
    assert "could not be downloaded; is there a network? pip says: ERROR: No matching distribution" in done.stderr


def test_without_apt_the_photographs_of_debian_are_left_out_with_a_sentence(samples, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert samples.opencv(tmp_path, tmp_path / "out") == "opencv-doc is left out: there is no apt here"


@pytest.fixture
def folder(samples, tmp_path):
    boxes = [(x, y, x + 30, y + 34) for x in (10, 90, 170) for y in (20, 120, 200)]
    for one in samples.PHOTOGRAPHS:
        photograph(tmp_path / "in", one.stem, boxes, 384, 400)
    samples.trees(tmp_path / "in", tmp_path / "samples" / "trees")
    return tmp_path / "samples"


def test_crops_have_the_scale_that_a_setting_says_and_are_new_each_time_or_some_fixed_ones(trees, folder):
    found = VocFolder(folder / "trees", "train").load()
    for setting in (trees.Setting(factor=0.5, side=96, batch=3), trees.Setting(factor=0.5, side=96, batch=3, fixed=3)):
        split = trees.split_of(found, setting, 3)
        first, second = islice(trees.Crops(split, setting, 0).batches(), 2)
        for scene in first:
            assert scene.image.shape == (3, 96, 96)
            assert scene.scale == pytest.approx((0.5, 0.5), abs=0.01)
        same = all((a.image == b.image).all() for a, b in zip(first, second, strict=True))
        assert same is (setting.fixed is not None)
        whole = split.read(0)
        assert whole.scale == pytest.approx((0.5, 0.5), abs=0.01)
        assert len(whole.picture.objects) == 9


def test_the_benchmark_of_trees_runs_and_names_what_it_lacks(folder, tmp_path):
    out = tmp_path / "trees.jsonl"
    program = (BENCHMARKS / "trees.py", "--seconds", "0.2", "--out", out, "--settings")
    done = run_program(*program, "start", "--samples", folder)
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["setting"] == "start"
    assert record["steps"] > 0
    assert record["before"]["steps"] > 0
    assert all(set(record[split]) == {"AP", "AP50", "AR100"} for split in ("train", "test", "osbs", "soap"))
    done = run_program(*program, "half", "--samples", tmp_path / "none")
    assert done.returncode == 1
    assert "has `make samples` been run?" in done.stderr
    done = run_program(*program, "shrubs")
    assert done.returncode == 1
    assert "got the settings ['shrubs'], wanted some of prototype" in done.stderr


@pytest.mark.skipif(not (SAMPLES / "trees").is_dir(), reason="there are no samples: make samples")  # a download
def test_real_samples_have_no_faults_and_all_their_objects():
    trees = {split: VocFolder(SAMPLES / "trees", split).load() for split in ("train", "test", "osbs", "soap")}
    assert not any(found.faults for found in trees.values())
    kept = {
        split: sum(not one.ignored for each in found.pictures for one in each.objects) for split, found in trees.items()
    }
    assert kept["osbs"] == 61
    assert kept["soap"] == 37
    assert 250 <= kept["test"] <= 290
    nuclei = [
        CocoJson(SAMPLES / "nuclei" / f"{split}.json", SAMPLES / "nuclei" / "images").load()
        for split in ("train", "test")
    ]
    assert not any(found.faults for found in nuclei)
    assert sum(not one.ignored for found in nuclei for one in found.pictures[0].objects) == 125
