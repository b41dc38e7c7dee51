"""How many training images a second one core reads: this library beside loops of datasets and of WebDataset.

    python benchmarks/loading.py                            # 200 photographs of 500 x 375, 20 of 2000 x 1500
    python benchmarks/loading.py --tiny

Photographs of scikit-learn, cut and scaled, lie as JPEG files, in a parquet file and in tar shards. Each contestant
gives batches of random crops of 192 x 192, uint8: decoded by Pillow, cut, scaled with an antialiased bicubic filter.
Ours shuffles exactly, and resumes; `datasets` reads its memory-mapped copy in a random order; WebDataset reads in the
order of the shards. Contestants take turns. A core's images a second are images over the seconds that all threads and
processes of a contestant computed, so that other work on the machine counts little; `per_second` is by the clock.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from timing import machine

RESULTS = Path(__file__).parent / "results" / "loading.jsonl"
SIDE, BATCH = 192, 20
Images = Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        rounds: in which all contestants take turns.
        tiny: a few images, once: a test of the program.
        out: file to append to.
    """

    rounds: int = 5
    tiny: bool = False
    out: Path = RESULTS


def photographs(count: int, size: tuple[int, int]) -> list[tuple[str, bytes, int]]:
    """Return JPEG files of parts of real photographs: their ending, bytes and class."""
    import io

    import sklearn

    rng, found = np.random.default_rng(0), []
    sources = [
        Image.open(Path(sklearn.__file__).parent / "datasets" / "images" / name) for name in ("china.jpg", "flower.jpg")
    ]
    for number in range(count):
        source = sources[number % 2]
        left, top = rng.uniform(0, source.width / 4), rng.uniform(0, source.height / 4)
        box = (left, top, left + source.width * 0.75, top + source.height * 0.75)
        content = io.BytesIO()
        source.resize(size, Image.Resampling.BICUBIC, box=box).save(content, "JPEG", quality=90)
        found.append(("jpeg", content.getvalue(), number % 2))
    return found


def pack(folder: Path, pictures: list[tuple[str, bytes, int]]) -> None:
    from synchromesh.testing.packed import CLASSES, parquet_of, tar_of

    for number, (ending, content, label) in enumerate(pictures):
        path = folder / "files" / CLASSES[label] / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    parquet_of(folder / "all.parquet", pictures, rows=50)
    half = len(pictures) // 2
    for number, own in enumerate((pictures[:half], pictures[half:])):
        tar_of(folder / "tars" / f"{number:03d}.tar", own)


def ours(path: Path, *, workers: int = 1, processes: bool = False) -> Images:
    """Read by this library, in an exact random order."""
    from synchromesh.data.images import Preprocess, RandomCrop
    from synchromesh.data.sources import own_data
    from synchromesh.tasks.classification import LabelledImages
    from synchromesh.testing.packed import CLASSES
    from synchromesh.training.loader import EpochPlace, Loading, train_batches

    preprocess = Preprocess(SIDE, 3, 1.0, (0.5,) * 3, (0.5,) * 3)
    split = LabelledImages(own_data(path).load_all(preprocess, CLASSES), RandomCrop())
    loading = Loading(workers=workers, processes=processes)

    def images() -> Iterator[torch.Tensor]:
        for batch in train_batches(split, BATCH, place=EpochPlace(0, 0), loading=loading):
            yield torch.stack([image for image, _ in batch.samples])

    return images


def by_datasets(path: Path, cache: Path) -> Images:
    """Read by Hugging Face's `datasets` and Pillow, in a random order."""
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(cache))
    found = found.cast_column("image", datasets.Image())
    order = np.random.default_rng(0).permutation(len(found))
    return lambda: batched(found[int(number)]["image"] for number in order)


def by_webdataset(folder: Path) -> Images:
    """Read by WebDataset and Pillow, in the order of the shards."""
    import webdataset

    files = sorted(map(str, folder.glob("*.tar")))

    def images() -> Iterator[torch.Tensor]:
        samples = (
            webdataset.WebDataset(files, shardshuffle=False, empty_check=False)
            .decode("pil", only=["jpeg"])
            .to_tuple("jpeg", "cls")
        )
        return batched(picture for picture, _ in samples)

    return images


def batched(pictures: Iterator[Image.Image]) -> Iterator[torch.Tensor]:
    """Yield batches of random crops, as a loop by hand makes them."""
    from synchromesh.data.images import RandomCrop

    crop, rng, waiting = RandomCrop(), np.random.default_rng(0), []
    for picture in pictures:
        box = crop.box(picture.height, picture.width, rng)
        small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
        waiting.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        if len(waiting) == BATCH:
            yield torch.stack(waiting)
            waiting = []


def contestants(folder: Path) -> dict[str, Images]:
    both = min(2, os.cpu_count() or 1)
    return {
        "files": ours(folder / "files"),
        "parquet": ours(folder / "all.parquet"),
        "tar": ours(folder / "tars"),
        f"files, {both} threads": ours(folder / "files", workers=both),
        f"files, {both} processes": ours(folder / "files", workers=both, processes=True),
        "datasets + PIL": by_datasets(folder / "all.parquet", folder / "cache"),
        "webdataset": by_webdataset(folder / "tars"),
    }


def computed() -> float:
    """Return the seconds that this process, and those it has waited for, computed so far."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in own)


def measure(images: Images) -> tuple[int, float, float]:
    """Return how many images came, the seconds computed, and those by the clock."""
    core, clock, count = computed(), time.perf_counter(), 0
    for batch in images():
        assert batch.shape == (BATCH, 3, SIDE, SIDE)
        count += len(batch)
    return count, computed() - core, time.perf_counter() - clock


def compare(size: tuple[int, int], count: int, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack(folder, photographs(count, size))
        found = contestants(folder)
        seen = {who: [] for who in found}
        for _ in range(rounds + 1):  # the first round warms up
            for who, images in found.items():
                seen[who].append(measure(images))
    assert len({runs[0][0] for runs in seen.values()}) == 1  # all of them gave as many images
    later = {who: runs[1:] or runs for who, runs in seen.items()}
    per_core = {who: statistics.median(n / core for n, core, _ in runs) for who, runs in later.items()}
    per_second = {who: statistics.median(n / clock for n, _, clock in runs) for who, runs in later.items()}
    return {
        "size": size,
        "images": count,
        "rounds": rounds,
        "per_core": {who: round(value, 1) for who, value in per_core.items()},
        "per_second": {who: round(value, 1) for who, value in per_second.items()},
    }


def about() -> dict[str, object]:
    """Return what the figures depend on besides: versions of the contestants, and what else ran."""
    packages = ("pillow", "pyarrow", "datasets", "webdataset")
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def main(args: Args) -> None:
    torch.set_num_threads(1)
    cases = [((60, 40), 40)] if args.tiny else [((500, 375), 200), ((2000, 1500), 20)]
    with args.out.open("a") as file:
        for size, count in cases:
            line = json.dumps({**machine(), **about(), **compare(size, count, 0 if args.tiny else args.rounds)})
            print(line)
            file.write(line + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
