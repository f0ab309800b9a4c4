"""Frozen weights replaced, layer by layer, while an adapter layer runs: no weight moves, and none is kept twice.

The weights under adapters are the large part of a model, so they are not replaced all at once, as
``ShiftedParameters`` does it. Each layer's other weight is made when the layer is called. When the call is over, only
the graph holds it. Where checkpointing repeats the call, it is made again. Compiled code finds its parameters in the
registry of its modules, so there all weights are replaced together for the time of the outermost call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import full_precision
from samopt._replay.call_watch import RAISED, CallWatcher, followed, watch
from samopt._replay.module_state import every_module
from samopt._replay.unobserved import is_unobserved, outside_transforms
from samopt._step.adapter_layers import AdapterLayer
from samopt._step.shifted_parameters import OtherWeights, reads_registry

__all__ = ["ShiftedLayers"]


class ShiftedLayers(OtherWeights):
    """Gives adapter layers another frozen weight while they run inside an outermost call that asks for it.

    Args:
        layers: The layers.
        is_wanted: Given the outermost module, returns whether its layers get other weights in this call.
        weight_for: Makes the weight of a layer, with gradients off; None leaves its own.
    """

    def __init__(
        self,
        layers: Sequence[AdapterLayer],
        is_wanted: Callable[[nn.Module], bool],
        weight_for: Callable[[AdapterLayer], Tensor | None],
    ) -> None:
        self._layers = layers
        self._is_wanted = is_wanted
        self._weight_for = weight_for
        self._is_on = False
        self._together: list[_Replacement] = []

    def follow(self, models: Sequence[nn.Module]) -> Callable[[], None]:
        """Follow the calls of models and of the layers in them.

        Args:
            models: The models.

        Returns:
            A function that ends this.
        """
        stops = [watch(models, self)]
        seen = set(followed(models))
        for layer in self._layers:
            if layer.adapter in seen:
                stops.append(watch([layer.adapter], _LayerCall(self, layer), only_these=True))

        def stop_all() -> None:
            for stop in stops:
                stop()

        return stop_all

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note whether the layers of an outermost call get other weights.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        self._is_on = not (self.exact_depth or is_unobserved()) and self._is_wanted(module)
        if not self._is_on:
            return
        inside = every_module([module])
        if any(map(reads_registry, inside)):
            self._is_on = False  # for the layers' own calls
            for layer in self._layers:
                if layer.adapter in inside and (tensor := self._made_for(layer)) is not None:
                    self._together.append(_Replacement(layer, tensor))
                    self._together[-1].put(layer.owner._parameters)

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Put the weights of the registry back.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.
        """
        self._is_on = False
        replaced, self._together = self._together, []
        for each in replaced:
            each.take_back()
        if output is not RAISED:
            _refuse_writes(replaced)

    def weight_of(self, layer: AdapterLayer) -> Tensor | None:
        """Return the weight that a layer's own call runs at; None where it is its own.

        Args:
            layer: The layer that is called.
        """
        return self._made_for(layer) if self._is_on else None

    def _made_for(self, layer: AdapterLayer) -> Tensor | None:
        if not layer.is_on() or not layer.has_own_weight():
            return None
        with outside_transforms(), torch.no_grad(), full_precision(layer.weight.device.type):
            tensor = self._weight_for(layer)
        if tensor is not None:
            marked: Any = tensor
            marked._is_param = True  # some forwards ask isinstance(w, nn.Parameter)
        return tensor


class _LayerCall(CallWatcher):
    """Replaces the weight of one layer during its call."""

    def __init__(self, shifted: ShiftedLayers, layer: AdapterLayer) -> None:
        self._shifted = shifted
        self._layer = layer
        self._replacement: _Replacement | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = self._shifted.weight_of(self._layer)
        if tensor is not None:
            self._replacement = _Replacement(self._layer, tensor)
            self._replacement.put(vars(self._layer.owner))  # Python looks there before it asks the registry

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        replacement, self._replacement = self._replacement, None
        if replacement is not None:
            replacement.take_back()
            if output is not RAISED:
                _refuse_writes([replacement])


class _Replacement:
    """A tensor in the place of a layer's weight."""

    def __init__(self, layer: AdapterLayer, tensor: Tensor) -> None:
        self.layer = layer
        self._tensor = tensor
        self._version = tensor._version

    @property
    def was_written(self) -> bool:
        """Whether the forward wrote into memory that is not the weight's own."""
        is_own = self._tensor.data_ptr() == self.layer.weight.data_ptr()
        return self._tensor._version != self._version and not is_own

    def put(self, names: Any) -> None:
        """Bind the name of the weight to the tensor, among the attributes or in the registry."""
        names["weight"] = self._tensor

    def take_back(self) -> None:
        """Let the name stand for the weight again."""
        owner = self.layer.owner
        if vars(owner).get("weight") is self._tensor:
            del vars(owner)["weight"]
        elif owner._parameters.get("weight") is self._tensor:
            owner._parameters["weight"] = self.layer.weight


def _refuse_writes(replaced: Iterable[_Replacement]) -> None:
    """Raise if a forward wrote into a weight that was replaced.

    Raises:
        RuntimeError: If it did.
    """
    for each in replaced:
        if each.was_written:
            raise RuntimeError(
                f"a training forward wrote into the frozen weight of {each.layer.name}, which is replaced by one at w "
                "+ epsilon while the layer runs, so the write would be lost (Embedding(max_norm=...) and norm "
                "constraints inside forward do this). Apply the constraint to the weight between two steps"
            )
