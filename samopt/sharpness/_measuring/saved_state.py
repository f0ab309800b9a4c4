"""What a measured model holds besides its weights, put back after every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from samopt._replay.module_state import ModuleState, every_module

__all__ = ["SavedState"]


class SavedState:
    """Buffers, attributes and unmoved parameters of some modules, as they are now.

    A forward may write into a buffer, keep a hidden state in an attribute, or count its calls, in evaluation mode too.
    An evaluation that began with what the last one left would not measure the same function.

    Parameters are dear to copy, and few forwards write into them. So those that do not move are copied only where a
    module is in training mode; the others are watched.

    Args:
        modules: The model, and the loss if it is a module.
        moving: The parameters that are moved, which who moves them puts back.
    """

    def __init__(self, modules: Sequence[nn.Module], moving: Iterable[nn.Parameter]) -> None:
        every = every_module(modules)
        moved = set(map(id, moving))
        names = {id(p): name for module in modules for name, p in module.named_parameters()}
        parameters = {id(p): p for module in every for p in module._parameters.values() if p is not None}
        copied = any(module.training for module in every)
        self._watched = [(p, names.get(key, "")) for key, p in parameters.items() if not copied or key in moved]
        self._state = ModuleState(modules)
        self._state.save(moving=[p for p, _ in self._watched])
        self._versions: list[int] = []

    def restore(self) -> None:
        """Put everything back, as often as called, and note the parameters as they are now."""
        self._state.rewind()
        self._versions = [parameter._version for parameter, _ in self._watched]

    def check_parameters(self) -> None:
        """Refuse an evaluation since ``restore`` that wrote into a parameter which is not put back.

        Raises:
            ValueError: If there was one.
        """
        for (parameter, name), version in zip(self._watched, self._versions, strict=True):
            if parameter._version != version:
                raise ValueError(
                    f"the forward wrote into the parameter {name!r}, so the loss is no function of the weights, and "
                    "the parameter holds what the forward wrote; make such state a buffer (register_buffer), and "
                    "measure an Embedding with max_norm through a copy of the model without it"
                )
