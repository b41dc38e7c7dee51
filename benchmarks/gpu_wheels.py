"""What benchmarks/gpu.py needs on a machine with a GPU and no network, as one archive to carry there.

    python benchmarks/gpu_wheels.py site.tar.xz               # this script's needs, Liger-Kernel and SonicMoE
    mkdir site && tar xf site.tar.xz -C site                  # there
    PYTHONPATH=.:benchmarks:site python benchmarks/gpu.py --call prove

Wheels are fetched for the Python of that machine without what they depend on, torch above all, and unpacked: an
archive of unpacked wheels is a quarter smaller than the wheels. SonicMoE asks for an older torch in its metadata, which
nobody
reads this way.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.progress import track

SCRIPT = ("tyro", "docstring-parser", "typeguard", "jaxtyping", "wadler-lindig")
LIGER = ("liger-kernel==0.8.5",)
SONIC = (
    *("sonic-moe==0.1.2.post1", "quack-kernels==0.3.11", "nvidia-cutlass-dsl==4.4.2"),
    *("nvidia-cutlass-dsl-libs-base==4.4.2", "apache-tvm-ffi==0.1.9", "torch-c-dlpack-ext==0.1.5"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


@dataclass(frozen=True)
class Args:
    """What to fetch.

    Attributes:
        archive: to write, .tar.xz.
        python: version on the other machine.
        sonic: SonicMoE too, which is most of the bytes.
    """

    archive: tyro.conf.Positional[Path]
    python: str = "3.12"
    sonic: bool = True


def fetch(names: tuple[str, ...], python: str, folder: Path) -> None:
    """Download wheels. Raises CalledProcessError, with pip's own words before it."""
    where = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    subprocess.run([*pip, "--python-version", python, *where, "-d", str(folder), *names], check=True)


def unpack(wheels: Path, site: Path) -> None:
    """Unpack wheels into one folder. Raises ValueError for a member that would land outside of it."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not (site / name).resolve().is_relative_to(site.resolve()):
                    raise ValueError(f"{wheel.name} holds {name!r}, which lies outside of the archive; do not use it")
            archive.extractall(site)


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder, "wheels"), Path(folder, "site")
        fetch((*SCRIPT, *LIGER, *(SONIC if args.sonic else ())), args.python, wheels)
        unpack(wheels, site)
        whole = args.archive.with_name(f"{args.archive.name}.part")
        with tarfile.open(whole, "w:xz") as archive:
            for path in track(sorted(path for path in site.rglob("*") if path.is_file()), "packing"):
                archive.add(path, path.relative_to(site))
        whole.rename(args.archive)
    print(f"{args.archive}: {args.archive.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
