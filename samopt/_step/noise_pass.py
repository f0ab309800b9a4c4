"""One pass at ``W + scaling B A + epsilon`` with Gaussian ``epsilon`` in every layer (Flat-LoRA)."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samopt import kernels
from samopt._numerics.devices import to_device
from samopt._numerics.stochastic_rounding import Noise, RoundingNoise
from samopt._numerics.vector_norm import vector_norm
from samopt._replay.module_state import every_module
from samopt._step.adapter_layers import AdapterLayer
from samopt._step.ascent import Ascent
from samopt._step.layer_groups import groups_of_layers
from samopt._step.one_pass import OnePass
from samopt._step.pass_handle import PassHandle
from samopt._step.shifted_layers import ShiftedLayers
from samopt._step.shifted_parameters import OtherWeights
from samopt.kernels import Block, StepSize
from samopt.parts.direction import KnownDirection
from samopt.step_metrics import StepMetrics

__all__ = ["LayerNoise", "NoisePass"]


class LayerNoise(KnownDirection):
    """Gaussian noise for each layer, the same on every rank and in every repetition of a forward within a step.

    The numbers of a layer depend on the seed, the number of steps and the layer's place among the layers alone. No
    global random stream is read or moved.

    Args:
        seed: Seed of the noise.

    Attributes:
        stream: Its numbers; ``stream.position`` counts the steps.
    """

    def __init__(self, seed: int) -> None:
        self.stream = RoundingNoise(seed)

    def directions(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return None for each parameter: layers move as a whole, and their factors do not.

        Args:
            parameters: Parameters of one group.
            group: That parameter group.
            base: The base optimizer.
        """
        return [None] * len(parameters)

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Go on to the noise of the next step.

        Args:
            parameters: Every parameter.
        """
        self.stream.advance()

    def of_layer(self, index: int) -> Noise:
        """Return the numbers of one layer in this step, from their beginning.

        Args:
            index: The place of the layer among the layers.
        """
        return self.stream.source().on_stream(index)


class NoisePass(OnePass):
    """Where an optimizer is between two steps whose layers run with noise on their whole weights.

    The standard deviation of a row is ``rho ||row|| / sqrt(entries of the row)``, with the row of ``W + scaling B A``.
    It is measured once a step. The noise itself is drawn again wherever a forward is repeated, so it is not kept.

    Args:
        ascent: The optimizer's parts and groups; its direction is a ``LayerNoise``.
        models: The modules whose calls to follow.
        layers: The layers in them.
        measure_grad_norms: Whether to measure the gradient norm.
    """

    def __init__(
        self, ascent: Ascent, models: Sequence[nn.Module], layers: Sequence[AdapterLayer], *, measure_grad_norms: bool
    ) -> None:
        self._noise = cast(LayerNoise, ascent.direction)
        self._layers = {layer: index for index, layer in enumerate(layers)}
        self._groups: dict[AdapterLayer, dict[str, Any]] | None = None
        self._deviations: dict[AdapterLayer, tuple[Any, Tensor]] = {}
        self._moves: dict[AdapterLayer, tuple[Tensor, Tensor]] = {}
        self._entered: set[int] = set()
        super().__init__(ascent, models, sync_perturbation=True, measure_grad_norms=measure_grad_norms)

    def gradients_cleared(self) -> None:
        """Note that another forward begins a step, before which weights may have been written."""
        super().gradients_cleared()
        self._forget()

    def reset(self) -> None:
        """Be ready for the next step's noise."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        self._groups = None
        self._deviations = {}
        self._moves = {}
        self._entered = set()

    def _make_shifted(self) -> OtherWeights:
        if any(layer.adapter is not None for layer in self._layers):
            return ShiftedLayers(list(self._layers), self._is_wanted, self._noisy)
        return super()._make_shifted()

    def _displaced(self, beside: bool) -> dict[Tensor, Tensor]:
        """Return the noisy values of plain weights, which are trained themselves."""
        found = {layer.weight: self._noisy(layer) for layer in self._layers}
        return {weight: values for weight, values in found.items() if values is not None}

    def _is_wanted(self, module: nn.Module) -> bool:
        """Return whether a call trains the model, so that its layers are noisy.

        Raises:
            RuntimeError: If the call belongs to a backward pass whose own forward ran at the exact weights.
        """
        if not (module.training and torch.is_grad_enabled() and self._ascent.may_move()):
            return False
        is_known = id(module) in self._entered
        if torch._C._current_graph_task_id() == -1:
            if not is_known:
                self._entered.update(map(id, every_module([module])))
        elif not is_known:
            raise RuntimeError(
                f"a training forward of {type(module).__name__} began inside a backward pass, but its own forward ran "
                "without gradients, at the exact weights, so loss and gradient would be of different weights. "
                "torch.utils.checkpoint(..., use_reentrant=True) around the whole module does this; use "
                "use_reentrant=False, or checkpoint parts of the module"
            )
        return True

    def _noisy(self, layer: AdapterLayer) -> Tensor | None:
        """Return the weight of a layer with this step's noise; None where the layer does not move."""
        if self._groups is None:
            self._groups = groups_of_layers(self._ascent, self._layers)
        group = self._groups.get(layer)
        if group is None:
            return None
        deviation = self._deviation(layer, self._ascent.options.get(group, "rho"))
        source = self._noise.of_layer(self._layers[layer])
        epsilon = source.normal(layer.weight).mul_(deviation)
        weight, values = layer.weight.detach(), torch.empty_like(layer.weight)
        block = Block([weight], [epsilon], None, 0.0, False)
        one = torch.ones((), dtype=deviation.dtype, device=weight.device)
        length = one if layer in self._moves else vector_norm(epsilon)
        rounding = source if self._ascent.rounding is not None else None
        backend = kernels.select(block, self._ascent.backend)
        applied = backend.ascend(block, StepSize(one, 1.0, 1, False), length, rounding, into=[values])
        if layer not in self._moves:
            asked = vector_norm(deviation) * math.sqrt(layer.row_size())
            self._moves[layer] = (asked, length if applied is None else applied)
        self._has_ascended = True
        return values

    def _deviation(self, layer: AdapterLayer, rho: float | Tensor) -> Tensor:
        """Return the standard deviation of the noise in each row, measured when a step first needs it."""
        marks = [(tensor.data_ptr(), tensor._version) for tensor in (layer.weight, *layer.trained())]
        known = self._deviations.get(layer)
        # Within a backward pass the forward is repeated as it was, whatever was written since.
        if known is None or (known[0] != marks and torch._C._current_graph_task_id() == -1):
            norms = layer.row_norms()
            if isinstance(rho, Tensor):
                rho = to_device(rho, norms.device, norms.dtype)
            known = self._deviations[layer] = marks, norms * (rho / math.sqrt(layer.row_size()))
        return known[1]

    def _steps(self) -> Generator[Any, Any, None]:
        """Wait for the block: the layers that run in it are noisy by themselves."""
        if self._stop_watching is None:
            raise RuntimeError(
                "perturbed() was called after detach(), so the layers' calls are no longer followed and would run "
                "without noise; make a new optimizer"
            )
        handle = PassHandle(True)
        yield handle
        if handle.loss is not None:
            self._loss = handle.loss
        for _ in range(4):
            yield 0

    def _can_move(self) -> bool:
        return bool(groups_of_layers(self._ascent, self._layers))

    def _measure(self) -> None:
        asked = [move[0] for move in self._moves.values()]
        applied = [move[1] for move in self._moves.values()]
        self._moved = StepMetrics(radius=_joint(asked), applied_radius=_joint(applied))
        super()._measure()


def _joint(lengths: Sequence[Tensor]) -> Tensor:
    """Return the norm of a vector from the norms of its parts."""
    if not lengths:
        return torch.zeros(())
    return vector_norm(torch.stack([to_device(length, lengths[0].device) for length in lengths]))
