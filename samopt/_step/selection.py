"""The parameters that ``only=`` chooses."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeAlias

from torch import Tensor, nn

from samopt._step.base_wrapper import GroupOptions
from samopt._step.named_parameters import NamedParameter, find_head, is_bias, is_norm, named_parameters

__all__ = ["Only", "Selection", "check_only"]

Only: TypeAlias = str | Callable[[str, Tensor], bool]

_SHOWN = 8  # names in a message
_USAGE = 'use "norm", "bias", "head", a regular expression, or a function (name, parameter) -> bool'


class Selection:
    """Tells which of a base optimizer's parameters may move.

    The choice is made once for each parameter, and again for all when the base has one that is new: added, or put in
    the place of another one as sharding does.

    Args:
        only: "norm", "bias", "head", a regular expression, or a function of name and parameter.
        models: The modules of ``model=``, which give the names.
        options: The base's parameter groups.
    """

    def __init__(self, only: Only, models: Sequence[nn.Module], options: GroupOptions) -> None:
        check_only(only)
        self.only = only
        self._models = models
        self._options = options
        self._chosen: dict[int, tuple[weakref.ref[Tensor], bool]] = {}  # by id: Tensor.__hash__ is a call of Python

    def __getstate__(self) -> dict[str, Any]:
        # The parameters of a copy are others, so it makes the choice again.
        return vars(self) | {"_chosen": {}}

    def is_chosen(self, parameter: Tensor) -> bool:
        """Return whether a parameter of the base may move.

        Args:
            parameter: The parameter.

        Raises:
            ValueError: If it is new and has no name, or nothing is chosen any more.
        """
        found = self._chosen.get(id(parameter))
        if found is None or found[0]() is not parameter:  # an id may be that of a parameter that is gone
            self._choose(self._options.base.param_groups)
            found = self._chosen.get(id(parameter))
        return found is not None and found[1]

    def check(self, added: dict[str, Any] | None = None) -> None:
        """Raise if nothing would move, or a parameter has no name.

        Args:
            added: A parameter group that is about to be added; None to look at those that there are.

        Raises:
            ValueError: If a parameter has no name, the choice is none of the base's parameters, or all that are chosen
                are frozen or in groups with ``perturb=False``.
            TypeError: If the function returns something else than a bool.
        """
        groups = self._options.base.param_groups
        self._choose(groups if added is None else [*groups, added])
        if added is not None:
            return
        chosen = [(p, group) for group in groups for p in group["params"] if self._chosen.get(id(p), (None, False))[1]]
        frozen = sum(not parameter.requires_grad for parameter, _ in chosen)
        if not any(parameter.requires_grad and self._options.get(group, "perturb") for parameter, group in chosen):
            raise ValueError(
                f"only={self.only!r} chooses {len(chosen)} parameters, but none of them can move: {frozen} are frozen "
                "(requires_grad=False), the others are in groups with perturb=False; choose others, or unfreeze these "
                "before the optimizer is made"
            )

    def _choose(self, groups: Iterable[dict[str, Any]]) -> None:
        """Make the choice for every parameter of some groups."""
        named: dict[int, list[NamedParameter]] = {}
        for entry in named_parameters(self._models):
            named.setdefault(id(entry.parameter), []).append(entry)
        needs_modules = self.only in ("norm", "head")
        if needs_modules and not self._models:
            raise ValueError(f"only={self.only!r} looks for modules; give model= the model that is trained")
        known, nameless = [], []
        for group in groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for parameter, name in zip(group["params"], names, strict=True):
                if id(parameter) not in named and name is not None and not needs_modules:
                    named[id(parameter)] = [NamedParameter(name, parameter, None)]
                if id(parameter) in named:
                    known.append(parameter)
                elif self._options.get(group, "perturb"):
                    nameless.append(parameter)
        if nameless:
            self._refuse_nameless(nameless)
        rule = self._rule()
        chosen = {}
        for parameter in known:
            chosen[id(parameter)] = (weakref.ref(parameter), any([rule(entry) for entry in named[id(parameter)]]))
        if not any(is_chosen for _, is_chosen in chosen.values()):
            self._refuse_nothing([named[id(parameter)][0].name for parameter in known])
        self._chosen = chosen

    def _rule(self) -> Callable[[NamedParameter], bool]:
        """Return the choice as a function."""
        only = self.only
        if callable(only):
            return self._asked
        if only == "norm":
            return lambda entry: entry.owner is not None and is_norm(entry.owner)
        if only == "bias":
            return lambda entry: is_bias(entry.name)
        if only == "head":
            head = set(map(id, find_head(self._models).parameters()))
            return lambda entry: id(entry.parameter) in head
        pattern = re.compile(only)
        return lambda entry: pattern.search(entry.name) is not None

    def _asked(self, entry: NamedParameter) -> bool:
        """Return what the user's function says."""
        assert callable(self.only)
        answer = self.only(entry.name, entry.parameter)
        if not isinstance(answer, bool):
            raise TypeError(
                f"the function only= must return True or False, got {type(answer).__name__} for {entry.name}; write "
                "bool(...) around what it returns"
            )
        return answer

    def _refuse_nameless(self, nameless: list[Tensor]) -> None:
        """Raise, because there are parameters without a name."""
        shape = tuple(nameless[0].shape)
        if not self._models:
            raise ValueError(
                f"only={self.only!r} chooses by name, and {len(nameless)} parameters have none, one of shape {shape}; "
                "give model=, or build the base optimizer from model.named_parameters() (torch 2.6 and later)"
            )
        kinds = ", ".join(type(model).__name__ for model in self._models)
        raise ValueError(
            f"only={self.only!r} chooses by name, but {len(nameless)} parameters of the base optimizer, one of shape "
            f"{shape}, are not among those of model={kinds}; give model= a list with every module that has parameters, "
            "or put them into a group with perturb=False"
        )

    def _refuse_nothing(self, names: list[str]) -> None:
        """Raise, because nothing is chosen."""
        shown = ", ".join(islice(names, _SHOWN)) + (", ..." if len(names) > _SHOWN else "")
        if self.only == "norm":
            meaning = "no normalisation layer (a class with BatchNorm, LayerNorm, GroupNorm or the like in its name)"
        elif isinstance(self.only, str) and self.only not in ("bias", "head"):
            meaning = "no name in which this regular expression is found"
        else:
            meaning = "nothing that it chooses"
        raise ValueError(
            f"only={self.only!r} chooses none of the {len(names)} parameters of the base optimizer: there is {meaning} "
            f"among {shown}; {_USAGE}"
        )


def check_only(only: object) -> None:
    """Raise unless something can be a choice of parameters, as far as it can be told without a model.

    Args:
        only: What a user gave.

    Raises:
        TypeError: If it is neither text nor a function.
        ValueError: If it is an invalid regular expression, or empty.
    """
    if not isinstance(only, str):
        if not callable(only) or isinstance(only, type | nn.Module):
            raise TypeError(f"only must be text or a function, got {only!r}; {_USAGE}")
        return
    if not only:
        raise ValueError("only='' is found in every name; leave it out to perturb all parameters")
    try:
        re.compile(only)
    except re.error as error:
        raise ValueError(f"only={only!r} is no valid regular expression: {error}; {_USAGE}") from error
