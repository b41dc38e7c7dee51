from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from synchromesh.data.images import FileImages, MemoryImages, Preprocess
from synchromesh.data.sources import ImageFolder, MnistDigits, ScikitDigits, take_shots
from synchromesh.errors import InputError

GREY = Preprocess(image_size=8)


def test_mnist_trains_on_the_first_400_of_each_class_and_scores_on_the_last_100() -> None:
    splits = MnistDigits().load(Preprocess())
    whole = MnistDigits(held_out=100).load(Preprocess())
    assert splits.train.labels.bincount().tolist() == [400] * 10
    assert splits.test.labels.bincount().tolist() == [100] * 10
    assert isinstance(splits.train, MemoryImages)
    assert isinstance(whole.test, MemoryImages)
    assert splits.train.images.shape == (4000, 1, 28, 28)
    # Held-out images come from the end of the training part, in file order, never from the test images.
    for label in range(10):
        train = splits.train.images[splits.train.labels == label]
        assert torch.equal(whole.test.images[whole.test.labels == label], train[300:])


def test_mnist_train_and_test_share_no_image() -> None:
    splits = MnistDigits().load(Preprocess())
    assert isinstance(splits.train, MemoryImages)
    assert isinstance(splits.test, MemoryImages)
    train = {image.numpy().tobytes() for image in splits.train.images}
    assert len(train) == 4000
    assert not any(image.numpy().tobytes() in train for image in splits.test.images)


def test_scikit_digits_use_the_whole_grey_range() -> None:
    splits = ScikitDigits().load(GREY)
    assert (len(splits.train), len(splits.test)) == (1400, 397)
    assert torch.stack([splits.train.read(i) for i in range(100)]).max() == 255


def test_digits_can_be_given_as_colour() -> None:
    preprocess = Preprocess(image_size=16, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert ScikitDigits().load(preprocess).train.read(0).shape == (3, 16, 16)


def make_folder(root: Path, photo: Callable[..., Path], *, count: int = 10) -> None:
    for label, name in enumerate(("cat", "dog")):
        for i in range(count):
            photo(root / name / f"{i}.png", size=(8, 8), mode="L", seed=100 * label + i)


def test_a_folder_of_class_folders_is_split_the_same_way_every_time(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path, photo)
    one, two = (ImageFolder(tmp_path, test_share=0.3).load(GREY) for _ in range(2))
    assert isinstance(one.test, FileImages)
    assert isinstance(two.test, FileImages)
    assert isinstance(one.train, FileImages)
    assert one.test.paths == two.test.paths
    assert one.test.labels.bincount().tolist() == [3, 3]
    assert not set(one.test.paths) & set(one.train.paths)
    assert one.train.classes == ("cat", "dog")


def test_train_and_val_folders_are_taken_as_they_are(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path / "train", photo, count=4)
    make_folder(tmp_path / "val", photo, count=2)
    splits = ImageFolder(tmp_path).load(GREY)
    assert (len(splits.train), len(splits.test)) == (8, 4)
    (found,) = splits.notes
    assert found == f"found in {tmp_path / 'train'}, to learn from + to score on: cat 4 + 2, dog 4 + 2"


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_the_part_to_score_on_may_have_any_usual_name(tmp_path: Path, photo: Callable[..., Path], name: str) -> None:
    make_folder(tmp_path / "train", photo, count=4)
    make_folder(tmp_path / name, photo, count=2)
    splits = ImageFolder(tmp_path).load(GREY)
    assert (len(splits.train), len(splits.test)) == (8, 4)
    assert len(ImageFolder(tmp_path).load_all(GREY, ("cat", "dog"))) == 4


def test_train_alone_is_divided_and_said(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path / "train", photo)
    splits = ImageFolder(tmp_path, test_share=0.2).load(GREY)
    assert (len(splits.train), len(splits.test)) == (16, 4)
    assert splits.notes[1] == "there is no val/: 20% of each class, chosen by file name, are scored on"


def test_the_part_of_a_picture_depends_on_its_name_and_hardly_on_what_comes_to_it(
    tmp_path: Path, photo: Callable[..., Path]
) -> None:
    make_folder(tmp_path / "a", photo, count=30)
    before = ImageFolder(tmp_path / "a").load(GREY).test
    assert isinstance(before, FileImages)
    names = {path.relative_to(tmp_path / "a") for path in before.paths}
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = ImageFolder(tmp_path / "moved").load(GREY).test
    assert isinstance(moved, FileImages)
    assert {path.relative_to(tmp_path / "moved") for path in moved.paths} == names
    photo(tmp_path / "moved" / "cat" / "new.png", size=(8, 8), mode="L")
    more = ImageFolder(tmp_path / "moved").load(GREY)
    assert isinstance(more.test, FileImages)
    assert len(names - {path.relative_to(tmp_path / "moved") for path in more.test.paths}) <= 1
    other = ImageFolder(tmp_path / "moved", split_seed=1).load(GREY).test
    assert isinstance(other, FileImages)
    assert {path.relative_to(tmp_path / "moved") for path in other.paths} != names


def test_empty_class_folders_are_named_and_are_no_classes(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path, photo)
    (tmp_path / "emu").mkdir()
    (tmp_path / "fox").mkdir()
    splits = ImageFolder(tmp_path).load(GREY)
    assert splits.train.classes == ("cat", "dog")
    assert f"without pictures in {tmp_path}, and so no classes: emu, fox" in splits.notes


def test_other_files_are_no_images(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path, photo)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    assert len(ImageFolder(tmp_path).load(GREY).train) == 18


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda root, photo: None, "does not exist"),
        (lambda root, photo: root.write_text(""), "is a file"),
        (lambda root, photo: root.mkdir(), "holds no class folders"),
        (lambda root, photo: (root / "cat").mkdir(parents=True), "holds no images"),
        (lambda root, photo: make_folder(root, photo, count=1), "too few"),
        (lambda root, photo: photo(root / "1.png"), "holds no class folders but 1 images; give the folder above"),
        (lambda root, photo: photo(root / "cat" / "1.png"), "one class folder only, cat, so there is nothing"),
        (
            lambda root, photo: make_folder(root / "photos", photo),
            r"one class folder only, photos, .*are the classes cat, dog\? Then give the folder above them",
        ),
        (
            lambda root, photo: [make_folder(root / "photos" / part, photo) for part in ("train", "val")],
            "one class folder only, photos, .*are the classes train, val",
        ),
        (
            lambda root, photo: [make_folder(root / part / "photos", photo) for part in ("train", "val")],
            "train has one class folder only, photos, ",
        ),
        (
            lambda root, photo: [photo(root / part / "cat" / "1.png") for part in ("train", "val")],
            "train has one class folder only, cat, ",
        ),
        (
            lambda root, photo: (photo(root / "cat" / "1.png"), (root / "emu").mkdir(), (root / "fox").mkdir()),
            r"one class folder only, cat \(without pictures: emu, fox\), so there is nothing to tell apart; wanted two",
        ),
        (
            lambda root, photo: (
                [make_folder(root / part, photo) for part in ("train", "val")],
                photo(root / "val" / "emu" / "1.png"),
                (root / "train" / "emu").mkdir(),
            ),
            "val has classes that .*train has not: emu",
        ),
        (
            lambda root, photo: (make_folder(root / "train", photo), (root / "val" / "cat").mkdir(parents=True)),
            "val holds no images in its class folders",
        ),
        (
            lambda root, photo: ((root / "cat").mkdir(parents=True), (root / "cat" / "1.heic").write_text("")),
            "holds no images in its class folders, only 1.heic: wanted JPEG",
        ),
    ],
)
def test_a_wrong_folder_is_said_in_one_line(
    tmp_path: Path, photo: Callable[..., Path], prepare: Callable[[Path, Callable[..., Path]], object], text: str
) -> None:
    prepare(tmp_path / "data", photo)
    with pytest.raises(InputError, match=text) as caught:
        ImageFolder(tmp_path / "data").load(GREY)
    assert "\n" not in str(caught.value)


def test_a_class_that_only_val_has_is_refused(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path / "train", photo)
    make_folder(tmp_path / "val", photo)
    photo(tmp_path / "val" / "emu" / "1.png")
    with pytest.raises(InputError, match=r"classes that .*train has not: emu"):
        ImageFolder(tmp_path).load(GREY)


def test_shots_are_equal_for_every_class_and_fixed_by_the_seed() -> None:
    train = ScikitDigits().load(GREY).train
    one, two, other = (take_shots(train, 5, seed=seed) for seed in (1, 1, 2))
    assert one.labels.bincount().tolist() == [5] * 10
    images = [torch.stack([chosen.read(i) for i in range(50)]) for chosen in (one, two, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_too_few_images_for_the_shots_are_said() -> None:
    with pytest.raises(InputError, match="class 0 has 140 images, wanted 200 shots"):
        take_shots(ScikitDigits().load(GREY).train, 200, seed=0)


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tif", "TIFF", "jpg", "webp", "pgm"])
def test_what_prediction_reads_is_trained_on(tmp_path: Path, photo: Callable[..., Path], suffix: str) -> None:
    for name in ("cat", "dog"):
        for i in range(4):
            photo(tmp_path / name / f"{i}.{suffix}", size=(8, 8), mode="L")
    splits = ImageFolder(tmp_path).load(GREY)
    assert (len(splits.train), len(splits.test)) == (6, 2)
    assert splits.train.read(0).shape == (1, 8, 8)
    assert not any("left out" in note or "without pictures" in note for note in splits.notes)


def test_a_class_that_only_train_has_is_told(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path / "train", photo)
    make_folder(tmp_path / "val", photo)
    photo(tmp_path / "train" / "emu" / "1.png")
    photo(tmp_path / "train" / "fox" / "1.png")
    (tmp_path / "val" / "fox").mkdir()
    splits = ImageFolder(tmp_path).load(GREY)
    _, note = splits.notes
    assert note == f"{tmp_path / 'val'} has no pictures of emu, fox: learnt and never scored"
    assert splits.test.labels.bincount(minlength=4).tolist() == [10, 10, 0, 0]


def test_pictures_that_are_not_taken_are_told(tmp_path: Path, photo: Callable[..., Path]) -> None:
    make_folder(tmp_path, photo)
    photo(tmp_path / "beside.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "dog" / "phone.HEIC").write_bytes(b"")
    _, note, _ = ImageFolder(tmp_path).load(GREY).notes
    assert note.startswith(f"left out in {tmp_path}, as no JPEG, PNG")
    assert note.endswith("in a class folder: dog/phone.HEIC, beside.png")


def test_a_model_is_scored_on_one_class_alone(tmp_path: Path, photo: Callable[..., Path]) -> None:
    photo(tmp_path / "dog" / "1.tif")
    found = ImageFolder(tmp_path).load_all(GREY, ("cat", "dog"))
    assert found.labels.tolist() == [1]
    with pytest.raises(InputError, match="has the class 'dog', which the model has not"):
        ImageFolder(tmp_path).load_all(GREY, ("cat", "emu"))
