"""Parameters replaced by tensors at ``w + epsilon`` while a module runs: no weight moves.

While a module of the model runs in training, the attribute of every parameter that moves (``self.weight``) is a tensor
made from it. The graph holds these tensors, so the backward pass is that of ``w + epsilon``, whenever it comes. Their
gradient is the parameter's own. The weights themselves are exact at every moment: ``parameters()`` and ``state_dict()``
give them also inside a forward, except inside a compiled one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from samopt._callers.cached_weights import clear_cached_parametrizations
from samopt._callers.cuda_graphs import is_capturing
from samopt._perturb.gradients import any_nonzero
from samopt._replay.call_watch import RAISED, CallWatcher, is_compiled, watch
from samopt._replay.module_state import every_module, sample
from samopt._replay.unobserved import is_unobserved, outside_transforms

__all__ = ["OtherWeights", "ShiftedParameters", "in_place_of", "reads_registry"]

_CHECKS = 4  # first steps in which some values are compared after each forward
_CHECK_EVERY = 64  # of the steps after these, one in so many
_BY_WRITES = (RuntimeError, TypeError, ValueError)  # what a forward that assigns a replaced parameter may raise

_PLAIN = {nn.Parameter, Tensor}
_VERSION, _IS_TRAINABLE = attrgetter("_version"), attrgetter("requires_grad")

_Marks: TypeAlias = tuple[list[int], list[int]]


class _AtShiftedValues(torch.autograd.Function):
    """A tensor with other values in the place of a parameter: its gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, values: Tensor) -> Tensor:  # four times as fast as with setup_context
        ctx.set_materialize_grads(False)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, None]:
        return gradients[0], None


class OtherWeights(CallWatcher):
    """Gives modules other weights than their own while they run.

    Attributes:
        exact_depth: How many contexts hold the weights exact.
    """

    exact_depth = 0

    def follow(self, models: Sequence[nn.Module]) -> Callable[[], None]:
        """Follow the calls of models.

        Args:
            models: The models.

        Returns:
            A function that ends this.
        """
        return watch(models, self)

    def gradients_cleared(self) -> None:
        """Note that another forward begins a step, before which weights may have been written."""

    def unreached(self) -> list[Tensor]:
        """Return the parameters with a gradient that is known to be of the exact weights."""
        return []

    def forget(self) -> None:
        """Drop what was made for this step: the weights, or the direction, are about to change."""


class ShiftedParameters(OtherWeights):
    """Replaces parameters while the outermost call of a module runs in training, with gradients on.

    A call in evaluation mode, without gradients, or inside ``hold_exact`` finds the exact weights. A parameter that was
    replaced by another tensor before, as ``functional_call`` does, is left alone.

    Args:
        displaced: Makes the values at ``w + epsilon``, by parameter; empty while there is no direction. Those that
            autograd has not linked to their parameter yet are linked here. Its argument says whether they need memory
            of their own, because a graph may hold the last ones.
        parameters: Returns every parameter that may move.
    """

    steps_aside = True

    def __init__(
        self, displaced: Callable[[bool], dict[Tensor, Tensor]], parameters: Callable[[], Sequence[Tensor]]
    ) -> None:
        self._displaced = displaced
        self._parameters = parameters
        self._was_trained: list[bool] = []  # requires_grad of each, when the tensors were made
        self._shifted: dict[int, Tensor] | None = None  # by id: Tensor.__hash__ is a call of Python
        self._shifted_marks: _Marks = ([], [])
        self._weights: list[Tensor] = []
        self._weight_marks: _Marks = ([], [])
        self._is_stale = False
        self._samples: dict[int, Tensor] = {}
        self._replaced: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = {}
        self._flat: list[tuple[nn.RNNBase, Any, Any]] = []
        self._entered: set[int] = set()
        self._uses_registry = False
        self._count = 0
        self._reached: set[int] = set()  # ids of parameters whose shifted tensor got a gradient
        self._follows_gradients = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Replace the parameters under a module.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            RuntimeError: If the call belongs to a backward pass whose own forward ran at the exact weights.
        """
        if not (module.training and torch.is_grad_enabled()) or self.exact_depth or is_unobserved():
            return
        is_in_backward = torch._C._current_graph_task_id() != -1
        if self._shifted is None:
            self._shift()
        elif not is_in_backward and (
            self._is_stale
            or _marks(self._weights) != self._weight_marks
            or self._was_trained != list(map(_IS_TRAINABLE, self._parameters()))
        ):
            self._shift(beside=True)
        assert self._shifted is not None
        if not self._shifted:
            return
        if is_in_backward and id(module) not in self._entered:
            raise RuntimeError(
                f"a training forward of {type(module).__name__} began inside a backward pass, but its own forward ran "
                "without gradients, at the exact weights, so loss and gradient would be of different weights. "
                "torch.utils.checkpoint(..., use_reentrant=True) around the whole module does this; use "
                "use_reentrant=False, or checkpoint parts of the module"
            )
        shifted = self._shifted
        owners = every_module([module])
        # Compiled code and replicas read the registry of parameters; Python looks into the module's attributes first.
        self._uses_registry = any(map(reads_registry, owners))
        for owner in owners:
            self._entered.add(id(owner))
            if owner._parameters:
                names: Any = owner._parameters if self._uses_registry else vars(owner)
                places: list[tuple[str, Tensor, Tensor]] = []
                for name, parameter in owner._parameters.items():
                    if parameter is not None and (tensor := shifted.get(id(parameter))) is not None:
                        places.append((name, parameter, tensor))
                        self._replaced[owner] = places
                        names[name] = tensor
            if isinstance(owner, nn.RNNBase):  # it keeps a list of its parameters, which it makes anew in the call
                self._flat.append((owner, owner._flat_weights, owner._flat_weight_refs))
        clear_cached_parametrizations()  # made of the exact weights

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Put the parameters back.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.

        Raises:
            RuntimeError: If the forward wrote into its own weights.
        """
        written = None
        if self._replaced and (output is not RAISED or isinstance(sys.exc_info()[1], _BY_WRITES)):
            written = self._written()
        for owner, places in self._replaced.items():
            attributes, registry = vars(owner), owner._parameters
            for name, parameter, tensor in places:
                if attributes.get(name) is tensor:
                    del attributes[name]
                elif registry.get(name) is tensor:
                    registry[name] = parameter  # type: ignore[assignment]  # it is the module's own
        for rnn, weights, references in self._flat:
            rnn._flat_weights, rnn._flat_weight_refs = weights, references
        if self._replaced:
            clear_cached_parametrizations()
        self._replaced, self._flat = {}, []
        if written is not None:
            raise RuntimeError(
                f"a training forward of {type(module).__name__} wrote into its own weight {written}, which is replaced "
                "by one at w + epsilon while the module runs, so the write would be lost (Embedding(max_norm=...) and "
                "norm constraints inside forward do this). Apply the constraint to the weights after optimizer.step(), "
                'or use two passes (direction="gradient")'
            )

    def step_aside(self, module: nn.Module) -> Callable[[], None] | None:
        """Uncover parameters that ``functional_call``, inside a forward, has put in the place of a module's own.

        Args:
            module: What is called.
        """
        if self._uses_registry or not self._is_covered(module):
            return None
        aside = []
        for owner in every_module([module]):
            for name, parameter, tensor in self._replaced.get(owner, ()):
                if owner._parameters.get(name) is not parameter and vars(owner).get(name) is tensor:
                    del vars(owner)[name]
                    aside.append((vars(owner), name, tensor))
        return functools.partial(_cover, aside)

    def gradients_cleared(self) -> None:
        """Note that another forward begins a step, before which weights may have been written."""
        self._is_stale = True

    def unreached(self) -> list[Tensor]:
        """Return the parameters with a gradient that did not come through their shifted tensor: it is of other weights.

        Only the steps in which writes are looked for tell; in others there is nothing to return.
        """
        if not self._follows_gradients or not self._shifted:
            return []
        others = [p for p in self._weights if p.grad is not None and id(p) not in self._reached]
        return [p for p in others if not is_capturing(p.device) and any_nonzero([{"params": [p]}])]

    def forget(self) -> None:
        """Drop the shifted tensors: the weights, or the direction, are about to change."""
        self._reached = set()  # not cleared: graphs that are still there hold the last one
        self._follows_gradients = False
        self._shifted = None
        self._weights = []
        self._entered = set()

    def _shift(self, *, beside: bool = False) -> None:
        """Make the shifted tensors, which serve every forward until the step.

        Args:
            beside: Keep the values of the last ones, which were made in this step.
        """
        with outside_transforms():  # they outlive a transform of torch.func
            with torch.no_grad():
                found = self._displaced(beside)
            self._weights, self._shifted = [], {}
            for parameter, values in found.items():
                tensor: Any = values if values.requires_grad else in_place_of(parameter, values)
                tensor._is_param = True  # isinstance(tensor, nn.Parameter) is asked by some forwards
                self._weights.append(parameter)
                self._shifted[id(parameter)] = tensor
        self._shifted_marks = _marks(self._shifted.values())
        self._weight_marks = _marks(self._weights)
        self._was_trained = list(map(_IS_TRAINABLE, self._parameters()))
        self._is_stale = False
        self._count += 1
        is_due = self._count <= _CHECKS or self._count % _CHECK_EVERY == 0
        self._samples = {key: sample(tensor) for key, tensor in self._shifted.items()} if is_due else {}
        self._follows_gradients = is_due and (self._follows_gradients or not beside)
        if self._follows_gradients:
            for key, tensor in self._shifted.items():
                note = functools.partial(_note_gradient, self._reached, key, tensor.output_nr)
                tensor.grad_fn.register_prehook(note)  # of the node: compiled code looks at the hooks of tensors

    def _written(self) -> str | None:
        """Return the name of a replaced parameter that the forward wrote into, or None."""
        assert self._shifted is not None
        if not self._samples and _marks(self._shifted.values()) == self._shifted_marks:
            return None
        marks = dict(zip(self._shifted, zip(*self._shifted_marks, strict=True), strict=True))
        for owner, places in self._replaced.items():
            for name, parameter, tensor in places:
                # A write through .data leaves no trace but the values. They are compared in some steps only: it costs.
                before = self._samples.get(id(parameter))
                is_read = before is not None and not is_capturing(tensor.device)
                is_changed = is_read and not torch.equal(cast(Tensor, before), sample(tensor))
                if is_changed or (tensor._version, _address(tensor)) != marks[id(parameter)]:
                    return f"{type(owner).__name__}.{name}"
        return None

    def _is_covered(self, module: nn.Module) -> bool:
        """Return whether a replacement hides a parameter that was given to a module, or to one right in it."""
        for owner in (module, *module._modules.values()) if module._modules else (module,):
            if owner in self._replaced:
                registry = owner._parameters
                for name, parameter, _ in self._replaced[owner]:
                    if registry.get(name) is not parameter:
                        return True
        return False


def in_place_of(parameter: Tensor, values: Tensor) -> Tensor:
    """Return a tensor with other values whose gradient is a parameter's.

    Args:
        parameter: A parameter that requires a gradient.
        values: Of its shape and dtype.
    """
    tensor: Tensor = _AtShiftedValues.apply(parameter, values)  # type: ignore[no-untyped-call]  # torch has no types
    return tensor


def _note_gradient(reached: set[int], key: int, output: int, gradients: tuple[Tensor | None, ...]) -> None:
    """Note that a gradient came to a shifted tensor."""
    if gradients[output] is not None:
        reached.add(key)


def _cover(places: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    """Put replacements back that were taken away for a call."""
    for attributes, name, tensor in places:
        attributes[name] = tensor


def _marks(tensors: Collection[Tensor]) -> _Marks:
    """Return what changes when one of some tensors is written into, or gets other memory."""
    is_plain = _PLAIN.issuperset(map(type, tensors))  # as in most models; map over C functions costs little
    return list(map(_VERSION, tensors)), list(map(Tensor.data_ptr if is_plain else _address, tensors))


def _address(tensor: Tensor) -> int:
    """Return the address of a plain tensor; 0 for others."""
    return tensor.data_ptr() if type(tensor) in _PLAIN else 0


def reads_registry(module: nn.Module) -> bool:
    """Return whether a module finds the parameters in it by its registry: compiled code does, and DataParallel.

    Args:
        module: Any module.
    """
    return is_compiled(module) or isinstance(module, nn.DataParallel)
