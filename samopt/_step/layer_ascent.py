"""Two passes along the gradient of whole weights, ``dL / d(W + scaling B A)``, of which only the factors are trained.

In the first pass each adapter layer runs on a leaf tensor that shares the memory of its frozen weight, so autograd
leaves the gradient of the whole weight there; the weight's own ``grad`` and ``requires_grad`` are never touched. In
the second pass it runs on ``W + epsilon`` in memory of its own. So there is nothing to put back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.devices import to_device
from samopt._numerics.stochastic_rounding import Noise
from samopt._numerics.vector_norm import vector_norm
from samopt._perturb.gradients import StashedGradients, any_nonzero
from samopt._perturb.grouping import moving_blocks
from samopt._perturb.perturbation import Perturbation
from samopt._perturb.scratch_pool import ScratchPool
from samopt._perturb.targets import Region, Targets
from samopt._perturb.weight_backup import WeightBackup
from samopt._replay.call_watch import PassFollower
from samopt._step.adapter_layers import AdapterLayer
from samopt._step.ascent import Ascent
from samopt._step.layer_groups import groups_of_layers
from samopt._step.shifted_layers import ShiftedLayers
from samopt.distributed import data_parallel_modules, runs_on_several_ranks
from samopt.kernels import StepSize
from samopt.parts.geometry import Geometry

__all__ = ["LayerAscent", "LayerGradients"]


class LayerGradients(PassFollower):
    """Takes the gradients of whole weights in the first pass, and has their layers run elsewhere in the second.

    Args:
        ascent: The optimizer's parts and groups.
        models: The modules that the passes run.
        layers: The adapter layers in them.

    Attributes:
        is_shared: Whether ranks share the gradients: no backward of theirs exchanges those of frozen weights.
        replaying: Whether the second pass is running.
        elsewhere: Makes the weight of a layer at ``W + epsilon``; None while nothing is perturbed.
        shifted: What gives the layers their weights.
    """

    def __init__(self, ascent: Ascent, models: Sequence[nn.Module], layers: Sequence[AdapterLayer]) -> None:
        self.is_shared = False
        self.replaying = False
        self.elsewhere: Callable[[AdapterLayer], Tensor | None] | None = None
        self.shifted = ShiftedLayers(layers, self._is_wanted, self._weight_for)
        self._ascent = ascent
        self._models = models
        self._layers = layers
        self._leaves: dict[AdapterLayer, Tensor] = {}
        self._groups: dict[AdapterLayer, dict[str, Any]] | None = None

    def gradients_cleared(self) -> None:
        """Drop the gradients of whole weights, unless the second pass clears those of the factors."""
        if not self.replaying:
            self.clear()

    def clear(self) -> None:
        """Drop what was taken, ready for the next first pass."""
        self.replaying = False
        self._leaves = {}
        self._groups = None

    def take(self, groups: dict[AdapterLayer, dict[str, Any]]) -> dict[AdapterLayer, Tensor]:
        """Return the gradient of each layer that ran in the first pass, averaged over ranks where they share it.

        Args:
            groups: The layers that move.
        """
        found = {layer: leaf.grad for layer, leaf in self._leaves.items() if layer in groups and leaf.grad is not None}
        if self.is_shared and runs_on_several_ranks():
            replicas = data_parallel_modules(self._models)
            ranks = replicas[0].process_group if replicas else None  # a framework's DDP is around the models: all ranks
            for layer in groups:  # every rank joins in for every layer, whether it ran there or not
                gradient = found.setdefault(layer, torch.zeros_like(layer.weight))
                if gradient.layout is not torch.strided:
                    gradient = found[layer] = gradient.to_dense()
                torch.distributed.all_reduce(gradient, group=ranks)
                gradient.div_(torch.distributed.get_world_size(ranks))
        return {layer: found[layer] for layer in groups if layer in found}

    def _is_wanted(self, module: nn.Module) -> bool:
        """Return whether the layers in a call run on other tensors than their weights."""
        if self.replaying:
            return self.elsewhere is not None
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not self._ascent.may_move():
            return False
        # model.zero_grad() knows nothing of the leaves. Where the factors' gradients are gone, theirs are stale.
        has_gradients = any(leaf.grad is not None for leaf in self._leaves.values())
        if (
            has_gradients
            and torch._C._current_graph_task_id() == -1
            and not any_nonzero(self._ascent.base.param_groups)
        ):
            self.clear()
        return True

    def _weight_for(self, layer: AdapterLayer) -> Tensor | None:
        if self.replaying:
            return None if self.elsewhere is None else self.elsewhere(layer)
        if self._groups is None:
            self._groups = groups_of_layers(self._ascent, self._layers)
        if layer not in self._groups:
            return None
        leaf = self._leaves.get(layer)
        weight = layer.weight
        if leaf is None or (leaf.data_ptr(), leaf.dtype, leaf.device) != (
            weight.data_ptr(),
            weight.dtype,
            weight.device,
        ):
            leaf = self._leaves[layer] = weight.detach().requires_grad_()
        return leaf


class LayerAscent(Ascent):
    """The same parts over the same groups, where whole weights move instead of the trained parameters.

    Args:
        ascent: The optimizer's own.
        layers: The layers that move.
        gradients: What takes their gradients; None where the weights are trained themselves.
    """

    def __init__(self, ascent: Ascent, layers: Sequence[AdapterLayer], gradients: LayerGradients | None) -> None:
        super().__init__(
            ascent.options,
            selection=None,
            direction=ascent.direction,
            geometry=ascent.geometry,
            radius=ascent.radius,
            combination=None,
            linf=ascent.linf,
            rounding=ascent.rounding,
            backend=ascent.backend,
        )
        self._all = ascent
        self._layers = layers
        self._gradients = gradients
        self._moving: list[AdapterLayer] = []

    def is_on(self) -> bool:
        """Return what the optimizer's own says, which a trainer pauses."""
        return self._all.is_on()

    def share_gradients(self) -> None:
        """Have ranks average the gradients of whole weights."""
        if self._gradients is not None:
            self._gradients.is_shared = True

    def targets_from_gradients(self, frozen_since: Collection[int] = ()) -> tuple[StashedGradients, list[Targets]]:
        """Return every trainable parameter with its gradient, and the whole weights with theirs.

        Args:
            frozen_since: Must be empty.

        Raises:
            ValueError: If a group's option is out of range.
            RuntimeError: If there are gradients, but none of a whole weight; if parameters were frozen since.
        """
        if frozen_since:
            raise RuntimeError(
                f"FlatLoRA perturbs layers that are trainable when the second pass begins, but the closure froze "
                f"{len(frozen_since)} parameters after its backward; freeze them after optimizer.step() instead"
            )
        stashed, _ = super().targets_from_gradients()
        groups = groups_of_layers(self, self._layers)
        if self._gradients is None:
            found = {layer: layer.weight.grad for layer in groups if layer.weight.grad is not None}
        else:
            found = self._gradients.take(groups)
        if groups and not found and any_nonzero(self.base.param_groups):
            raise RuntimeError(
                "the first pass left gradients, but none of a whole weight, so there is no direction to perturb along: "
                f"no call of {next(iter(groups)).name}, or of another adapter layer, was seen in it. Pass the module "
                "that your loop calls (the torch.compile'd or DDP one) as model="
            )
        self._moving = list(found)
        targets = []
        for layer, gradient in found.items():
            group = groups[layer]
            radius = self.radius.at(self.options.get(group, self.radius.option))
            region = Region(radius, self.options.get(group, "eta"), -1 if group.get("maximize", False) else 1)
            targets.append(Targets(region, [layer.weight], [gradient]))
        return stashed, targets

    def perturbation(self, targets: list[Targets]) -> Perturbation:
        """Return the perturbation of whole weights.

        Args:
            targets: What ``targets_from_gradients`` returned.
        """
        if self._gradients is None:
            return super().perturbation(targets)
        by_layer = dict(zip(self._moving, targets, strict=True))
        return _LayerPerturbation(
            by_layer, self._gradients, self.geometry, linf=self.linf, backend=self.backend, noise_of=self._noise_of
        )

    def _noise_of(self, layer: AdapterLayer) -> Noise | None:
        """Return the numbers that the weight of a layer is rounded with, from their beginning."""
        return None if self.rounding is None else self.rounding.source().on_stream(self._layers.index(layer))


class _LayerPerturbation(Perturbation):
    """An ascent in which layers run at ``W + epsilon``, and no weight is written."""

    def __init__(
        self,
        by_layer: dict[AdapterLayer, Targets],
        gradients: LayerGradients,
        geometry: Geometry,
        *,
        linf: bool,
        backend: str,
        noise_of: Callable[[AdapterLayer], Noise | None],
    ) -> None:
        super().__init__(by_layer.values(), geometry, linf=linf, backend=backend)
        self._by_layer = by_layer
        self._gradients = gradients
        self._geometry = geometry
        self._is_linf = linf
        self._backend = backend
        self._noise_of = noise_of
        self._moves: dict[AdapterLayer, Tensor] = {}

    def backup(self, memory: ScratchPool) -> WeightBackup:
        """Return what has the layers run on their own weights again."""
        self._total = self.norm.new_zeros(())
        return _Return(self)

    def move(self, noise: Noise | None = None, backup: WeightBackup | None = None) -> Tensor:
        """Have the layers run at ``W + epsilon``.

        Returns:
            The norm of the move: 0-dim, filled when the layers run on their own weights again.
        """
        self._gradients.elsewhere = self._weight_of
        return self._total

    def end(self) -> None:
        """Have the layers run on their own weights again; may be called more than once."""
        self._gradients.elsewhere = None
        if self._moves:
            lengths = [to_device(length, self._total.device, self._total.dtype) for length in self._moves.values()]
            stacked = torch.stack(lengths)
            self._total.copy_(stacked.amax() if self._is_linf else vector_norm(stacked))

    def _weight_of(self, layer: AdapterLayer) -> Tensor | None:
        """Return ``W + epsilon`` of a layer; None where it does not move."""
        target = self._by_layer.get(layer)
        if target is None:
            return None
        (some,) = moving_blocks([target], self._geometry, linf=self._is_linf, backend=self._backend)
        step = StepSize(self.norm, target.region.radius_at(self.norm), target.region.sign, self._is_linf)
        length = some.backend.norm(some.block)
        values = torch.empty_like(layer.weight)
        applied = some.backend.ascend(some.block, step, length, self._noise_of(layer), into=[values])
        self._moves.setdefault(layer, step.asked(length) if applied is None else applied)
        return values


class _Return(WeightBackup):
    """Ends a perturbation that has written no weight."""

    def __init__(self, perturbation: _LayerPerturbation) -> None:
        super().__init__(())
        self._perturbation = perturbation

    def restore(self) -> None:
        """Have the layers run on their own weights again."""
        self._perturbation.end()
