"""An optimizer that shares its base's parameter groups and state instead of keeping copies."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["GroupOptions", "OptimizerWrapper", "with_step_hooks"]

_CARRIED = "samopt_"  # begins the names of counters in saved groups, and of the marks in groups
_FILLED = "samopt_filled_"  # begins the names of marks: the value of an option that a wrapper wrote into that group
_NOTHING = object()
_P = ParamSpec("_P")
_R = TypeVar("_R")
_W = TypeVar("_W", bound="OptimizerWrapper")


class GroupOptions:
    """A wrapper's own options in the parameter groups of its base.

    A base that already uses a name (``torch.optim.Adadelta`` has a ``rho``) keeps it; the option is then called
    ``sam_<name>`` in the groups.

    Args:
        base: The base optimizer.
        defaults: The options, with the values that the constructor was given.
        check: Called with a name, a value and a text that says where; raises where the value is out of range.
    """

    def __init__(self, base: Optimizer, defaults: dict[str, Any], check: Callable[[str, Any, str], None]) -> None:
        self.base = base
        self.defaults = defaults
        self.keys = {name: f"sam_{name}" if name in base.defaults else name for name in defaults}
        self._check = check
        self._take = operator.itemgetter(*self.keys.values())
        self._checked: list[tuple[Any, ...]] = []

    def get(self, group: dict[str, Any], name: str) -> Any:
        """Return an option of a group, its default where the group has none.

        Args:
            group: A parameter group.
            name: The option.
        """
        return group.get(self.keys[name], self.defaults[name])

    def rows(self) -> list[tuple[Any, ...]]:
        """Return the options of every group, in the order of ``defaults``."""
        groups = self.base.param_groups
        try:
            return list(map(self._take, groups))
        except KeyError:  # a group that was put there without this wrapper
            return [tuple(self.get(group, name) for name in self.defaults) for group in groups]

    def checked_rows(self) -> list[tuple[Any, ...]]:
        """Return what ``rows`` does.

        Raises:
            ValueError: If an option is out of range.
        """
        rows, checked = self.rows(), self._checked
        # A step looks at every option. Those that are the very objects of the last step need no second check.
        if len(rows) != len(checked) or not all(map(operator.is_, chain(*rows), chain(*checked))):
            self.check(self.base.param_groups)
            self._checked = [] if any(isinstance(value, Tensor) for row in rows for value in row) else rows
        return rows

    def check(self, groups: Iterable[dict[str, Any]], first: int = 0) -> None:
        """Raise if an option of a group is out of range.

        Args:
            groups: Parameter groups.
            first: Index of the first one, for the message.
        """
        for index, group in enumerate(groups, first):
            for name, key in self.keys.items():
                self._check(key, group.get(key, self.defaults[name]), f" in param group {index}")

    def refuse_rho(self, groups: Iterable[dict[str, Any]], first: int = 0) -> None:
        """Raise if a group has a ``rho`` in place of the number that the radius is made from: nothing would read it.

        Args:
            groups: Parameter groups, with what their user wrote.
            first: Index of the first one, for the message.

        Raises:
            ValueError: If one has.
        """
        if "rho" in self.keys or "rho" in self.base.defaults:
            return
        numbers = [key for key in self.keys.values() if key not in ("eta", "perturb")]
        for index, group in enumerate(groups, first):
            if "rho" in group and not any(key in group for key in numbers):
                other = " or ".join(map(repr, numbers))
                raise ValueError(
                    f"param group {index} has rho={group['rho']!r}, which this optimizer does not read: its radius is "
                    f"made from {other}; write that into the group instead"
                )

    def take_over(self) -> None:
        """Check every group, then write the constructor's values where the user wrote none into a group.

        What another wrapper or a checkpoint left in a group is not the user's. A mark in the group tells so, also in
        copies of the base, in its own checkpoints, and after a schedule has changed the value.
        """
        own = []
        for group in self.base.param_groups:
            keys = () if _counters_in(group) else dict.fromkeys([*self.keys.values(), "rho"])  # or from a checkpoint
            own.append({key: group[key] for key in keys if key in group and not _is_filled(group, key)})
        self.refuse_rho(own)
        self.check(own)
        for group, values in zip(self.base.param_groups, own, strict=True):
            for key in _counters_in(group):
                del group[key]
            for name, key in self.keys.items():
                if key in values:
                    group.pop(_FILLED + key, None)
                else:
                    _fill(group, key, self.defaults[name])

    def fill(self) -> None:
        """Write the defaults into groups that have none."""
        for group in self.base.param_groups:
            for name, key in self.keys.items():
                if key not in group:
                    _fill(group, key, self.defaults[name])

    def assign(self, group: dict[str, Any], name: str, value: Any) -> None:
        """Set an option of a group; where it is a wrapper's, it stays one.

        Args:
            group: A parameter group.
            name: Of the option, as the constructor calls it.
            value: What it is from now on.
        """
        key = self.keys[name]
        if key in group and not _is_filled(group, key):
            group[key] = value
        else:
            _fill(group, key, value)

    def fill_from_checkpoint(self) -> None:
        """Note that the present options came from a checkpoint, and not from the user."""
        for group in self.base.param_groups:
            for key in self.keys.values():
                _fill(group, key, group[key])


class OptimizerWrapper(Optimizer):
    """A ``torch.optim.Optimizer`` around another one.

    ``param_groups``, ``state`` and ``defaults`` *are* the base's, whatever replaces them there; attributes unknown here
    are looked up on the base. Nothing of the wrapper is written into ``state``.

    Args:
        options: The base, and the wrapper's own options in its groups.
    """

    base_optimizer: Optimizer

    def __init__(self, options: GroupOptions) -> None:
        super().__init__([torch.empty(0)], {})
        self.base_optimizer = options.base
        self._options = options

    # Optimizer.__init__ assigns these three; before there is a base, the assignments have nowhere to go.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        self._before_groups_are_read()
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if "base_optimizer" in self.__dict__:
            self.base_optimizer.defaults = value

    def __getattr__(self, name: str) -> Any:
        # A fused base announces that it unscales gradients itself; through the wrapper that would not be true.
        if name == "_step_supports_amp_scaling" or "base_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.base_optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "base_optimizer": self.base_optimizer,
            "_options": self._options,
        }

    def option_key(self, name: str) -> str:
        """Return the key under which the option ``name`` ("rho", say) stands in each parameter group.

        Args:
            name: The option.
        """
        return self._options.keys[name]

    def option(self, group: dict[str, Any], name: str) -> Any:
        """Return the value of an option for a parameter group, its default where the group has none.

        Args:
            group: One of ``param_groups``.
            name: The option.
        """
        return self._options.get(group, name)

    def set_option(self, group: dict[str, Any], name: str, value: Any) -> None:
        """Set an option of a parameter group, as a schedule does.

        Unlike a value that you write into the group, it is not kept where another optimizer is made of this base later.

        Args:
            group: One of ``param_groups``.
            name: The option ("rho", say).
            value: The value, which is checked in the next step.
        """
        self._options.assign(group, name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; it may have its own ``rho``, ``eta`` or ``perturb``.

        Args:
            param_group: As for ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: If one of its options is out of range; nothing is added then.
        """
        if "base_optimizer" in self.__dict__:
            self._options.refuse_rho([param_group], len(self.base_optimizer.param_groups))
            self._options.check([param_group], len(self.base_optimizer.param_groups))
            self.base_optimizer.add_param_group(param_group)
            self._options.fill()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients through the base optimizer.

        Args:
            set_to_none: As for ``torch.optim.Optimizer.zero_grad``.
        """
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict with a "samopt" entry of a few counters.

        A plain base optimizer loads it as it is. The saved groups hold the counters too, because
        ``torch.distributed.checkpoint`` keeps groups and state alone.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        own = self._own_state()
        if _has_groups(state_dict):
            counters = {_CARRIED + name: value for name, value in own.items() if isinstance(value, int)}
            state_dict["param_groups"] = [group | counters for group in state_dict["param_groups"]]
        state_dict["samopt"] = own
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replacement = post_hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper, or of a plain base optimizer.

        Options that the saved groups do not have keep their present values. A load that fails changes nothing.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replacement = pre_hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        carried: dict[str, Any] = {}
        if _has_groups(state_dict):
            carried, state_dict["param_groups"] = _split(state_dict["param_groups"])
        own = state_dict.pop("samopt", None) or carried or None
        base = self.base_optimizer
        present = [
            {key: self.option(group, name) for name, key in self._options.keys.items()} for group in base.param_groups
        ]
        undo = self._remember_state()
        try:
            base.load_state_dict(state_dict)
            for group, options in zip(base.param_groups, present, strict=True):
                for key, value in options.items():
                    group.setdefault(key, value)
            self._options.check(base.param_groups)
            self._options.fill_from_checkpoint()
            self._load_own_state(own)
        except BaseException:
            undo()
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _remember_state(self) -> Callable[[], None]:
        """Return a function that puts back the base's groups and state as they are now."""
        base = self.base_optimizer
        attributes = dict(vars(base))  # torch's load_state_dict assigns new ones; those of wrapping bases are inside
        groups = [(group, dict(group)) for group in base.param_groups]
        states = [(state, dict(state)) for state in base.state.values() if isinstance(state, dict)]

        def undo() -> None:
            for name in vars(base).keys() - attributes.keys():
                del vars(base)[name]
            vars(base).update(attributes)
            for mapping, content in (*groups, *states):
                mapping.clear()
                mapping.update(content)

        return undo

    def _before_groups_are_read(self) -> None:
        """Note that the parameter groups are about to be read."""

    def _own_state(self) -> dict[str, Any]:
        """Return the wrapper's own state."""
        return {}

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        """Load what ``_own_state`` returned; None where the state dict came from a plain base optimizer."""


def _has_groups(state_dict: dict[str, Any]) -> bool:
    """Return whether a state dict has torch's layout; bases that wrap others may have one of their own."""
    groups = state_dict.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, dict) for group in groups)


def _counters_in(group: dict[str, Any]) -> list[str]:
    """Return the names of the counters that a group from a checkpoint carries."""
    return [key for key in group if key.startswith(_CARRIED) and not key.startswith(_FILLED)]


def _fill(group: dict[str, Any], key: str, value: Any) -> None:
    """Write a wrapper's option into a group, with the mark that it is one."""
    group[key] = group[_FILLED + key] = value


def _is_filled(group: dict[str, Any], key: str) -> bool:
    """Return whether an option of a group is a wrapper's: its mark is there, and the user has not changed the value."""
    value, mark = group[key], group.get(_FILLED + key, _NOTHING)
    if isinstance(value, Tensor) or isinstance(mark, Tensor):
        return mark is value
    return bool(mark == value)


def _split(groups: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Separate the counters that saved groups carry from the groups."""
    carried: dict[str, Any] = {}
    plain = []
    for group in groups:
        carried |= {key.removeprefix(_CARRIED): group[key] for key in _counters_in(group)}
        plain.append({key: value for key, value in group.items() if not key.startswith(_CARRIED)})
    return carried, plain


def with_step_hooks(step: Callable[Concatenate[_W, _P], _R]) -> Callable[Concatenate[_W, _P], _R]:
    """Make ``step`` run the wrapper's own step hooks, and keep torch from adding the global ones.

    Global hooks run once, in the base optimizer's step; ``torch.optim.Optimizer`` would run them here a second time.

    Args:
        step: A wrapper's ``step`` method.

    Returns:
        The method with its hooks.
    """

    @functools.wraps(step)
    def run(self: _W, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        call_args: tuple[Any, ...] = (self, *args)
        call_kwargs: dict[str, Any] = kwargs
        for pre_hook in self._optimizer_step_pre_hooks.values():
            changed = pre_hook(self, call_args, call_kwargs)
            if changed is not None:
                if not isinstance(changed, tuple) or len(changed) != 2:
                    raise RuntimeError(f"a step pre-hook must return None or a tuple (args, kwargs), got {changed!r}")
                call_args, call_kwargs = changed
        result = step(*call_args, **call_kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, call_args, call_kwargs)
        return result

    run.hooked = True  # type: ignore[attr-defined]  # the mark torch looks for
    return run
