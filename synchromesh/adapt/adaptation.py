"""adapt: chosen modules of a model become others that start as the same function; `Adaptation` is what came of it.

model ── adapt(model, select, factory) ──> Adaptation: trained(), after_step()
                                                ├── merge() ──> plain modules again, with what was learned
                                                └── undo()  ──> the modules of before, as they were
"""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from synchromesh.torch_private import children_of

Predicate = Callable[[str, nn.Module], bool]
"""(dotted name, module) -> whether it is chosen."""

Select = type[nn.Module] | str | Predicate | tuple[type[nn.Module] | str, ...] | list[type[nn.Module] | str]
"""Which modules: a type, a pattern of the dotted name as of a shell (`encoder.*.mlp`), any of several, a function."""

Factory = Callable[[str, nn.Module], nn.Module | None]
"""(dotted name, module) -> the module in its place; None leaves it, and looks at what is inside."""


class Adapted(nn.Module, ABC):
    """A module that stands for another one, starts as the same function, and can become plain again.

    What it needs for that are its parameters and buffers, so that state dicts, copies and checkpoints keep it.
    """

    def trained(self) -> Iterable[nn.Parameter]:
        """Return what learns, of its parameters and those of modules inside it."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def after_step(self) -> None:
        """Do what is to be done after each optimizer step. On ranks all of them call it together."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return a plain module of the same function. On ranks all of them call it together, and get the same.

        Raises:
            ValueError: there is none.
        """


class AdaptedTensor(nn.Module, ABC):
    """A parametrization (torch.nn.utils.parametrize) of one tensor of a module that otherwise stays what it is.

    Its module is plain again with the tensor as it is computed with; `merge` sees to that.
    """

    @abstractmethod
    def hold(self, cut: Callable[[Tensor], Tensor]) -> None:
        """Keep its own tensors, of the shape of the tensor, for a part of it: experts that are spread over ranks."""


@dataclass(frozen=True)
class Change:
    """One module that was replaced.

    Attributes:
        name: where it stood, dotted; the first place of a module that stands in several.
        old: what stood there.
        new: what stands there now.
    """

    name: str
    old: nn.Module
    new: nn.Module


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` changed of a model. `copy.deepcopy` of it is that of a copy of the model, in its attribute `model`.

    Attributes:
        model: the model, changed in place.
        changes: in the order of the model's modules. They hold the old modules, and so twice the memory of these.
        names: of all places, dotted; a module in two places has two.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    names: tuple[str, ...]

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what learns of the new modules, by its names in the model."""
        own = {id(parameter) for change in self.changes for parameter in _trained(change.new)}
        return {name: parameter for name, parameter in self.model.named_parameters() if id(parameter) in own}

    def after_step(self) -> None:
        """Do what the new modules want after each optimizer step; training of this library does it by itself."""
        for change in self.changes:
            after_step(change.new)

    def merge(self) -> nn.Module:
        """Make the model plain again, with what was learned; return it. On ranks all of them call it together.

        Its parameters learn where those of the old modules did, whatever was frozen meanwhile.

        Raises:
            ValueError: a module has no plain form, or is no longer in the model. Nothing has changed then.
        """
        plain = {change.new: _merged(change) for change in self.changes if not _tensors_of(change.new)}
        self._find(change.new for change in self.changes)
        for change in self.changes:
            if change.new not in plain:
                plain[change.new] = merge_tensors(change.new, *_tensors_of(change.new))
            _learn_as(change.old, plain[change.new])
        self._put(plain)
        return self.model

    def undo(self) -> nn.Module:
        """Put the old modules back, with the numbers that they had; return the model.

        Raises:
            ValueError: a new module is no longer in the model. Nothing has changed then.
        """
        self._put({change.new: change.old for change in self.changes})
        return self.model

    def _put(self, instead: Mapping[nn.Module, nn.Module]) -> None:
        """Put modules into the places of others, wherever in the model these are now, such as inside an adapter."""
        for parent, name, child in self._find(instead):
            setattr(parent, name, instead[child].train(child.training))

    def _find(self, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
        """Return all places, (parent, name, module), of these modules. Raises ValueError where one has none."""
        wanted = set(modules)
        places = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in children_of(parent).items()
            if child is not None and child in wanted
        ]
        there = {child for _, _, child in places}
        gone = [change.name for change in self.changes if change.new not in there]
        if gone:
            raise ValueError(
                f"the adapted modules {_some(gone)} are no longer in {type(self.model).__name__}: merge or undo an "
                "adaptation once, and before others replace its modules"
            )
        return places


def adapt(model: nn.Module, select: Select, factory: Factory) -> Adaptation:
    """Replace chosen modules of a model, in place, by what a factory makes of them.

    Parameters of a new module that are not the old one's are unknown to an optimizer: build it afterwards. The new
    modules are in training or evaluation as the old ones were.

    Args:
        model: any model.
        select: a type, a pattern of dotted names (`*` any characters, dots too, `?` one, `[...]` some), several of
            these, or a function of name and module. The outermost modules are asked first; what is inside a replaced
            one is not looked at.
        factory: called with each chosen module's name and itself; None leaves it. A module in two places stays one. It
            changes nothing of the old module, which `undo` puts back.

    Raises:
        ValueError: nothing was selected, or the model itself, or the factory left all as it was; or as it raises. The
            model is as before.

    >>> class Doubled(nn.Module):
    ...     def __init__(self, old):
    ...         super().__init__()
    ...         self.old = old
    ...     def forward(self, x):
    ...         return 2 * self.old(x)
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> adaptation = adapt(model, "1", lambda name, old: Doubled(old))
    >>> adaptation.names, list(adaptation.trained())
    (('1',), ['1.old.weight', '1.old.bias'])
    >>> adaptation.undo() is model and type(model[1]).__name__
    'Linear'
    """
    chosen = matching(select)
    if chosen("", model) and not isinstance(select, (type, tuple, list)):  # a type may also be that of the model around
        raise ValueError("select chose the model itself, wanted blocks inside it")
    found = _Found(chosen, factory)
    found.look_inside(model, "")
    if not found.asked:
        names = [name for name, _ in model.named_modules() if name][:8]
        raise ValueError(f"select chose no module of {type(model).__name__}; names look like {names}")
    if not found.places:
        raise ValueError(f"the factory left all {len(found.asked)} chosen modules as they are: {_some(found.asked)}")
    _check_not_shared(model, found.made)
    for parent, own_name, _, old in found.places:  # only now, so that an error of the factory leaves the model whole
        setattr(parent, own_name, found.made[old])
    names = tuple(path for _, _, path, _ in found.places)
    first = {old: path for _, _, path, old in reversed(found.places)}
    changes = tuple(Change(path, old, found.made[old]) for old, path in reversed(first.items()))
    return Adaptation(model, changes, names)


def after_step(model: nn.Module) -> None:
    """Do what adapted modules anywhere in a model want after each optimizer step, such as new means for gates."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.after_step()


def merge_all(model: nn.Module) -> list[str]:
    """Make every adapted module of a model plain, in place, whoever adapted it; return their names, perhaps none.

    On ranks all of them call it together.

    Raises:
        ValueError: a module has no plain form, or the model itself is an adapted one.
    """
    if isinstance(model, Adapted):
        raise ValueError(f"got a {type(model).__name__} itself, wanted a model around it: call its merged()")
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    outer = {n: m for n, m in adapted.items() if not any(n.startswith(f"{other}.") for other in adapted)}
    masked = {name: module for name, module in model.named_modules() if _tensors_of(module)}
    for module in masked.values():  # first: experts inside of others may be masked
        merge_tensors(module, *_tensors_of(module))
    changes = tuple(Change(name, module, module) for name, module in outer.items())
    if changes:
        Adaptation(model, changes, tuple(outer)).merge()
    return [*outer, *(name for name in masked if not any(name.startswith(f"{other}.") for other in outer))]


def matching(select: Select) -> Predicate:
    """Return what chooses modules as a function of name and module."""
    if isinstance(select, str):
        return lambda name, module: fnmatch.fnmatchcase(name, select) and name != ""
    if isinstance(select, type):
        return lambda name, module: isinstance(module, select)
    if isinstance(select, (tuple, list)):
        each = [matching(one) for one in select]
        return lambda name, module: any(one(name, module) for one in each)
    return select


def merge_tensors(module: nn.Module, *names: str) -> nn.Module:
    """Make parametrized tensors of a module plain, in place; the parameters stay the same objects."""
    for name in names:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return module


class _Found:
    """What is to be replaced: places, and what was made for each old module."""

    def __init__(self, chosen: Predicate, factory: Factory) -> None:
        self.chosen, self.factory = chosen, factory
        self.places: list[tuple[nn.Module, str, str, nn.Module]] = []  # parent, name in it, dotted name, old module
        self.made: dict[nn.Module, nn.Module] = {}
        self.asked: list[str] = []

    def look_inside(self, parent: nn.Module, path: str, part_of: str = "") -> None:
        """Look at all children. part_of: the dotted name of the adapted module that the parent is, or lies in."""
        part_of = path if isinstance(parent, Adapted) and not part_of else part_of
        for name, child in children_of(parent).items():
            child_path = f"{path}.{name}" if path else name
            if child is None:
                continue
            if child in self.made or self._make(child_path, child):
                if part_of and isinstance(self.made[child], Adapted):
                    raise ValueError(
                        f"{child_path} is a part of {part_of}, which is adapted already and cares for its parts: merge "
                        "or undo that first, or choose other modules"
                    )
                self.places.append((parent, name, child_path, child))
            else:
                self.look_inside(child, child_path, part_of)

    def _make(self, path: str, child: nn.Module) -> bool:
        if not self.chosen(path, child):
            return False
        self.asked.append(path)
        new = self.factory(path, child)
        if new is None:
            return False
        self.made[child] = new.train(child.training)
        return True


def _check_not_shared(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Raise ValueError where an adapted module would part from what shares a parameter with the old one."""
    inside = {part for old in made for part in old.modules()}
    elsewhere = {
        parameter: f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if module not in inside
        for name, parameter in module.named_parameters(recurse=False)
    }
    for old, new in made.items():
        if isinstance(new, Adapted) or _tensors_of(new):
            kept = set(new.parameters())
            for name, parameter in old.named_parameters():
                if parameter in elsewhere and parameter not in kept:
                    raise ValueError(
                        f"{name} of a chosen {type(old).__name__} is shared with {elsewhere[parameter]}, from which "
                        "the adapted module would part: choose other modules, or give one of them a copy first"
                    )


def _tensors_of(module: nn.Module) -> list[str]:
    """Return the tensors of a module that are parametrized by adapted ones alone."""
    if not parametrize.is_parametrized(module):
        return []
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    found = {name: list(parts.children()) for name, parts in lists.items()}
    return [name for name, parts in found.items() if all(isinstance(part, AdaptedTensor) for part in parts)]


def _trained(new: nn.Module) -> Iterable[nn.Parameter]:
    own = new.trained() if isinstance(new, Adapted) else new.parameters()
    return [parameter for parameter in own if parameter.requires_grad]


def _merged(change: Change) -> nn.Module:
    if not isinstance(change.new, Adapted):
        raise ValueError(
            f"{change.name} became a {type(change.new).__name__}, which has no plain form to merge into: wanted a "
            "`synchromesh.Adapted`, or undo()"
        )
    return change.new.merged()


def _learn_as(old: nn.Module, new: nn.Module) -> None:
    learns = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(learns.get(name, parameter.requires_grad))


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{' and others' if len(names) > 4 else ''}"
