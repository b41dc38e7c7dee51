import json
import pickle
from pathlib import Path

import torch.distributed as dist

from synchromesh.errors import InputError, UnreadableError
from synchromesh.parallel.comm.grid import Grid
from synchromesh.testing.distributed import run_ranks
from synchromesh.training.agree import ALONE
from synchromesh.training.left_out import LEFT_OUT_FILE, NAMED, LeftOut, LeftOutFile


def unread(name: str, reason: str = "no picture") -> LeftOut:
    return LeftOut.by(UnreadableError(Path(name), reason))


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / LEFT_OUT_FILE).read_text().splitlines()]


def test_each_file_is_listed_once_with_its_reason(tmp_path: Path) -> None:
    file = LeftOutFile(tmp_path, ALONE)
    file.add([], of=0)
    assert not (tmp_path / LEFT_OUT_FILE).exists()
    for _ in range(3):  # epochs
        file.add([unread("a.png"), unread('b "2".png', "cut short")], of=2)
    file.add([LeftOut.by(InputError("number 7 is unreadable"))], of=1)
    assert listed(tmp_path) == [
        {"path": "a.png", "reason": "no picture"},
        {"path": 'b "2".png', "reason": "cut short"},
        {"path": "", "reason": "number 7 is unreadable"},
    ]


def test_a_resumed_run_adds_to_the_list_and_drops_a_line_cut_short(tmp_path: Path) -> None:
    LeftOutFile(tmp_path, ALONE).add([unread("a.png")], of=1)
    with (tmp_path / LEFT_OUT_FILE).open("a") as file:
        file.write('{"path": "b.p')
    LeftOutFile(tmp_path, ALONE).add([unread("a.png"), unread("c.png")], of=2)
    assert [line["path"] for line in listed(tmp_path)] == ["a.png", "c.png"]


def test_the_first_few_are_told_and_all_are_listed(tmp_path: Path) -> None:
    told: list[str] = []
    file = LeftOutFile(tmp_path, ALONE, told.append)
    for number in range(NAMED + 3):
        file.add([unread(f"{number}.png"), unread("0.png")], of=2)
    assert len(told) == NAMED
    assert told[0] == "left out: cannot read the image 0.png: no picture"
    assert len(listed(tmp_path)) == NAMED + 3


def add_on_ranks(folder: Path) -> list[str]:
    told: list[str] = []
    file = LeftOutFile(folder, Grid(dist.group.WORLD), told.append)
    file.add([unread(f"{dist.get_rank()}.png")] if dist.get_rank() else [], of=2)
    file.add([], of=0)
    return told


def test_what_any_rank_leaves_out_is_listed_by_the_first(tmp_path: Path) -> None:
    told = run_ranks(add_on_ranks, 3, tmp_path)
    assert [line["path"] for line in listed(tmp_path)] == ["1.png", "2.png"]
    assert [len(texts) for texts in told] == [2, 0, 0]


def test_an_unreadable_file_says_so_in_another_process() -> None:
    error = pickle.loads(pickle.dumps(UnreadableError(Path("a.png"), "no picture")))
    assert (error.path, error.reason) == (Path("a.png"), "no picture")
    assert str(error) == "cannot read the image a.png: no picture"
