"""A copy of parameters, kept where and in the precision that the user can afford."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from samopt._numerics.devices import to_device
from samopt._numerics.low_precision import is_low_precision
from samopt._numerics.stochastic_rounding import RoundingNoise

__all__ = ["HeldParameters", "trainable"]

_DTYPES = (None, torch.float32, torch.bfloat16)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, detached, by name.

    Args:
        model: Any module.
    """
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class HeldParameters:
    """Copies of parameters by name.

    Args:
        device: Where to keep them; None is where each parameter is. On "cpu", for parameters on an accelerator, the
            memory is pinned, and copies do not wait.
        dtype: ``torch.float32`` or ``torch.bfloat16`` for real floating-point parameters; None is each one's own.

    Raises:
        ValueError: If ``dtype`` is another one.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        if dtype not in _DTYPES:
            raise ValueError(
                f"a reference can be kept in torch.float32 or torch.bfloat16, got dtype={dtype}; leave it out to keep "
                "each parameter's own"
            )
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}

    def take_missing(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy the parameters that are not held yet.

        Args:
            parameters: By name.
        """
        for name, parameter in parameters.items():
            if name not in self.tensors:
                held = self._empty_like(parameter)
                held.copy_(parameter, non_blocking=True)
                self.tensors[name] = held

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Copy every parameter, held already or not.

        Args:
            parameters: By name.
        """
        known = [name for name in parameters if name in self.tensors]
        if known:
            held, current = [self.tensors[name] for name in known], [parameters[name] for name in known]
            torch._foreach_copy_(held, current, non_blocking=True)
        self.take_missing(parameters)

    def blend(self, parameters: Mapping[str, Tensor], share: float, noise: RoundingNoise) -> None:
        """Move what is held towards the parameters by ``share`` of the way; copy those not held yet.

        Args:
            parameters: By name.
            share: In (0, 1].
            noise: Rounds what is held in bf16 stochastically, since a small share of the way rounds to nothing.
        """
        uniform = noise.next()
        for name, parameter in parameters.items():
            if (held := self.tensors.get(name)) is None:
                continue
            if held.device == parameter.device and not is_low_precision(held):
                held.lerp_(parameter.to(held.dtype), share)
                continue
            wide = torch.promote_types(held.dtype, torch.float32)
            start = to_device(held, parameter.device, wide)
            mixed = torch.lerp(start, parameter.to(wide), share)
            if held.dtype is torch.bfloat16:
                mixed = _round_to_bf16(mixed, uniform(mixed))
            held.copy_(mixed, non_blocking=True)
        self.take_missing(parameters)

    def for_use(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is held on the device and in the dtype of the parameters; a transient copy where these differ.

        Args:
            parameters: By name; only those held are returned.
        """
        return {
            name: to_device(held, parameters[name].device, parameters[name].dtype)
            for name, held in self.tensors.items()
            if name in parameters
        }

    def saved(self) -> dict[str, Tensor]:
        """Return the tensors by name, once copies under way have arrived."""
        if any(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in self.tensors.values()):
            torch.cuda.synchronize()
        return dict(self.tensors)

    def load(self, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Replace what is held by a copy of ``saved``.

        Args:
            saved: What ``saved`` returned, on any device.
            parameters: The model's parameters by name, whose shapes it must have.

        Raises:
            ValueError: If a name is not among the parameters, or a shape differs.
        """
        for name, tensor in saved.items():
            found = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such parameter"
            if name not in parameters or parameters[name].shape != tensor.shape:
                raise ValueError(
                    f"the saved trust-region reference has {name!r} with shape {tuple(tensor.shape)}, but the model "
                    f"has {found}; load the state of a run of the same model, or delete state_dict['samopt']"
                    "['trust_region'] to start from the current weights"
                )
        fresh = {name: self._empty_like(parameters[name]) for name in saved}
        for name, tensor in saved.items():
            fresh[name].copy_(tensor)
        self.tensors = fresh

    def _empty_like(self, parameter: Tensor) -> Tensor:
        device = parameter.device if self.device is None else self.device
        own_dtype = self.dtype is None or not parameter.is_floating_point()
        dtype = parameter.dtype if own_dtype else self.dtype
        pinned = device.type == "cpu" and parameter.device.type == "cuda"
        if device == parameter.device:
            return torch.empty_like(parameter, dtype=dtype)
        return torch.empty_like(parameter, dtype=dtype, device=device, pin_memory=pinned)


def _round_to_bf16(values: Tensor, uniform: Tensor) -> Tensor:
    """Round fp32 ``values`` up or down to bf16, with the probability that keeps the mean."""
    bits = values.contiguous().view(torch.int32) + (uniform * 65536).to(torch.int32)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16).view_as(values)
