"""ClusterProfile: what a plan's cost depends on besides the work, in measured or published numbers; kept as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from synchromesh.errors import InputError, parsed_json

SUFFIX = ".json"
UNMEASURED = "not measured"  # how the source of a number begins that nobody measured


@dataclass(frozen=True)
class Curve:
    """Seconds over bytes: straight lines between measured points, and beyond the last one.

    Attributes:
        points: (bytes, seconds), bytes rising. Below the first, its seconds hold.

    >>> Curve.line(seconds=1e-5, rate=1e9).at(1e6)
    0.00101
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        if len(sizes) < 2 or sizes != sorted(set(sizes)) or not all(0 <= s < math.inf for _, s in self.points):
            raise ValueError(f"a curve wants two points or more, bytes rising and seconds >= 0, got {self.points}")

    @staticmethod
    def line(*, seconds: float, rate: float) -> Curve:
        """Return the curve of a link that takes `seconds` for nothing and sends `rate` bytes per second."""
        return Curve(((0.0, seconds), (1e9, seconds + 1e9 / rate)))

    def at(self, size: int | float) -> float:
        """Return the seconds for so many bytes."""
        points = self.points
        if size <= points[0][0]:
            return points[0][1]
        index = min(bisect_left(points, size, key=itemgetter(0)), len(points) - 1)
        # Past the last point the line through the last two goes on.
        (low, before), (high, after) = points[index - 1], points[index]
        return max(0.0, before + (after - before) * (size - low) / (high - low))


@dataclass(frozen=True)
class Link:
    """One kind of link between two ranks.

    Attributes:
        start: seconds to begin and end a collective over such links, whatever it carries.
        message: seconds that one message takes its sender, over its bytes.
        node_rate: bytes per second that all ranks of a node send together at most; None where nothing is shared.
        crowding: share by which an all-to-all slows down for each far rank it reaches, where messages cross from one
            rail to another: switches then pass on more flows than they have ways. Equal places of nodes do not cross.
        busy: share of a message's time in which it keeps a core busy; read where ranks are more than cores.
    """

    start: float
    message: Curve
    node_rate: float | None = None
    crowding: float = 0.0
    busy: float = 1.0


@dataclass(frozen=True)
class Matmul:
    """How fast a matrix product [m, k] x [k, n] is: peak * m/(m + half) * n/(n + half) * k/(k + half).

    Attributes:
        peak: floating-point operations per second of very large products.
        half: the size of one dimension, the others being large, at which half of the peak is reached.
    """

    peak: float
    half: float

    def seconds(self, m: int | float, n: int | float, k: int | float) -> float:
        """Return the seconds of one product, without the time to read it from memory."""
        if min(m, n, k) <= 0:
            return 0.0
        return 2 * (m + self.half) * (n + self.half) * (k + self.half) / self.peak


@dataclass(frozen=True)
class ClusterProfile:
    """One kind of cluster.

    Attributes:
        name: short.
        about: a sentence for people.
        per_node: ranks that share a node.
        backend: of collectives; gloo sums a reduce-scatter from an all-to-all and gathers over one ring.
        memory_bytes: of one rank.
        memory_rate: bytes per second that one rank's kernels read and write.
        kernel: seconds that launching one kernel takes.
        step: seconds of one layer that do not depend on its size, in forward and in backward.
        chunk: seconds that each chunk after the first adds, in forward and in backward.
        matmul: speed of matrix products by dtype, such as "bfloat16".
        node: the links between ranks of one node.
        network: the links between ranks of two nodes; None where one node was measured, so that nobody knows.
        slowed: factors on the time of compute and of exchange while both run.
        sources: where each number is from, by field.
        cores: of the machine for each of its ranks; below 1 ranks wait for one, and all other times are those of a
            rank that has a core. None where others than cores do the work.
    """

    name: str
    about: str
    per_node: int
    backend: Literal["gloo", "nccl"]
    memory_bytes: float
    memory_rate: float
    kernel: float
    step: tuple[float, float]
    chunk: tuple[float, float]
    matmul: Mapping[str, Matmul]
    node: Link
    network: Link | None
    slowed: tuple[float, float]
    sources: Mapping[str, str]
    cores: float | None = None

    @property
    def waits(self) -> float:
        """How much longer work takes where all ranks of a machine do it at once."""
        return 1.0 if self.cores is None else max(1.0, 1 / self.cores)

    @property
    def across(self) -> Link:
        """The links between nodes; where they are unknown, those inside a node stand for them: no network is faster."""
        return self.node if self.network is None else self.network

    def to_json(self) -> str:
        """Return the profile as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> ClusterProfile:
        """Read what `to_json` wrote. Raises ValueError that names what is missing, unknown or no number."""
        try:
            found = parsed_json(text, "the profile of a cluster")
            if isinstance(found, dict):
                found = {"cores": None, **found}  # which files of 0.1 do not have
            _same_fields(found, ClusterProfile)
            for name in ("node", "network"):
                found[name] = _link(found[name]) if name == "node" or found[name] is not None else None
            if str(found["sources"]["network"]).startswith(UNMEASURED):
                found["network"] = None  # files of 0.1 and before repeat the links of the node here
            found["matmul"] = {dtype: _matmul(numbers) for dtype, numbers in found["matmul"].items()}
            for name in ("step", "chunk", "slowed"):
                first, second = found[name]
                found[name] = (float(first), float(second))
            for name in ("memory_bytes", "memory_rate", *(() if found["cores"] is None else ("cores",))):
                found[name] = _positive(name, found[name])
            found["kernel"] = float(found["kernel"])
            said = [found["name"], found["about"], *found["sources"], *found["sources"].values()]
            if type(found["per_node"]) is not int or found["per_node"] < 1 or not all(type(s) is str for s in said):
                raise ValueError("per_node is no whole number of ranks, or name, about or a source is no text")
            if found["backend"] not in ("gloo", "nccl"):
                raise ValueError(f"backend is {found['backend']!r}, wanted 'gloo' or 'nccl'")
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"this is not the profile of a cluster: {error!r}") from error
        return ClusterProfile(**found)

    def rate_of(self, dtype: str) -> Matmul:
        """Return the products' speed in a dtype. Raises ValueError where the profile does not tell it."""
        if dtype not in self.matmul:
            raise ValueError(f"the profile {self.name!r} tells no speed of {dtype}, only of {sorted(self.matmul)}")
        return self.matmul[dtype]


def shipped_profiles() -> list[str]:
    """Return the names of the clusters that come with the package."""
    folder = resources.files("synchromesh.planning").joinpath("profiles")
    return sorted(file.name.removesuffix(SUFFIX) for file in folder.iterdir() if file.name.endswith(SUFFIX))


def load_profile(name: str | Path) -> ClusterProfile:
    """Return a shipped profile by name, or one in a file.

    Raises:
        ValueError: there is none of this name, or the file holds no profile.
    """
    if str(name) in shipped_profiles():
        file = resources.files("synchromesh.planning").joinpath("profiles").joinpath(f"{name}{SUFFIX}")
        return ClusterProfile.from_json(file.read_text())
    if not Path(name).is_file():
        known = ", ".join(shipped_profiles())
        raise ValueError(
            f"there is no cluster {str(name)!r}: wanted a file of `synchromesh profile`, or one of {known}"
        )
    try:
        return ClusterProfile.from_json(Path(name).read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{name}: {error}") from error


def _link(found: Any) -> Link:
    if isinstance(found, dict):
        found = {"busy": 1.0, **found}
    _same_fields(found, Link)
    points = tuple((float(size), float(seconds)) for size, seconds in found["message"]["points"])
    rate = None if found["node_rate"] is None else _positive("node_rate", found["node_rate"])
    return Link(float(found["start"]), Curve(points), rate, float(found["crowding"]), float(found["busy"]))


def _same_fields(found: Any, kind: type) -> None:
    wanted = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(found, dict) or set(found) != wanted:
        got = sorted(found) if isinstance(found, dict) else found
        raise ValueError(f"a {kind.__name__} holds the fields {sorted(wanted)}, got {got}")


def _matmul(found: Any) -> Matmul:
    given = Matmul(**found)
    return Matmul(_positive("peak", given.peak), float(given.half))


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, wanted a number above 0")
    return float(value)
