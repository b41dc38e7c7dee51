"""How long a large COCO json takes to be read, and in how much memory.

    python benchmarks/coco_json.py                          # 500,000 annotations in 60,000 pictures
    python benchmarks/coco_json.py --annotations 1000 --pictures 100

The file is generated, with numbers of corners and runs such as COCO's train2017 has: outlines of 7 to 57 corners, every
hundredth object a crowd with run lengths, every fortieth a compressed string. It is read in a process of its own, with
`CocoJson(...).load()`: checked, and its pictures looked for. Then the objects of every picture are made once, with
their regions but without masks.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "coco_json.jsonl"
HEIGHT, WIDTH = 480, 640
CATEGORIES = tuple(range(1, 91))
WANTED = {"seconds": 20.0, "peak_mib": 2048.0}


@dataclass(frozen=True)
class Args:
    """What to measure.

    Attributes:
        annotations: in the file.
        pictures: files.
        out: file to append to.
    """

    annotations: int = 500_000
    pictures: int = 60_000
    out: Path = RESULTS


def generate(folder: Path, annotations: int, pictures: int) -> Path:
    """Write pictures and a json file; return the file."""
    from synchromesh.data.regions import RunLengths

    images = folder / "images"
    images.mkdir()
    blank = folder / "blank.png"
    Image.new("1", (WIDTH, HEIGHT)).save(blank)
    content = blank.read_bytes()
    for number in range(pictures):
        (images / f"{number:012d}.png").write_bytes(content)
    rng = np.random.default_rng(0)
    masks = [RunLengths.of(rng.random((HEIGHT // 16, WIDTH // 16)).repeat(16, 0).repeat(16, 1) < 0.3) for _ in range(8)]
    path = folder / "instances.json"
    with path.open("w") as file:
        file.write('{"info": {}, "images": ')
        named = [
            {"id": n, "file_name": f"{n:012d}.png", "height": HEIGHT, "width": WIDTH, "coco_url": "", "license": 1}
            for n in range(pictures)
        ]
        json.dump(named, file)
        file.write(', "annotations": [')
        for number in range(annotations):
            file.write((", " if number else "") + json.dumps(annotation(number, pictures, masks, rng)))
        file.write('], "categories": ')
        json.dump([{"id": n, "name": f"class {n}", "supercategory": "any"} for n in CATEGORIES], file)
        file.write("}")
    return path


def annotation(number: int, pictures: int, masks: list, rng: np.random.Generator) -> dict:
    """Return one annotation as COCO writes it."""
    width, height = rng.uniform(8, 300, 2)
    left, top = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
    crowd, compressed = number % 100 == 0, number % 40 == 1
    if crowd or compressed:
        runs = masks[number % len(masks)]
        counts = runs.compressed() if compressed else np.asarray(runs.counts).tolist()
        region = {"counts": counts, "size": [HEIGHT, WIDTH]}
    else:
        around = np.linspace(0, 2 * np.pi, int(rng.integers(7, 58)), endpoint=False)
        ring = np.stack([left + width * (1 + np.cos(around)) / 2, top + height * (1 + np.sin(around)) / 2], axis=1)
        region = [ring.ravel().round(2).tolist()]
    return {
        "segmentation": region,
        "area": round(width * height * 0.785, 4),
        "iscrowd": int(crowd),
        "image_id": int(rng.integers(pictures)),
        "bbox": [round(side, 2) for side in (left, top, width, height)],
        "category_id": int(rng.choice(CATEGORIES)),
        "id": number,
    }


def measure(path: Path, images: Path) -> dict[str, float]:
    """Read the file in this process."""
    from synchromesh.data.coco_json import CocoJson

    before, start = peak_mib(), time.perf_counter()
    annotated = CocoJson(path, images).load()
    seconds, peak = time.perf_counter() - start, peak_mib()
    start = time.perf_counter()
    objects = sum(len(picture.objects) for picture in annotated.pictures)
    return {
        "pictures": len(annotated),
        "annotations": objects,
        "faults": {what: fault.count for what, fault in annotated.faults.items()},
        "seconds": seconds,
        "peak_mib": peak,
        "imports_mib": before,
        "seconds_to_make_all_objects": time.perf_counter() - start,
        "peak_mib_then": peak_mib(),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(args: Args) -> None:
    from timing import machine  # with torch, which the process whose memory is measured need not have

    with tempfile.TemporaryDirectory() as folder:
        path = generate(Path(folder), args.annotations, args.pictures)
        inside = [sys.executable, __file__, "inside", str(path), str(Path(folder) / "images")]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout)
        size = path.stat().st_size / 2**20
    met = {name: found[name] < most for name, most in WANTED.items()}
    line = json.dumps(
        {**machine(), "python": platform.python_version(), "file_mib": round(size, 1), **found, "met": met}
    )
    print(line)
    with args.out.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main(tyro.cli(Args, description=__doc__))
