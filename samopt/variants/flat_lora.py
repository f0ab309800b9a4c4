"""Flat-LoRA: perturb the whole weights under adapters, of which only the factors are trained (Li et al. 2025)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from samopt._replay.call_watch import PassFollower
from samopt._replay.module_state import every_module
from samopt._step.adapter_layers import AdapterLayer, find_layers
from samopt._step.arguments import as_group, check_models, refuse_fixed
from samopt._step.layer_ascent import LayerAscent, LayerGradients
from samopt._step.noise_pass import LayerNoise, NoisePass
from samopt._step.retirement import replace_older
from samopt._step.two_pass import TwoPass
from samopt.distributed import is_fully_sharded
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.direction import Gradient
from samopt.parts.geometry import Euclidean
from samopt.variants._options import TAKEN_ELSEWHERE, Options, all_options_shown

__all__ = ["FlatLoRA"]

_RHO = {"noise": 0.05, "gradient": 0.05}


@all_options_shown
class FlatLoRA(SharpnessAwareOptimizer):
    """Flat-LoRA: the adapters get their gradient at ``W + s B A + epsilon``, with ``W`` frozen and never written.

    SAM around an adapter's parameters perturbs the factors ``A`` and ``B``, so it sees the sharpness of a low-rank
    slice. This class perturbs the whole weight of every adapter layer. With ``perturbation="noise"``, each row ``i`` of
    ``n`` entries gets Gaussian noise in proportion to its own norm, the same for all micro-batches of a step:

        epsilon_i ~ N(0, rho^2 / n ||(W + s B A)_i||^2 I)

    With "gradient", ``epsilon = rho G / ||G||`` with ``G`` the gradient of the loss with respect to the whole weights,
    and the norm over all layers. Source: Li et al. 2025, "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape"
    (section 3.3; the paper calls ``rho`` sigma, and raises it from 0 along a cosine:
    ``RhoScheduler(optimizer, lambda step: (1 - math.cos(math.pi * min(step / steps, 1))) / 2)``).

    Layers are found when the optimizer is made: peft's LoRA layers (Linear, Embedding, Conv); modules with ``lora_A``,
    ``lora_B``, a number ``scaling`` and a frozen ``weight``, their own or that of a child ``base_layer`` or ``linear``;
    in a model without adapters, the trained weights of ``nn.Linear`` and convolutions. A row of an embedding is the
    vector of one token.

    Cost of "noise": one pass, one draw of noise for each call of a layer, and ``B A`` once a step. Memory: the noise of
    one layer in fp32 at a time, and the perturbed weights in their own dtype as long as the graph holds them, from a
    layer's forward to its backward: with gradient checkpointing those of one segment, otherwise of all layers. Cost of
    "gradient": two passes; one gradient of the size of the adapted weights is kept from the first to the end of the
    second, beside the perturbed weights that the graph holds.

    Args:
        params: An optimizer instance to wrap; or parameters, for ``base_optimizer``.
        base_optimizer: With parameters: an optimizer class, called as ``base_optimizer(params, **options)``.
        rho: Size of the perturbation, >= 0, of the group that has a layer's factors. "noise": relative to the weights
            (the paper's sigma). "gradient": the radius over all layers. None is 0.05 for both, the paper's sigma.
        perturbation: "noise", or "gradient".
        **options: ``model`` (required), ``seed``, ``stochastic_rounding``, ``sync_perturbation``, ``backend``,
            ``measure_grad_norms``, ``warn_on_stall`` as for ``SharpnessAwareOptimizer``; with parameters, also the
            arguments of ``base_optimizer``. ``seed`` is that of the noise, too.

    Raises:
        TypeError: If the arguments fit neither form.
        ValueError: If an option is out of range, there is no ``model``, it has no such layer, or a layer's whole weight
            cannot be perturbed: its base is quantised or sharded, its adapters are merged or not plain LoRA (DoRA).

    Example:
        >>> import torch, samopt
        >>> class Adapted(torch.nn.Linear):
        ...     scaling = 2.0
        ...     def __init__(self):
        ...         super().__init__(4, 3)
        ...         self.requires_grad_(False)
        ...         self.lora_A = torch.nn.Parameter(torch.randn(2, 4))
        ...         self.lora_B = torch.nn.Parameter(torch.zeros(3, 2))
        ...     def forward(self, x):
        ...         return super().forward(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T
        >>> model = Adapted()
        >>> base = torch.optim.AdamW([model.lora_A, model.lora_B], lr=1e-3)
        >>> optimizer = samopt.FlatLoRA(base, model=model, rho=0.05)
        >>> before = model.weight.clone()
        >>> model(torch.ones(5, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> torch.equal(model.weight, before)
        True
    """

    _fixed_options = ("only", "reuse_trunk", "direction", "combination", "norm")

    @overload
    def __init__(
        self,
        params: Optimizer,
        base_optimizer: None = None,
        rho: float | None = ...,
        perturbation: Literal["noise", "gradient"] = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Callable[..., Optimizer],
        rho: float | None = ...,
        perturbation: Literal["noise", "gradient"] = ...,
        **options: Any,
    ) -> None: ...

    def __init__(
        self,
        params: ParamsT | Optimizer,
        base_optimizer: Callable[..., Optimizer] | None = None,
        rho: float | None = None,
        perturbation: Literal["noise", "gradient"] = "noise",
        **options: Any,
    ) -> None:
        refuse_fixed(
            self,
            options,
            direction='use perturbation="noise" or "gradient", or samopt.SAM, which takes it',
            only="whole layers move; leave some out by giving their factors a parameter group with perturb=False",
            reuse_trunk="adapters are in the whole model; use samopt.SAM, which takes it",
            combination="use samopt.SAM, which takes it",
            norm="use samopt.SAM, which takes it",
            geometry=TAKEN_ELSEWHERE,
            radius=TAKEN_ELSEWHERE,
            eta=TAKEN_ELSEWHERE,
        )
        if perturbation not in _RHO:
            raise ValueError(f'perturbation must be "noise" or "gradient", got {perturbation!r}')
        direction = LayerNoise(options.get("seed", 0)) if perturbation == "noise" else Gradient()
        super().__init__(
            params,
            base_optimizer,
            geometry=Euclidean(),
            rho=_RHO[perturbation] if rho is None else rho,
            direction=direction,
            **options,
        )

    @property
    def perturbation(self) -> str:
        """What the whole weights are moved along: "noise" or "gradient"."""
        return "noise" if isinstance(self.direction, LayerNoise) else "gradient"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, of parameters beside the layers or of further adapters on them.

        Args:
            param_group: As for ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ValueError: If an option is out of range, or the group has factors or weights of a layer that was not there
                when this optimizer was made; nothing is added then.
        """
        if "_layers" in vars(self):
            added = as_group(param_group)
            known = {(layer.owner, layer.adapter) for layer in self._layers}
            models = check_models(self.model, self.base_optimizer, type(self).__name__)
            for layer in find_layers(models, [*self.param_groups, added], type(self).__name__):
                if (layer.owner, layer.adapter) not in known:
                    raise ValueError(
                        f"the param group has parameters of {layer.name}, but {type(self).__name__} found its layers "
                        "when it was made, and would leave this one exact; make a new optimizer over all of them"
                    )
        super().add_param_group(param_group)

    def _check_models(self, models: list[nn.Module], base: Optimizer) -> None:
        if not models:
            raise ValueError(
                "FlatLoRA perturbs the layers of a model, but model= is missing; pass the module that the training "
                "loop calls, as in samopt.FlatLoRA(base_optimizer, model=model)"
            )
        if is_fully_sharded(every_module(models)):
            raise ValueError(
                "FlatLoRA perturbs whole weights layer by layer, but fully_shard keeps a part of each on every rank; "
                "use DistributedDataParallel, or train the adapters with samopt.SAM"
            )
        find_layers(models, base.param_groups, type(self).__name__)

    def _set_up_passes(self, models: list[nn.Module]) -> None:
        self._layers = layers = find_layers(models, self.base_optimizer.param_groups, type(self).__name__)
        if isinstance(self.direction, LayerNoise):
            self._passes = NoisePass(self._ascent, models, layers, measure_grad_norms=self.measure_grad_norms)
        else:
            self._set_up_two_passes(models, layers)
        weakref.finalize(self, self._passes.detach)

    def _set_up_two_passes(self, models: list[nn.Module], layers: Sequence[AdapterLayer]) -> None:
        """Make the passes along the gradient of whole weights."""
        gradients, followers = None, list[PassFollower]()
        self._stop_following: Callable[[], None] = lambda: None
        if layers[0].adapter is not None:
            gradients = LayerGradients(self._ascent, models, layers)
            self._stop_following = gradients.shifted.follow(models)
            weakref.finalize(self, self._stop_following)
            followers.append(gradients)
        replace_older(self._ascent.parameters())
        self._passes = TwoPass(
            LayerAscent(self._ascent, layers, gradients),
            models,
            sync_perturbation=self.sync_perturbation,
            measure_grad_norms=self.measure_grad_norms,
            followers=followers,
        )

    def detach(self) -> None:
        """Follow the model's calls no longer; further steps raise where the perturbation is not 0."""
        super().detach()
        if self.perturbation == "gradient":
            self._stop_following()

    def _own_state(self) -> dict[str, Any]:
        own = super()._own_state()
        return own | {"noise": self.direction.stream.position} if isinstance(self.direction, LayerNoise) else own

    def _load_own_state(self, own: dict[str, Any] | None) -> None:
        super()._load_own_state(own)
        if isinstance(self.direction, LayerNoise):
            self.direction.stream.position = int((own or {}).get("noise", 0))
