"""Parameters replaced by tensors at ``w + epsilon`` while a module runs: no weight moves.

While a module of the model runs in training, the attribute of every parameter that moves (``self.weight``) is a tensor
made from it. The graph holds these tensors, so the backward pass is that of ``w + epsilon``, whenever it comes. Their
gradient is the parameter's own. The weights themselves are exact at every moment: ``parameters()`` and ``state_dict()``
give them also inside a forward, except inside a compiled one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from samopt._replay.call_watch import CallWatcher, is_compiled
from samopt._replay.module_state import every_module, sample
from samopt._replay.unobserved import is_observed

__all__ = ["ShiftedParameters"]

_CHECKS = 4  # first steps in which some values are compared after each forward
_CHECK_EVERY = 64  # of the steps after these, one in so many


class _AtShiftedValues(torch.autograd.Function):
    """A tensor with other values in the place of a parameter: its gradient is the parameter's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(parameter: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


class ShiftedParameters(CallWatcher):
    """Replaces parameters while the outermost call of a module runs in training, with gradients on.

    A call in evaluation mode, without gradients, inside ``hold_exact`` or inside a transform of ``torch.func`` finds
    the exact weights. So does a parameter that was replaced by another tensor before, as ``functional_call`` does.

    Args:
        displaced: Makes the values at ``w + epsilon``, by parameter; empty while there is no direction.
    """

    def __init__(self, displaced: Callable[[], dict[Tensor, Tensor]]) -> None:
        self._displaced = displaced
        self._shifted: dict[Tensor, Tensor] | None = None
        self._values: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._samples: dict[Tensor, Tensor] = {}
        self._replaced: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._flat: list[tuple[nn.RNNBase, Any, Any]] = []
        self._entered: set[int] = set()
        self._uses_registry = False
        self._count = 0
        self.exact_depth = 0
        """How many contexts hold the weights exact."""

    @property
    def has_run(self) -> bool:
        """Whether a training call has asked for the shifted values since the last step."""
        return self._shifted is not None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Replace the parameters under a module.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            RuntimeError: If the call belongs to a backward pass whose own forward ran at the exact weights.
        """
        if not (module.training and torch.is_grad_enabled() and is_observed()) or self.exact_depth:
            return
        if self._shifted is None:
            self._shift()
        assert self._shifted is not None
        if not self._shifted:
            return
        if torch._C._current_graph_task_id() != -1 and id(module) not in self._entered:
            raise RuntimeError(
                f"a training forward of {type(module).__name__} began inside a backward pass, but its own forward ran "
                "without gradients, at the exact weights, so loss and gradient would be of different weights. "
                "torch.utils.checkpoint(..., use_reentrant=True) around the whole module does this; use "
                "use_reentrant=False, or checkpoint parts of the module"
            )
        shifted = self._shifted
        owners = every_module([module])
        # Compiled code reads the registry of parameters; Python looks into the module's own attributes first.
        self._uses_registry = any(map(is_compiled, owners))
        for owner in owners:
            self._entered.add(id(owner))
            names: Any = owner._parameters if self._uses_registry else vars(owner)
            for name, parameter in owner._parameters.items():
                if parameter is not None and (tensor := shifted.get(parameter)) is not None:
                    self._replaced.append((owner, name, parameter, tensor))
                    names[name] = tensor
            if isinstance(owner, nn.RNNBase):  # it keeps a list of its parameters, which it makes anew in the call
                self._flat.append((owner, owner._flat_weights, owner._flat_weight_refs))

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Put the parameters back.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; None where it raised.

        Raises:
            RuntimeError: If the forward wrote into its own weights.
        """
        written = self._written() if output is not None and self._replaced else None
        for owner, name, parameter, tensor in self._replaced:
            if vars(owner).get(name) is tensor:
                del vars(owner)[name]
            elif owner._parameters.get(name) is tensor:
                owner._parameters[name] = parameter  # type: ignore[assignment]  # it is the module's own
        for rnn, weights, references in self._flat:
            rnn._flat_weights, rnn._flat_weight_refs = weights, references
        self._replaced, self._flat = [], []
        if written is not None:
            raise RuntimeError(
                f"a training forward of {type(module).__name__} wrote into its own weight {written}, which is replaced "
                "by one at w + epsilon while the module runs, so the write would be lost (Embedding(max_norm=...) and "
                "norm constraints inside forward do this). Apply the constraint to the weights after optimizer.step(), "
                'or use two passes (direction="gradient")'
            )

    def forget(self) -> None:
        """Drop the shifted tensors: the weights, or the direction, are about to change."""
        self._shifted = None
        self._entered = set()

    def _shift(self) -> None:
        """Make the shifted tensors, which serve every forward until the step."""
        with torch.no_grad():
            self._values = self._displaced()
        self._shifted = {}
        for parameter, values in self._values.items():
            tensor = _AtShiftedValues.apply(parameter, values)  # type: ignore[no-untyped-call]  # torch has no types
            tensor._is_param = True  # isinstance(tensor, nn.Parameter) is asked by some forwards
            self._shifted[parameter] = tensor
        self._versions = {parameter: tensor._version for parameter, tensor in self._shifted.items()}
        self._count += 1
        is_due = self._count <= _CHECKS or self._count % _CHECK_EVERY == 0
        self._samples = {parameter: sample(values) for parameter, values in self._values.items()} if is_due else {}

    def _written(self) -> str | None:
        """Return the name of a replaced parameter that the forward wrote into, or None."""
        for owner, name, parameter, tensor in self._replaced:
            if tensor._version != self._versions[parameter] or not _shares_memory(tensor, self._values[parameter]):
                return f"{type(owner).__name__}.{name}"
            # A write through .data leaves no trace but the values. They are compared in some steps only: it costs.
            before = self._samples.get(parameter)
            if before is not None and not torch.equal(before, sample(self._values[parameter])):
                return f"{type(owner).__name__}.{name}"
        return None


def _shares_memory(tensor: Tensor, values: Tensor) -> bool:
    """Return whether a tensor still has the memory that it was given."""
    if type(tensor) is not Tensor:
        return True
    return tensor.data_ptr() == values.data_ptr() and tensor.shape == values.shape
