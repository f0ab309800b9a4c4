"""Trust regions between the model and an earlier version of itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import is_low_precision
from samopt._numerics.stochastic_rounding import RoundingNoise
from samopt.trust_region.adapter import adapter_parameters, without_adapters
from samopt.trust_region.call import ForwardCall
from samopt.trust_region.held import HeldParameters, trainable

__all__ = ["EMA", "ParameterReference", "Pretrained", "PreviousStep"]

_SAME = 1e-6  # relative difference of two sums over one set of weights that the order of summation explains


class ParameterReference:
    """What the trust regions in parameter space share: a held copy of the trainable parameters.

    Frozen parameters are the model's own at all times, so they are not copied. Buffers are the model's own, too.

    Args:
        device: Where to keep the copy; None is where each parameter is. "cpu" spares accelerator memory and costs one
            transfer each way per step.
        dtype: ``torch.float32`` or ``torch.bfloat16``; None is each parameter's own. A reference in a lower precision
            than the parameters is never exactly equal to them, so the distance has a floor.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        self._held = HeldParameters(device, dtype)
        self._model: nn.Module | None = None

    def bind(self, model: nn.Module) -> None:
        """Meet the model.

        Args:
            model: The module whose trainable parameters to follow.

        Raises:
            ValueError: If this trust region serves another optimizer already, or the parameters are sharded by FSDP.
        """
        if self._model is not None:
            raise ValueError(
                f"this {type(self).__name__} already serves an optimizer, whose reference it holds; make one for each"
            )
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in _bases(model)):
            raise ValueError(
                f"{type(self).__name__} cannot exchange the parameters of a module sharded by FSDP, which gathers its "
                'own shards in every forward; use trust_region="input_noise", which needs no other parameters'
            )
        self._model = model

    def measure(self, call: ForwardCall) -> Tensor:
        """Return the divergence between the reference's output and the call's own.

        Args:
            call: A forward call of the first pass.
        """
        if not self._held.tensors:
            logits = call.logits[0]
            return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        return call.distance_to(call.rerun(self._held.for_use(self._parameters())))

    def advance(self) -> None:
        """Change the reference before the base optimizer moves the weights."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget the reference; the next one is made of the weights found then."""
        self._held.tensors = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the reference, by parameter name."""
        return {"weights": self._held.saved()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved reference, copied.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it belongs to another model.
        """
        self._held.load(state_dict["weights"], self._parameters(frozen=True))

    def _parameters(self, frozen: bool = False) -> dict[str, Tensor]:
        if self._model is None:
            raise RuntimeError(
                f"this {type(self).__name__} serves no optimizer yet; give it to one, as in "
                f"samopt.TRAM(base, model=model, trust_region={type(self).__name__}())"
            )
        if frozen:
            return {name: p.detach() for name, p in self._model.named_parameters()}
        return trainable(self._model)


class PreviousStep(ParameterReference):
    """The weights of the previous step, ``theta_{t-1}`` (Sherborne et al. 2024, equation 4, TRAM-theta_{t-1}).

    Until a first step has been taken there is none, and the distance is 0. With a base that evaluates its closure
    several times a step (LBFGS), it is the previous evaluation's.

    Memory: one copy of the trainable parameters.

    Args:
        device: As for ``ParameterReference``.
        dtype: As for ``ParameterReference``.
    """

    def advance(self) -> None:
        """Make the current weights the reference of the next step."""
        self._held.follow(self._parameters())


class EMA(ParameterReference):
    """The exponential moving average of the weights so far: a reference that moves more slowly than the model.

    ``theta_ema <- decay theta_ema + (1 - decay) theta_t`` after each distance, starting from the first step's weights;
    ``decay = 0`` would be ``PreviousStep``. For bf16 and fp16 parameters the average is kept in fp32 unless ``dtype``
    says otherwise; one kept in bf16 is rounded stochastically, or it would stand still.

    Memory: one copy of the trainable parameters.

    Args:
        decay: In (0, 1); the average looks back over about ``1 / (1 - decay)`` steps.
        device: As for ``ParameterReference``.
        dtype: As for ``ParameterReference``.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(
        self, decay: float = 0.999, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f'decay must be between 0 and 1, got {decay}; for 0 use trust_region="previous"')
        super().__init__(device, dtype)
        self.decay = decay
        self._noise = RoundingNoise(0)

    def bind(self, model: nn.Module) -> None:
        """Meet the model; low-precision parameters get an fp32 average.

        Args:
            model: The module whose trainable parameters to follow.

        Raises:
            ValueError: As for ``ParameterReference``.
        """
        super().bind(model)
        if self._held.dtype is None and any(map(is_low_precision, model.parameters())):
            self._held.dtype = torch.float32

    def advance(self) -> None:
        """Move the average towards the current weights."""
        self._held.blend(self._parameters(), 1 - self.decay, self._noise)

    def state_dict(self) -> dict[str, Any]:
        """Return the average, by parameter name, and how often it moved."""
        return super().state_dict() | {"moves": self._noise.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved average, copied.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it belongs to another model.
        """
        super().load_state_dict(state_dict)
        self._noise.position = state_dict["moves"]


class Pretrained(ParameterReference):
    """The weights that fine-tuning started from, ``theta_0`` (Sherborne et al. 2024, table 2, TRAM-theta_0).

    They are the model's when the optimizer is made. A PEFT model needs no copy: with its adapters disabled it *is* the
    pretrained model, and only trainable parameters outside the adapters are held.

    Memory: one copy of the trainable parameters; none for a PEFT adapter.

    Args:
        device: As for ``ParameterReference``.
        dtype: As for ``ParameterReference``.
        save: Whether the state dict holds the copy. Without it, the state dict holds a checksum, and a resumed run
            must make its optimizer while the model has the initial weights, before it loads the trained ones.
    """

    def __init__(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, save: bool = True
    ) -> None:
        super().__init__(device, dtype)
        self.save = save

    def bind(self, model: nn.Module) -> None:
        """Meet the model, and take its weights as the reference.

        Args:
            model: The module, with its pretrained weights.

        Raises:
            ValueError: As for ``ParameterReference``.
        """
        super().bind(model)
        self._held.take_missing(self._parameters())

    def measure(self, call: ForwardCall) -> Tensor:
        """Return the divergence between the pretrained model's output and the call's own.

        Args:
            call: A forward call of the first pass.
        """
        parameters = self._parameters()
        self._held.take_missing(parameters)
        with without_adapters(call.module):
            output = call.rerun(self._held.for_use(parameters))
        return call.distance_to(output)

    def advance(self) -> None:
        """Take the weights that have become trainable, which are about to change for the first time."""
        self._held.take_missing(self._parameters())

    def state_dict(self) -> dict[str, Any]:
        """Return the initial weights by parameter name, or a checksum of each with ``save=False``."""
        return super().state_dict() if self.save else {"checksums": self._checksums()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved initial weights, or compare their checksums with the weights held.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it belongs to another model, or the weights held are not the ones the run started from.
        """
        if "checksums" not in state_dict:
            return super().load_state_dict(state_dict)
        held = self._checksums()
        for name, saved in state_dict["checksums"].items():
            if name not in held or not _same_sums(held[name], saved):
                raise ValueError(
                    f"the reference's {name!r} has the checksum {held.get(name)}, but the run started from {saved}; "
                    "with Pretrained(save=False), make the optimizer while the model has its initial weights, then "
                    "load the checkpoint into the model; or keep the reference in it with Pretrained(save=True)"
                )

    def _checksums(self) -> dict[str, tuple[float, float]]:
        """Return the sum of each held tensor, and of its magnitudes."""
        return {
            name: (float(tensor.double().sum()), float(tensor.double().abs().sum()))
            for name, tensor in self._held.saved().items()
        }

    def _parameters(self, frozen: bool = False) -> dict[str, Tensor]:
        parameters = super()._parameters(frozen)
        in_adapters = adapter_parameters(self._model) if self._model is not None else set()
        return {name: tensor for name, tensor in parameters.items() if name not in in_adapters}


def _same_sums(held: tuple[float, float], saved: tuple[float, float]) -> bool:
    return all(abs(ours - theirs) <= _SAME * saved[1] for ours, theirs in zip(held, saved, strict=True))


def _bases(model: nn.Module) -> set[type]:
    return {base for module in model.modules() for base in type(module).__mro__}
