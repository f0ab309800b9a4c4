"""An optimizer that shares its base's parameter groups and state instead of keeping copies."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["OptimizerWrapper", "with_step_hooks"]

_CARRIED = "samopt_"  # begins the names of counters in saved groups
_P = ParamSpec("_P")
_R = TypeVar("_R")
_W = TypeVar("_W", bound="OptimizerWrapper")


class OptimizerWrapper(Optimizer):
    """A ``torch.optim.Optimizer`` around another one.

    ``param_groups``, ``state`` and ``defaults`` *are* the base's, whatever replaces them there; attributes unknown here
    are looked up on the base. Nothing of the wrapper is written into ``state``.

    Args:
        base_optimizer: The optimizer to wrap.
        options: The wrapper's own per-group options with their defaults. A base that already uses a name
            (``torch.optim.Adadelta`` has a ``rho``) keeps it; the option is then called ``sam_<name>`` in the groups.
    """

    base_optimizer: Optimizer

    def __init__(self, base_optimizer: Optimizer, options: dict[str, Any]) -> None:
        super().__init__([torch.empty(0)], {})
        self.base_optimizer = base_optimizer
        self._options = options
        self._option_keys = {name: f"sam_{name}" if name in base_optimizer.defaults else name for name in options}
        for index, group in enumerate(base_optimizer.param_groups):
            self._check_group(group, index)
        self._fill_options()

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
            "_option_keys": self._option_keys,
        }

    def option_key(self, name: str) -> str:
        """Return the key under which the option ``name`` ("rho", say) stands in each parameter group.

        Args:
            name: The option.
        """
        return self._option_keys[name]

    def option(self, group: dict[str, Any], name: str) -> Any:
        """Return the value of an option for a parameter group, its default where the group has none.

        Args:
            group: One of ``param_groups``.
            name: The option.
        """
        return group.get(self._option_keys[name], self._options[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, its own ``rho``, ``eta`` or ``perturb`` included.

        Args:
            param_group: As for ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: If one of its options is out of range; nothing is added then.
        """
        if "base_optimizer" in self.__dict__:
            self._check_group(param_group, len(self.param_groups))
            self.base_optimizer.add_param_group(param_group)
            self._fill_options()

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
        own = state_dict["samopt"] = self._own_state()
        counters = {_CARRIED + name: value for name, value in own.items() if isinstance(value, int)}
        state_dict["param_groups"] = [group | counters for group in state_dict["param_groups"]]
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replacement = post_hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this wrapper, or of a plain base optimizer.

        Options that the saved groups do not have keep their present values.

        Args:
            state_dict: What ``state_dict`` returned.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replacement = pre_hook(self, state_dict)
            if replacement is not None:
                state_dict = replacement
        carried, state_dict["param_groups"] = _split(state_dict["param_groups"])
        own = state_dict.pop("samopt", None) or carried or None
        present = [
            {key: self.option(group, name) for name, key in self._option_keys.items()} for group in self.param_groups
        ]
        self.base_optimizer.load_state_dict(state_dict)
        for group, options in zip(self.param_groups, present, strict=True):
            for key, value in options.items():
                group.setdefault(key, value)
        self._load_own_state(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _before_groups_are_read(self) -> None:
        """Note who reads the parameter groups."""

    def _check_group(self, group: dict[str, Any], index: int) -> None:
        """Raise if a parameter group's own options are out of range; called before the group is changed or added."""

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        """Take over what ``_own_state`` returned; None where the state dict came from a plain base optimizer."""

    def _fill_options(self) -> None:
        for group in self.param_groups:
            for name, key in self._option_keys.items():
                group.setdefault(key, self._options[name])


def _split(groups: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Separate the counters that saved groups carry from the groups."""
    carried: dict[str, Any] = {}
    plain = []
    for group in groups:
        carried |= {key.removeprefix(_CARRIED): value for key, value in group.items() if key.startswith(_CARRIED)}
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
