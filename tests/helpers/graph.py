"""A CUDA graph's rules on the CPU: a step's device work is recorded, and runs again without the host's."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.interpreter import InterpretedFunction

__all__ = ["Graph"]

_WAITS = ("_local_scalar_dense.", "nonzero.", "is_nonzero.", "equal.")


class Graph(TorchDispatchMode):
    """Records torch's operations and Triton's launches inside its context; ``replay`` runs them in the same memory.

    As in a graph that a GPU has captured, what the host computed is fixed: numbers, addresses, what it decided. What
    would wait for the device raises. Tensors made inside stay alive, each in memory of its own.

    Attributes:
        launches: Names of the kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self._work = []
        self._kept = []

    def __enter__(self):
        interpret = InterpretedFunction.run

        def run(kernel, *arguments, **options):
            self.launches.append(kernel.fn.__name__)
            self._work.append(lambda: interpret(kernel, *arguments, **options))
            with torch.utils._python_dispatch._disable_current_modes():
                interpret(kernel, *arguments, **options)

        # The tensors stand for those of a device that captures: reading one on the host would wait for it.
        self._patches = [
            patch.object(InterpretedFunction, "run", run),
            patch("samopt._step.shifted_parameters.is_capturing", lambda device: True),
            patch("samopt.parts.checks._is_on_host", lambda value: False),
        ]
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        for each in self._patches:
            each.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(_WAITS):
            raise RuntimeError(f"{func.__name__} waits for the device")
        args, kwargs = tree_map_only(Tensor, _memory, (args, kwargs or {}))
        made = func(*args, **kwargs)
        outputs = tree_map_only(Tensor, _memory, tree_leaves(made))
        self._kept.append(outputs)  # kernels find memory by its address alone
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given for out in outputs]
        if func._schema.is_mutable or (any(fresh) and given and "empty" not in func.__name__):
            self._work.append(lambda: _again(func, args, kwargs, outputs, fresh))
        return made

    def replay(self) -> None:
        """Run what was recorded."""
        with torch.no_grad():
            for work in self._work:
                work()


def _memory(tensor: Tensor) -> Tensor:
    """Return the same memory under a name that autograd knows nothing of."""
    return tensor.data


def _again(func, args, kwargs, outputs, fresh) -> None:
    """Run an operation again, and leave what it makes where it was made the first time."""
    for was, now, is_fresh in zip(outputs, tree_leaves(func(*args, **kwargs)), fresh, strict=True):
        if is_fresh:
            was.copy_(now)
