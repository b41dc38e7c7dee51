"""`synchromesh push` and `pull`: a trained model goes out and comes back bit for bit, and nothing hostile comes in."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from synchromesh import cli
from synchromesh.commands.hub import Repository, repository
from synchromesh.errors import InputError
from synchromesh.recipes.catalog import CATALOG
from synchromesh.training.hub_folder import FILES
from synchromesh.training.model_card import model_card
from synchromesh.training.run_folder import Trained, load_trained


@pytest.fixture(scope="module")
def run(tiny_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    assert cli.main(["train", "digits", *tiny_options, "--epochs=1", f"--run={folder}"]) == 0
    return folder


@pytest.fixture
def pushed(run: Path, tmp_path: Path) -> Path:
    assert cli.main(["push", str(run), str(tmp_path / "pushed"), "--licence", "mit"]) == 0
    return tmp_path / "pushed"


def refused(source: object, run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(["pull", str(source), str(run)]) == 2
    assert not run.exists()
    return capsys.readouterr().err


def test_a_pulled_model_is_the_pushed_one_bit_for_bit(run: Path, pushed: Path, tmp_path: Path) -> None:
    assert cli.main(["pull", str(pushed), str(tmp_path / "pulled")]) == 0
    one, other = (load_trained(folder, CATALOG) for folder in (run, tmp_path / "pulled"))
    assert one.task == other.task
    assert one.facts == other.facts
    given, wanted = other.model.state_dict(), one.model.state_dict()
    assert given.keys() == wanted.keys()
    assert all(
        torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype for name, tensor in given.items()
    )
    stored = load_file(pushed / "model.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {n: t.shape for n, t in wanted.items()}
    assert sorted(path.name for path in pushed.iterdir()) == sorted(FILES)


def test_a_pulled_model_is_scored_and_goes_on_as_the_run_does(
    run: Path, pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", str(pushed), str(tmp_path / "pulled")]) == 0
    said = []
    for folder in (run, tmp_path / "pulled"):
        capsys.readouterr()
        assert cli.main(["eval", str(folder), "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert said[0] == said[1]


def test_the_card_is_filled_in_by_the_run(run: Path, pushed: Path) -> None:
    card = (pushed / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == (
        "synchromesh", "mit", "image-classification",
    )  # fmt: skip
    (result,) = huggingface_hub.ModelCard(card).data.eval_results[:1]
    assert (result.metric_type, result.metric_value) == ("accuracy", summary["test_accuracy"])
    assert f"{summary['parameters']:,} parameters, {summary['active_parameters']:,} of them active" in card
    assert "`ScikitDigits`, 10 classes, grey 8 x 8." in card
    (layer,) = summary["test_load"]
    assert f"| `{layer}` | {4 * max(summary['test_load'][layer]):.2f} |" in card
    assert '"num_experts": 4' in card  # the recipe


def test_no_file_that_is_published_tells_where_the_data_lie(tiny_options: list[str], photo, tmp_path: Path) -> None:
    data = tmp_path / "home-of-somebody" / "pictures"
    for part, count in (("train", 4), ("val", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                photo(data / part / name / f"{number}.png", seed=number)
    run, options = tmp_path / "run", [*tiny_options, "--epochs=1", "--nproc=1", "--twin=none"]
    assert cli.main(["train", "--data", str(data), *options, f"--run={run}"]) == 0
    assert cli.main(["push", str(run), str(tmp_path / "out")]) == 0
    for file in ("config.json", "recipe.json", "README.md"):
        said = (tmp_path / "out" / file).read_text()
        assert "home-of-somebody" not in said, file
    assert '"pictures"' in (tmp_path / "out" / "recipe.json").read_text()


def test_hostile_names_stay_text_in_the_card(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    trained = load_trained(checkpoint, CATALOG)
    evil = ["---\nlicense: x", "<script>alert(1)</script>", "[a](javascript:b)", "`x`|", *map(str, range(6))]
    card = model_card(Trained(trained.model, trained.task, {"classes": evil}, checkpoint), recipe=None, summary=None)
    assert card.count("---\n") == 2
    assert "<script>" not in card
    assert "\\[a\\](javascript:b)" in card
    assert "license" not in huggingface_hub.ModelCard(card).data.to_dict()


def test_a_checkpoint_is_pushed_without_scores(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert cli.main(["push", str(checkpoint), str(tmp_path / "pushed")]) == 0
    assert "there are none" in (tmp_path / "pushed" / "README.md").read_text()
    assert not (tmp_path / "pushed" / "recipe.json").exists()
    assert cli.main(["push", str(checkpoint), str(tmp_path / "pushed")]) == 2  # it is not empty


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        where = config
        *path, last = name.split("__")
        for part in path:
            where = where[part]
        where[last] = value
    (folder / "config.json").write_text(json.dumps(config))


HOSTILE = [  # settings that ask for memory or time, or for classes that are not known
    ({"model__embed_dim": 1 << 40}, "overflowed"),
    ({"model__embed_dim": 1 << 14}, "parameters, its file holds"),
    ({"model__depths": [1 << 30, 1], "model__experts": None}, "more parameters than the"),
    ({"model__experts__num_experts": 1 << 45}, ""),
    ({"facts": {"classes": ["x"] * 100_000}}, "numbers: wanted all of them"),
    ({"facts": {"classes": "0123456789"}}, "wanted a list of names"),
    ({"facts": {}}, "the facts have no 'classes'"),
    ({"facts": [1]}, "wanted an object"),
    ({"task__kind": "os.system"}, "the kind is 'os.system'"),
    ({"model": {"kind": "Popen"}}, "the kind is 'Popen'"),
    ({"model__depths": [-1, 1]}, ""),
    ({"model__mlp_ratio": -4.0}, ""),
    ({"library_name": "transformers"}, "not of a model of this library"),
]


@pytest.mark.parametrize(("fields", "says"), HOSTILE, ids=str)
def test_a_hostile_config_is_refused_before_memory_is_taken(
    fields: dict[str, Any], says: str, pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(pushed, **fields)
    said = refused(pushed, tmp_path / "pulled", capsys)
    assert said.startswith("error: ")
    assert says in said


def test_a_pickle_under_the_name_of_weights_is_not_run(
    pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    torch.save({"model": Evil()}, pushed / "model.safetensors")
    assert "is not a whole safetensors file" in refused(pushed, tmp_path / "pulled", capsys)
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "shape", "name"])
def test_damaged_weights_are_named(
    damage: str, pushed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pushed / "model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "missing":
        file.unlink()
    else:
        tensors = load_file(file)
        first = tensors.pop("head.weight")
        tensors |= {"head.weight": first.flatten()} if damage == "shape" else {"head.wait": first}
        save_file(tensors, file)
    said = refused(pushed, tmp_path / "pulled", capsys)
    assert str(pushed) in said
    assert damage in ("cut", "missing") or "head.weight" in said


def test_only_the_files_of_a_model_are_downloaded(pushed: Path, tmp_path: Path) -> None:
    """A hub on this machine: listing and files as huggingface.co gives them."""
    (pushed / "evil.py").write_text("raise SystemExit")
    with served(pushed) as address:
        Repository("owner/name", endpoint=address).download(tmp_path / "local", FILES)
    got = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir() if path.is_file()}
    assert got == {name: (pushed / name).read_bytes() for name in FILES}


def test_a_hub_that_is_not_reached_is_one_sentence(run: Path, tmp_path: Path) -> None:
    nowhere = Repository("owner/name", endpoint="http://127.0.0.1:9")
    for call in (lambda: nowhere.upload(tmp_path), lambda: nowhere.download(tmp_path, FILES)):
        with pytest.raises(InputError, match=r"cannot reach hf://owner/name: .*push to a folder"):
            call()


def test_what_is_pushed_to_a_hub_is_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, endpoint: str | None) -> None: ...

        def create_repo(self, name: str, **named: Any) -> None:
            seen.update(created=name, **named)

        def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None) -> str:
            seen.update(uploaded=repo_id, files=sorted(path.name for path in folder_path.iterdir()))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert cli.main(["push", str(run), "hf://owner/name", "--private"]) == 0
    assert seen == {
        "created": "owner/name", "private": True, "exist_ok": True, "uploaded": "owner/name", "files": sorted(FILES),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["hf://", "hf://owner", "hf://a/b/c", "hf://../x", "hf://o/n@"])
def test_names_of_repositories_are_checked(text: str) -> None:
    if text == "hf://../x" or text == "hf://o/n@":
        assert (
            repository(text) is not None
        )  # huggingface_hub's own rules are stricter, and are asked before the network
        return
    with pytest.raises(InputError, match="wanted hf://OWNER/NAME"):
        repository(text)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder as the repository owner/name of a hub; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if "/tree/" in self.path:
                files = [{"type": "file", "path": path.name, "size": 1, "oid": "x"} for path in folder.iterdir()]
                body = json.dumps(files).encode()
            elif self.path.startswith("/api/models/owner/name"):
                names = [{"rfilename": path.name} for path in folder.iterdir()]
                body = json.dumps({"id": "owner/name", "sha": "a" * 40, "siblings": names}).encode()
            else:
                body = (folder / self.path.rpartition("/")[2]).read_bytes()
            self.send_response(200)
            for name, value in (("ETag", '"x"'), ("X-Repo-Commit", "a" * 40), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
