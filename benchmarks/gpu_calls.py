"""Three calls of benchmarks/gpu.py, each of less than ten minutes: what runs in which order, and for how long.

A card may be at hand for ten minutes at a time, and nothing can be edited in between. So each call stands alone, what
matters most comes first in it, time that a stage leaves over goes to those after it, and whatever a cut call has
found out is written already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpu_session import Call, Part, Record, Session


@dataclass(frozen=True)
class Stage:
    """A part of a call.

    Attributes:
        part: its name.
        minutes: that it may take, with what stages before it left over.
        needed: whether nothing after it makes sense where it fails.
    """

    part: Part
    minutes: float
    needed: bool = False


CALLS: Mapping[Call, tuple[Stage, ...]] = {
    "prove": (
        Stage("smoke", 1.0, needed=True),
        Stage("warm", 1.5),
        Stage("check", 3.0, needed=True),
        Stage("twice", 1.0),
        Stage("graphs", 1.5),
        Stage("gluon", 1.0),
    ),
    "tune": (Stage("tune", 5.0), Stage("choose", 4.0)),
    "table": (Stage("time", 5.5), Stage("layer", 1.5), Stage("profile", 1.5)),
}
PARTS = {stage.part: stage for stages in CALLS.values() for stage in stages}
Runs = Mapping[Part, Callable[[Session], bool]]


def minutes(stages: Sequence[Stage]) -> float:
    return sum(stage.minutes for stage in stages)


def run_stages(stages: Sequence[Stage], runs: Runs, session: Session) -> bool:
    """Run stages in order, each in its time; a record tells how each went. Return whether none failed.

    A stage that has no time left is left out and told of; one that breaks off does not keep the rest from running,
    unless it is needed.
    """
    passed, planned = True, session.clock()
    for stage in stages:
        began, planned = session.clock(), planned + 60 * stage.minutes
        record: Record = {"stage": stage.part, "minutes": stage.minutes}
        if min(planned - began, session.left()) <= 0:
            session.write("stage", {**record, "left_out": "no time is left"})
            continue
        try:
            good = runs[stage.part](session.within(planned - began))
        except Exception as error:  # noqa: BLE001  whatever broke, the stages after it get their time
            good, record["error"] = False, repr(error)
        ended = session.clock()
        record |= {"seconds": ended - began, "passed": good, "cut": ended >= planned}
        session.write("stage", record)
        print(", ".join(f"{name} {value}" for name, value in record.items()))
        passed = passed and good
        if stage.needed and not good:
            session.write("stage", {"stage": "rest", "left_out": f"{stage.part} failed"})
            break
    return passed
