"""README.md of a trained model as the hub shows it: what a run knows of its data, scores, plans and expert load."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.hub_folder import without_folders
from synchromesh.training.run_folder import Trained
from synchromesh.training.summary import model_size

MOST_CLASSES = 50  # whose names are listed


def model_card(
    trained: Trained, *, recipe: TrainConfig | None, summary: Mapping[str, Any] | None, licence: str | None = None
) -> str:
    """Return the page, in Markdown with the hub's front matter.

    Args:
        trained: the model.
        recipe: as run; None for a checkpoint alone.
        summary: of the finished run; None where there is none.
        licence: of the weights, by the hub's short name; None leaves it open.
    """
    name = "model" if recipe is None else recipe.name
    parts = [
        _front(trained, name, summary, licence),
        f"# {_plain(name)}\n\n{_about(trained)}",
        _use(),
        "## Data\n\n" + "\n".join(_data(trained)),
        "## Scores\n\n" + "\n".join(_scores(trained, summary)),
        "## Experts\n\n" + "\n".join([*_load(summary), "", *_plans(summary)]),
    ]
    if recipe is not None:
        parts.append(f"## Recipe\n\n```json\n{json.dumps(encode(without_folders(recipe)), indent=2)}\n```")
    return "\n\n".join(parts) + "\n"


def _front(trained: Trained, name: str, summary: Mapping[str, Any] | None, licence: str | None) -> str:
    """Return the front matter; JSON is YAML, so that no name can end it or add to it."""
    kind = type(trained.task).__name__
    values: dict[str, Any] = {"library_name": "synchromesh", "tags": ["mixture-of-experts", "synchromesh"]}
    if licence is not None:
        values["license"] = licence
    if trained.task.pipeline:
        values["pipeline_tag"] = trained.task.pipeline
    scores = [
        {"type": number.name, "name": number.title, "value": summary[f"test_{number.name}"]}
        for number in trained.task.numbers
        if summary is not None and f"test_{number.name}" in summary
    ]
    if scores:
        task, data = {"type": values.get("pipeline_tag", kind.lower())}, {"type": "local", "name": _source(trained)}
        values["model-index"] = [{"name": name, "results": [{"task": task, "dataset": data, "metrics": scores}]}]
    lines = [f"{key}: {json.dumps(_clean(value), ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _about(trained: Trained) -> str:
    size = model_size(trained.model)
    return (
        f"A {type(trained.model).__name__} for {type(trained.task).__name__}, trained with synchromesh: "
        f"{size.parameters:,} parameters, {size.active:,} of them active for a token."
    )


def _use() -> str:
    return (
        "## Use\n\n```sh\nsynchromesh pull hf://OWNER/NAME runs/pulled        # or this folder in place of hf://...\n"
        "synchromesh predict picture.png --run runs/pulled\n```\n\n"
        "`--start.weights runs/pulled` begins a training from it. The weights are safetensors; no file here holds code."
    )


def _source(trained: Trained) -> str:
    data = getattr(trained.task, "data", None)
    return type(getattr(data, "source", data)).__name__


def _data(trained: Trained) -> Iterator[str]:
    about = trained.task.about(trained.facts)
    yield f"`{_source(trained)}`" + (f", {about}." if about else ".")
    classes: Sequence[str] = trained.facts.get("classes", ())
    if classes:
        more = f" and {len(classes) - MOST_CLASSES:,} more" if len(classes) > MOST_CLASSES else ""
        yield ""
        yield f"Classes: {', '.join(map(_plain, classes[:MOST_CLASSES]))}{more}."


def _scores(trained: Trained, summary: Mapping[str, Any] | None) -> Iterator[str]:
    if summary is None:
        yield "The run was not finished when this page was written: there are none."
        return
    unit = trained.task.unit
    count, epochs = summary.get(f"test_{unit}", 0), summary["epochs"]
    yield f"On {count:,} {unit} that were not trained on, after the last of {epochs} epochs:"
    yield from ("", "| | |", "|---|---|")
    for number in trained.task.numbers:
        value = summary.get(f"test_{number.name}")
        if value is not None:
            yield f"| {number.heading} | {number.form.format(value)} |"
    yield ""
    seconds, device = summary["train_seconds"], _plain(str(summary["device"]))
    yield f"Training took {seconds:,} seconds on {device}, seed {summary['seed']}."


def _load(summary: Mapping[str, Any] | None) -> Iterator[str]:
    load = {} if summary is None else summary.get("test_load", {})
    if not load:
        yield "No load of experts is known."
        return
    yield "Load on the test data, of a layer's even share:"
    yield from ("", "| layer | busiest | idlest | experts | dead |", "|---|---|---|---|---|")
    dead = {} if summary is None else summary.get("dead_experts_by_layer", {})
    for layer, shares in load.items():
        even = 1 / len(shares)
        idle = len(dead.get(layer, ()))
        yield f"| `{layer}` | {max(shares) / even:.2f} | {min(shares) / even:.2f} | {len(shares)} | {idle} |"


def _plans(summary: Mapping[str, Any] | None) -> Iterator[str]:
    plans = {} if summary is None else summary.get("plans", {})
    if not plans:
        yield "It was trained by one fixed plan, or on one process."
        return
    yield "Training forwards by plan (a plan never changes what is computed):"
    yield from ("", "| layer | plans |", "|---|---|")
    for layer, own in plans.items():
        yield f"| `{layer}` | {_plain(', '.join(f'{plan}: {count:,}' for plan, count in own.items()))} |"


def _plain(text: str) -> str:
    """Write text so that Markdown and HTML show it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", html.escape(_clean(text)))


def _clean(value: Any) -> Any:
    """Take control characters and halves of surrogates out of every text."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    if isinstance(value, Mapping):
        return {str(key): _clean(one) for key, one in value.items()}
    return [_clean(one) for one in value] if isinstance(value, list) else value
