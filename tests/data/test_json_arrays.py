import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synchromesh.data import json_arrays
from synchromesh.data.json_arrays import read_object
from synchromesh.errors import InputError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(path: Path) -> tuple[dict[str, Any], list[Any]]:
    elements: list[tuple[int, Any]] = []
    found = read_object(path, {"long": lambda place, one: elements.append((place, one))})
    assert [place for place, _ in elements] == list(range(len(elements)))
    return found, [one for _, one in elements]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json") / "a.json"


@given(
    st.dictionaries(st.text(), values, max_size=3),
    st.lists(values, max_size=6),
    st.dictionaries(st.text(), values, max_size=3),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_what_is_read_does_not_depend_on_where_a_block_ends(
    file: Path, before: dict, long: list, after: dict, block: int, indent: int | None, ascii_only: bool
) -> None:
    whole = {**before, "long": long, **{name: value for name, value in after.items() if name not in before}}
    whole["long"] = long
    file.write_text(json.dumps(whole, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "BLOCK", block)
        found, elements = read(file)
    assert found == {**whole, "long": len(long)}
    assert elements == long


def test_no_more_than_a_block_and_an_element_is_held(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(json.dumps({"long": [{"a": number} for number in range(10_000)]}))
    monkeypatch.setattr(json_arrays, "BLOCK", 100)
    longest, more = 0, json_arrays._Text._more

    def watched(self: json_arrays._Text) -> bool:
        nonlocal longest
        found = more(self)
        longest = max(longest, len(self._text))
        return found

    monkeypatch.setattr(json_arrays._Text, "_more", watched)
    assert len(read(file)[1]) == 10_000
    assert longest < 300


def test_a_mark_at_the_begin_of_the_file_is_no_part_of_it(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read(file) == ({"a": 1}, [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no JSON object"),
        (b"[1, 2]", "holds no JSON object"),
        (b"not json", "holds no JSON object"),
        (b'{"a": 1', "Expecting ',' in line 1"),
        (b'{"a": 1,\n "b" 2}', "Expecting ':' in line 2"),
        (b'{"a": 1,\n\n "long": [1, oh]}', "in line 3"),
        (b'{"long": [1, 2', "Expecting ',' in line 1"),
        (b'{"long": 3}', "'long' is no list"),
        (b'{"a": 1} more', "the end of the file"),
        (b"{1: 2}", "the name of a member"),
        (b'{"a": "\xff"}', "not written in UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "deeper than can be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
    ],
)
def test_what_is_no_json_is_refused_by_name_and_line(file: Path, content: bytes, says: str) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        read(file)
    assert str(file) in str(error.value)


def test_lines_are_counted_from_the_begin_of_the_file_and_not_of_a_block(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_arrays, "BLOCK", 16)
    file.write_text('{"long": [\n' + '{"a": 1},\n' * 50 + '{"a": 1}\n{"a": 2}]}')
    with pytest.raises(InputError, match="Expecting ',' in line 53"):
        read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.json"):
        read(tmp_path / "none.json")
