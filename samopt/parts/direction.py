"""Along what to move: the direction ``d`` of a perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from samopt.parts.base_state import StateSeen
from samopt.parts.checkpoint import by_parameter, in_order
from samopt.parts.checks import check_nonnegative
from samopt.parts.part import Part

__all__ = [
    "CachedDirection",
    "Direction",
    "Friendly",
    "Gradient",
    "KnownDirection",
    "Momentum",
    "ReusedGradient",
    "named_direction",
]


class Direction(Part):
    """Along what to move. Derive from ``Gradient`` (two passes a step) or from ``KnownDirection`` (one pass)."""


class Gradient(Direction):
    """This batch's gradient ``g``, which takes a pass of its own (Foret et al. 2021)."""

    def from_gradients(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the direction of each parameter.

        Args:
            parameters: The parameters that move and have a gradient.
            gradients: Their gradients at ``w``, which must not be changed.

        Returns:
            Tensors of the gradients' shapes and dtypes. Here the gradients themselves.
        """
        return gradients


class KnownDirection(Direction):
    """A direction that is known before the batch's gradient, so that a step is one pass.

    Attributes:
        sign: 1 to move along the direction, -1 to move against it.
    """

    sign = 1

    def directions(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return the direction of each parameter, of its shape; None while there is none.

        It points up the loss, or down it for a group with ``maximize=True``.

        Args:
            parameters: Parameters of one group.
            group: That parameter group.
            base: The base optimizer.
        """
        raise NotImplementedError


class CachedDirection(KnownDirection):
    """A direction taken in passes of its own (``first_pass``), less often or on less data than each batch."""

    def is_due(self) -> bool:
        """Return whether a new direction must be taken before this step's ascent."""
        raise NotImplementedError

    def capture(self, parameters: Sequence[Tensor]) -> None:
        """Make the direction from the gradients that the parameters hold now.

        Args:
            parameters: Every parameter; with ``only``, those that may move.
        """
        raise NotImplementedError


class Friendly(Gradient):
    """The batch's own part of its gradient: ``g - sigma m``, with ``m`` the running average of gradients.

    ``m_t = decay m_{t-1} + (1 - decay) g_t`` starts from 0 and stands for the gradient of the whole data. Source: Li et
    al. 2024, "Friendly Sharpness-Aware Minimization", algorithm 1.

    Cost: one copy of the gradients is kept in at least fp32, and saved in checkpoints; a second one lives between
    ascent and update. On several ranks the first pass's gradients are averaged, so that all keep the same ``m``.

    Args:
        sigma: How much of the average is taken out, >= 0. 0 is SAM's direction.
        decay: Weight of the past (the paper's lambda), in [0, 1).

    Raises:
        ValueError: If an argument is out of range; at the first step, if a gradient is sparse.
    """

    def __init__(self, sigma: float = 1.0, decay: float = 0.9) -> None:
        check_nonnegative("sigma", sigma)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.sigma = sigma
        self.decay = decay
        self._average: dict[Tensor, Tensor] = {}
        self._next: dict[Tensor, Tensor] = {}

    def from_gradients(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return ``g - sigma m``; ``m`` is kept when the step is taken.

        Args:
            parameters: The parameters.
            gradients: Their gradients.

        Raises:
            ValueError: If a gradient is sparse.
        """
        directions = []
        self._next = {}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient.layout is not torch.strided:
                raise ValueError(
                    f"the friendly direction averages gradients, but one is {gradient.layout}; use sparse=False in the "
                    "embedding, or a parameter group with perturb=False for it"
                )
            wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
            average = wide * (1 - self.decay)
            if parameter in self._average:
                average.add_(self._average[parameter], alpha=self.decay)
            self._next[parameter] = average
            directions.append(wide.sub(average, alpha=self.sigma).to(gradient.dtype))
        return directions

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Keep the average that the step was taken with.

        Args:
            parameters: Every parameter.
        """
        self._average |= self._next
        self._next = {}

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the average of each parameter, None where it has none.

        Args:
            parameters: Every parameter, in the order of the groups.
        """
        return {"average": in_order(self._average, parameters)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Load the averages.

        Args:
            state: What ``state_dict`` returned.
            parameters: Every parameter, in the order of the groups.
        """
        self._next = {}
        self._average = by_parameter(state.get("average", []), parameters)


class ReusedGradient(CachedDirection):
    """The gradient of a separate first pass, reused for several steps: of a whole batch, or of part of one.

    A step costs one pass, plus a first pass every ``every`` steps. That pass leaves nothing behind but the direction:
    gradients, buffers and random streams are put back after it. Take it with
    ``optimizer.step(closure, ascent_closure)``, or in ``with optimizer.first_pass():`` where
    ``optimizer.needs_first_pass`` is True.

    Cost: ``1 + part / every`` times the base's, for that part of a batch; one copy of the gradients is kept, and saved
    in checkpoints. Sources: reuse, Liu et al. 2022, "Towards Efficient and Scalable Sharpness-Aware Minimization"; part
    of a batch, Du et al. 2022, "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks".

    Args:
        every: Steps that one direction serves, >= 1. Where a ``GradScaler`` skips a step, it serves one more.

    Raises:
        ValueError: If ``every`` is less than 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self._age: int | None = None
        self._gradients: dict[Tensor, Tensor] = {}

    def is_due(self) -> bool:
        """Return whether the gradient has served its steps."""
        return self._age is None or self._age >= self.every

    def capture(self, parameters: Sequence[Tensor]) -> None:
        """Keep the present gradients.

        Args:
            parameters: Every parameter.

        Raises:
            RuntimeError: If there are none.
        """
        found = {parameter: parameter.grad.detach() for parameter in parameters if parameter.grad is not None}
        if not found:
            raise RuntimeError("first_pass() ended without gradients; call loss.backward() inside it")
        self._gradients = found
        self._age = 0

    def directions(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return the gradients that were kept, None where there was none; negated where ``maximize`` is set.

        Args:
            parameters: Parameters of one group.
            group: That parameter group.
            base: The base optimizer.
        """
        gradients = [self._gradients.get(parameter) for parameter in parameters]
        if group.get("maximize", False):
            return [None if gradient is None else -gradient for gradient in gradients]
        return gradients

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Count the step.

        Args:
            parameters: Every parameter.
        """
        if self._age is not None:
            self._age += 1

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the kept gradients, None where there are none, and how many steps they served.

        Args:
            parameters: Every parameter, in the order of the groups.
        """
        return {"age": self._age, "gradients": in_order(self._gradients, parameters)}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Load the gradients.

        Args:
            state: What ``state_dict`` returned.
            parameters: Every parameter, in the order of the groups.
        """
        self._age = state.get("age")
        self._gradients = by_parameter(state.get("gradients", []), parameters)


_BUFFERS = ("momentum_buffer", "exp_avg")


class Momentum(KnownDirection):
    """The running average ``m`` of gradients, which the base optimizer keeps anyway (Becker et al. 2024).

    By default the perturbation goes ahead, to ``w - rho m / ||m||``, as the authors' algorithm does. ``m`` is SGD's
    ``momentum_buffer``, or the first moment ``exp_avg`` of Adam and its relatives. Bias correction is a common factor
    and cancels in the normalised direction.

    Args:
        uphill: Move up along the average instead, to ``w + rho m / ||m||``.
        preconditioned: Divide by ``sqrt(v) + eps`` with the bias-corrected second moment: Adam's step. The norm stays
            that of the geometry; ``Preconditioned`` is the geometry in which Adam's step is the steepest.
        buffer: Name of the entry in the base's state, for other optimizers.
        own: Keep an average of samopt's own, for a base without one. It costs one copy of the gradients, kept and
            saved in checkpoints.
        decay: With ``own``: weight of the past, in [0, 1).

    Raises:
        ValueError: When an optimizer is made with it, if the base has a momentum of 0; before the second step, if the
            base keeps no average of a parameter's shape.
    """

    def __init__(
        self,
        *,
        uphill: bool = False,
        preconditioned: bool = False,
        buffer: str | None = None,
        own: bool = False,
        decay: float = 0.9,
    ) -> None:
        if own and (preconditioned or buffer is not None):
            raise ValueError("own=True keeps a plain average of its own; leave out preconditioned= and buffer=")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.uphill = uphill
        self.preconditioned = preconditioned
        self.buffer = buffer
        self.own = own
        self.decay = decay
        self._average: dict[Tensor, Tensor] = {}
        self._seen = StateSeen()

    @property
    def sign(self) -> int:  # type: ignore[override]  # a constant elsewhere
        """1 uphill, -1 ahead."""
        return 1 if self.uphill else -1

    def check(self, base: Optimizer) -> None:
        """Raise if the base is known to keep no momentum.

        Args:
            base: The base optimizer.

        Raises:
            ValueError: If it is SGD, or like it, with a momentum of 0.
        """
        if self.own or self.buffer is not None:
            return
        if any(group.get("momentum") == 0 for group in base.param_groups):
            raise ValueError(self._missing(base, "has momentum=0"))

    def directions(self, parameters: Sequence[Tensor], group: dict[str, Any], base: Optimizer) -> list[Tensor | None]:
        """Return the running averages, None before the base's first step for a parameter.

        Args:
            parameters: Parameters of one group.
            group: That parameter group.
            base: The base optimizer.

        Raises:
            ValueError: If the base has stepped a parameter and keeps no average of its shape.
        """
        if self.own:
            return [self._average.get(parameter) for parameter in parameters]
        momenta, names = [], self._names
        for parameter in parameters:
            state = base.state.get(parameter)
            momentum = _first_tensor(state, names) if state else None
            if momentum is None:
                if state or self._seen.is_missing(parameter):
                    raise ValueError(self._missing(base, f"keeps {sorted(map(str, state or ()))}"))
            elif momentum.shape != parameter.shape or not (momentum.is_floating_point() or momentum.is_complex()):
                found = f"keeps {momentum.dtype} of shape {tuple(momentum.shape)} for one of {tuple(parameter.shape)}"
                raise ValueError(self._missing(base, found))
            elif self.preconditioned:
                momentum = _preconditioned(momentum, state, group, base)
            momenta.append(momentum)
        self._seen.find(parameters, momenta)
        return momenta

    def advance(self, parameters: Sequence[Tensor]) -> None:
        """Note which parameters the base steps; with ``own``, update the average.

        Args:
            parameters: Every parameter.
        """
        if not self.own:
            self._seen.step(parameters)
            return
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                    average = self._average.setdefault(parameter, torch.zeros_like(parameter))
                    average.lerp_(gradient.to(average.dtype), 1 - self.decay)

    def state_dict(self, parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Return the own averages; the base's are in the base's state.

        Args:
            parameters: Every parameter, in the order of the groups.
        """
        return {"average": in_order(self._average, parameters)} if self.own else {}

    def load_state_dict(self, state: Mapping[str, Any], parameters: Sequence[Tensor]) -> None:
        """Load the own averages.

        Args:
            state: What ``state_dict`` returned.
            parameters: Every parameter, in the order of the groups.
        """
        self._seen = StateSeen()
        self._average = by_parameter(state.get("average", []), parameters)

    @property
    def _names(self) -> tuple[str, ...]:
        return (self.buffer,) if self.buffer is not None else _BUFFERS

    def _missing(self, base: Optimizer, found: str) -> str:
        return (
            f"the momentum direction needs {' or '.join(self._names)} of each parameter's shape in the base "
            f"optimizer's state, but {type(base).__name__} {found}; give the base momentum (as in SGD(..., "
            'momentum=0.9)), name its buffer with samopt.parts.Momentum(buffer="..."), or let samopt keep an average '
            "with samopt.parts.Momentum(own=True)"
        )


def _first_tensor(state: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    """Return the first tensor that the state of a parameter holds under one of some names."""
    for name in names:
        momentum = state.get(name)
        if isinstance(momentum, Tensor):
            return momentum
    return None


def _preconditioned(momentum: Tensor, state: Any, group: dict[str, Any], base: Optimizer) -> Tensor:
    """Return the step that Adam takes, without the learning rate and the first moment's bias correction."""
    if "exp_avg_sq" not in state:
        raise ValueError(
            f"a preconditioned momentum direction needs Adam's second moment, but the state of "
            f"{type(base).__name__} has {sorted(state)}; use preconditioned=False"
        )
    _, beta2 = group["betas"]
    count = state["step"]  # on the host; on the device where the base is capturable or fused
    correction = 1 - beta2 ** (count if isinstance(count, Tensor) and not count.is_cpu else float(count))
    step: Tensor = momentum / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
    return step


def named_direction(direction: str | Direction) -> Direction:
    """Return the direction that a user named.

    Args:
        direction: "gradient", "momentum", "momentum-uphill", or a ``Direction``.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If it is neither a name nor a direction.
    """
    accepted = (
        'direction must be "gradient", "momentum", "momentum-uphill", or an object from samopt.parts such as '
        f"Friendly(); got {direction!r}"
    )
    if isinstance(direction, str):
        if direction == "gradient":
            return Gradient()
        if direction not in ("momentum", "momentum-uphill"):
            raise ValueError(accepted)
        return Momentum(uphill=direction == "momentum-uphill")
    if not isinstance(direction, Gradient | KnownDirection):
        raise TypeError(accepted)
    return direction
