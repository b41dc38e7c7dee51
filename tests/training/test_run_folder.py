import dataclasses
import json
from pathlib import Path

import pytest

from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.durable import write_atomically, write_json
from synchromesh.training.run_folder import claimed, is_run_of, load_trained, prepare_folder, read_config


def test_the_recipe_of_a_run_reads_back(tiny: TrainConfig, tmp_path: Path) -> None:
    assert prepare_folder(tmp_path / "run", tiny, CATALOG, resume=False) == ""
    assert read_config(tmp_path / "run", CATALOG) == tiny


def test_older_runs_are_numbered_and_never_deleted(tiny: TrainConfig, tmp_path: Path) -> None:
    for seed in range(4):
        prepare_folder(tmp_path / "run", dataclasses.replace(tiny, seed=seed), CATALOG, resume=False)
    found = {p.name: read_config(p, CATALOG).seed for p in tmp_path.iterdir()}
    assert found == {"run.1": 0, "run.2": 1, "run.3": 2, "run": 3}


def test_what_was_found_is_said(tiny: TrainConfig, tmp_path: Path) -> None:
    prepare_folder(tmp_path / "run", tiny, CATALOG, resume=False)
    assert "held an unfinished run (--resume would have" in prepare_folder(
        tmp_path / "run", tiny, CATALOG, resume=False
    )
    write_json(tmp_path / "run" / "summary.json", {})
    assert "held a finished run" in prepare_folder(tmp_path / "run", tiny, CATALOG, resume=False)


def test_settings_that_change_no_number_may_change_on_resuming(tiny: TrainConfig, tmp_path: Path) -> None:
    prepare_folder(tmp_path, tiny, CATALOG, resume=True)
    other = dataclasses.replace(tiny, keep=dataclasses.replace(tiny.keep, tensorboard=True))
    prepare_folder(tmp_path, other, CATALOG, resume=True)
    with pytest.raises(InputError, match="epochs: 2 -> 3"):
        prepare_folder(tmp_path, dataclasses.replace(tiny, epochs=3), CATALOG, resume=True)


def test_an_empty_folder_is_taken(tiny: TrainConfig, tmp_path: Path) -> None:
    assert prepare_folder(tmp_path, tiny, CATALOG, resume=False) == ""


def test_one_process_at_a_time(tiny: TrainConfig, tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(InputError, match="another process is training"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the run folder"), claimed(tmp_path / "file" / "run"):
        pass


def test_a_damaged_recipe_is_named(tiny: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(encode(tiny))[:-10])
    with pytest.raises(InputError, match=r"recipe\.json cannot be read"):
        read_config(tmp_path, CATALOG)


def test_a_run_without_checkpoints_has_no_model(tiny: TrainConfig, tmp_path: Path) -> None:
    prepare_folder(tmp_path, tiny, CATALOG, resume=False)
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_trained(tmp_path, CATALOG)
    with pytest.raises(InputError, match="kept no best checkpoint"):
        load_trained(tmp_path, CATALOG, best=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert json.loads(path.read_text()) == {"x": 0.1}
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_restarted_job_knows_its_own_run_from_an_older_one(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not is_run_of(folder, "a")
    prepare_folder(folder, tiny, CATALOG, resume=False, job="a")
    assert is_run_of(folder, "a")
    assert not is_run_of(folder, "b")
