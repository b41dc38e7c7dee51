"""The names that `from synchromesh import ...` knows: at run time a table of homes, for type checkers a stub."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import synchromesh

STUB = Path(synchromesh.__file__).with_suffix(".pyi")


def homes_in_the_stub() -> dict[str, str]:
    """Return the module that each name of the stub is imported from."""
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for one in node.names:
                assert one.asname == one.name, f"{one.name} is not exported: write `{one.name} as {one.name}`"
                found[one.name] = node.module
    return found


def homes_at_run_time() -> dict[str, str]:
    return {name: f"synchromesh.{module}" for module, names in synchromesh._HOMES.items() for name in names}


def test_the_stub_and_the_table_name_the_same_homes() -> None:
    assert homes_in_the_stub() == homes_at_run_time()


def test_no_name_has_two_homes_and_all_are_told() -> None:
    names = [name for own in synchromesh._HOMES.values() for name in own]
    assert len(names) == len(set(names))
    assert synchromesh.__all__ == sorted(names)
    assert set(names) <= set(dir(synchromesh))


@pytest.mark.parametrize(("name", "home"), homes_at_run_time().items())
def test_a_public_name_is_what_its_home_has(name: str, home: str) -> None:
    module = importlib.import_module(home)
    value = getattr(synchromesh, name)
    assert value is getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == home or value.__module__.startswith(f"{home}."), "defined elsewhere: name that home"


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'synchromesh' has no attribute 'Mixture'"):
        _ = synchromesh.Mixture
