"""`synchromesh models`: every architecture by name, with what it costs; nothing is downloaded, no weight allocated."""

from __future__ import annotations

import json as to_json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import groupby
from typing import Any

import torch
import tyro
from torch import nn

from synchromesh.commands.context import Context
from synchromesh.compat.converters import CONVERTERS, describe
from synchromesh.errors import InputError
from synchromesh.models.costs import Costs, costs, has_whole_costs
from synchromesh.models.features import Backbone, BackboneConfig, Place
from synchromesh.models.mixtures import choices_of
from synchromesh.models.published import PUBLISHED, Architecture, Family
from synchromesh.moe.layer import MoE
from synchromesh.recipes.facts import FACTS
from synchromesh.training.catalog import Catalog
from synchromesh.training.codec import encode
from synchromesh.training.config import TrainConfig
from synchromesh.training.task import Facts

ABOUT = """\
List the architectures that have a name, or show one of them.

  synchromesh models
  synchromesh models show swinv2_moe_b_e32
  synchromesh models --json
"""
RECIPES = Family(
    "recipes", "`synchromesh train NAME`", "none shipped; training makes them", "MIT; what data ask for besides"
)
COLUMNS = ("name", "parameters", "active", "multiply-adds", "input", "experts")


@dataclass(frozen=True)
class Request:
    """Options of `models`.

    Attributes:
        words: nothing, or show NAME.
        json: print one JSON object a line.
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    json: bool = False


@dataclass(frozen=True)
class Measured:
    """An architecture that was built without memory, and counted.

    Attributes:
        name: of it.
        architecture: what it is.
        model: on the meta device.
        costs: counted.
    """

    name: str
    architecture: Architecture
    model: nn.Module
    costs: Costs

    @property
    def backbone(self) -> Backbone:
        """The backbone of the model."""
        found = self.model.get_submodule("backbone")
        assert isinstance(found, Backbone)
        return found

    @property
    def settings(self) -> BackboneConfig:
        """The settings of the backbone."""
        found: Any = self.backbone
        return found.config

    @property
    def image(self) -> tuple[int, ...]:
        """Channels, height and width of an image of the configured size; empty for a backbone without one."""
        size = getattr(self.settings, "image_size", None)
        sides = (size, size) if isinstance(size, int) else size
        return () if sides is None else (getattr(self.settings, "in_channels", 3), *sides)

    def json(self) -> dict[str, Any]:
        """Return plain values."""
        family, experts = self.architecture.family, self.settings.experts
        return {
            "name": self.name,
            "family": family.title,
            "source": family.source,
            "model": type(self.model).__name__,
            "parameters": self.costs.parameters,
            "active_parameters": self.costs.active_parameters,
            "router_parameters": self.costs.router_parameters,
            "multiply_adds": self.costs.multiply_adds,
            "multiply_adds_of": "model" if has_whole_costs(self.model) else "backbone",
            "input": list(self.image),
            "experts": None if experts is None else experts.num_experts,
            "weights": family.weights,
            "licence": family.licence,
            "converters": [one.theirs for one in CONVERTERS if one.fits(self.model)],
        }

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table."""
        work = f"{self.costs.multiply_adds / 1e9:.3f} G" + ("" if has_whole_costs(self.model) else " *")
        experts = self.settings.experts
        return (
            self.name,
            f"{self.costs.parameters / 1e6:,.2f} M",
            f"{self.costs.active_parameters / 1e6:,.2f} M",
            work,
            "x".join(map(str, self.image)),
            "-" if experts is None else f"{experts.num_experts} k={experts.k}",
        )


def run(request: Request, context: Context) -> int:
    """Print the list, or one architecture; return 0.

    Raises:
        InputError: there is no such name, or other words than `show NAME`.
    """
    known = _known(context)
    shown = _shown(request.words, known)
    found: Iterator[Measured] = (measured(name, known[name]) for name in ([shown] if shown else known))
    say = partial(context.console.print, soft_wrap=True, highlight=False, markup=False)
    if request.json:
        for one in found:
            say(to_json.dumps({**one.json(), **(_details(one) if shown else {})}))
    else:
        say("\n".join(_page(next(found)) if shown else _table(list(found))))
    return 0


def architectures(catalog: Catalog) -> dict[str, Architecture]:
    """Return what has a name: published and demonstration sizes, and the models of the recipes with their heads."""
    recipes = {name: _of_recipe(name, make(), FACTS[name]) for name, make in catalog.recipes.items() if name in FACTS}
    return {**PUBLISHED, **recipes}


def _known(context: Context) -> dict[str, Architecture]:
    try:
        return architectures(context.catalog())
    except InputError as missing:  # the packages of an extra, which the published sizes do without
        context.errors.print(f"without the models of the recipes: {missing}", highlight=False, soft_wrap=True)
        return dict(PUBLISHED)


def measured(name: str, architecture: Architecture) -> Measured:
    """Build an architecture on the meta device, and count it."""
    with torch.device("meta"):
        model = architecture.build()
    return Measured(name, architecture, model, costs(model))


def _of_recipe(name: str, config: TrainConfig, facts: Facts) -> Architecture:
    build: Callable[[], nn.Module] = partial(config.task.build, config.model, facts)
    python = (
        "from synchromesh.recipes.catalog import RECIPES\n"
        "from synchromesh.recipes.facts import FACTS\n"
        f"config = RECIPES[{name!r}]()\n"
        f"model = config.task.build(config.model, FACTS[{name!r}])"
    )
    return Architecture(RECIPES, build, python)


def _shown(words: Sequence[str], known: Mapping[str, Architecture]) -> str | None:
    if not words:
        return None
    if len(words) != 2 or words[0] != "show":
        raise InputError(f"got `models {' '.join(words)}`, wanted `models` or `models show NAME`")
    if words[1] not in known:
        near = get_close_matches(words[1], known, cutoff=0.4)
        meant = f"is it {' or '.join(near)}? " if near else ""
        raise InputError(f"there is no model {words[1]!r}: {meant}`synchromesh models` lists all {len(known)}")
    return words[1]


def _table(found: Sequence[Measured]) -> Iterator[str]:
    """Lay the list out in columns as wide as what stands in them: no number is ever cut."""
    rows = [COLUMNS, *(one.cells() for one in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield _line(COLUMNS, widths)
    cells = dict(zip((one.name for one in found), rows[1:], strict=True))
    for family, members in groupby(found, key=lambda one: one.architecture.family):
        yield ""
        yield f"{family.title} ({family.source})"
        yield f"weights: {family.weights}"
        yield f"licence: {family.licence}"
        yield from (_line(cells[one.name], widths) for one in members)
    yield ""
    yield "multiply-adds: of one image, which papers call FLOPs; * of the backbone alone, beside a head for dense tasks"
    yield "active: parameters that one token passes, without routers; no weights are shipped with this library"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    sides = (str.ljust, str.rjust, str.rjust, str.rjust, str.rjust, str.rjust)
    return " ".join(side(cell, width) for side, cell, width in zip(sides, cells, widths, strict=True)).rstrip()


def _stages(one: Measured) -> Iterator[dict[str, Any]]:
    """Say what each stage of the backbone is made of."""
    places = list(one.backbone.feed_forwards())
    for stage, own in groupby(places, key=lambda place: place.stage):
        blocks = list(own)
        yield {
            "stage": stage + 1,
            "blocks": len(blocks),
            "positions": blocks[0].positions,
            "width": blocks[0].width,
            "experts": [_layer(number, place) for number, place in enumerate(blocks) if isinstance(place.ffn, MoE)],
        }


def _layer(block: int, place: Place) -> dict[str, Any]:
    moe = place.ffn
    assert isinstance(moe, MoE)
    hidden = getattr(moe.experts, "hidden", None)
    return {"block": block, "experts": moe.experts.num_experts, "k": choices_of(moe), "hidden": hidden}


def _details(one: Measured) -> dict[str, Any]:
    return {"config": encode(one.settings), "stages": list(_stages(one)), "python": one.architecture.python}


def _page(one: Measured) -> Iterator[str]:
    family, counted = one.architecture.family, one.costs
    of = "model" if has_whole_costs(one.model) else "backbone"
    yield f"{one.name}: {type(one.model).__name__} of {family.title} ({family.source})"
    yield f"parameters     {counted.parameters:,}"
    yield f"active         {counted.active_parameters:,}, and {counted.router_parameters:,} of routers"
    yield f"multiply-adds  {counted.multiply_adds:,} for one image, of the {of}"
    yield f"input          {' x '.join(map(str, one.image))}"
    yield f"weights        {family.weights}"
    yield f"licence        {family.licence}"
    yield ""
    for stage in _stages(one):
        size = f"{stage['positions']:,} positions of width {stage['width']}"
        yield f"stage {stage['stage']}: {stage['blocks']} blocks, {size}"
        for layer in stage["experts"]:
            held = f"{layer['experts']} experts of hidden width {layer['hidden']}"
            yield f"    block {layer['block']}: {held}, k {layer['k']}"
    yield ""
    yield from _fields(encode(one.settings))
    yield ""
    yield "in Python:"
    yield from (f"    {line}" for line in one.architecture.python.splitlines())
    fits = tuple(converter for converter in CONVERTERS if converter.fits(one.model))
    yield ""
    yield "converters:" if fits else "converters: none of weights of this model"
    yield from (f"    {line}" for line in describe(fits).splitlines())


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name} = {to_json.dumps(value)}"
