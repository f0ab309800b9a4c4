"""Schedules for the radius, driven the way torch's learning-rate schedulers are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from numbers import Integral
from typing import Any
from weakref import WeakKeyDictionary, ref

from samopt._step.late_phase import first_late_step, share_of
from samopt.distributed import runs_on_several_ranks
from samopt.optimizer import SharpnessAwareOptimizer
from samopt.parts.checks import check_nonnegative

__all__ = ["RhoScheduler"]

# The schedule that was made last for each optimizer. Two would overwrite each other's rho in turn.
_drivers: WeakKeyDictionary[SharpnessAwareOptimizer, ref[RhoScheduler]] = WeakKeyDictionary()


class RhoScheduler:
    """Multiplies each group's initial ``rho`` by a factor that depends on the number of ``step()`` calls.

    Like torch's schedulers it takes effect on construction (with step 0) and at each ``step()``; call that after
    ``optimizer.step()``. One schedule drives an optimizer: a newer one takes the older one's place, and starts from the
    same initial ``rho``. To combine two, multiply their factors: ``RhoScheduler(optimizer, lambda step: a(step) *
    b(step))``.

    Args:
        optimizer: The sharpness-aware optimizer whose ``rho`` to drive.
        factor: Called as ``factor(step)``, returns a number >= 0.

    Raises:
        TypeError: If ``optimizer`` is not a sharpness-aware optimizer.
        ValueError: If ``factor`` returns a negative or non-finite number; the groups keep their ``rho``.

    Example:
        >>> import torch, samopt
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.2, lr=0.1)
        >>> scheduler = samopt.RhoScheduler.linear_warmup(optimizer, steps=4)
        >>> [round((scheduler.step(), scheduler.get_last_rho()[0])[1], 3) for _ in range(5)]
        [0.05, 0.1, 0.15, 0.2, 0.2]
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, factor: Callable[[int], float]) -> None:
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            raise TypeError(
                f"RhoScheduler drives the rho of a samopt optimizer, got {type(optimizer).__name__}; wrap it first, as "
                "in samopt.SAM(optimizer, rho=0.05)"
            )
        self.optimizer = optimizer
        self._factor = factor
        self.base_rhos = self._initial_rhos()
        self.last_step = 0
        self._set: list[float] = []
        self._move_to(0, self.base_rhos)
        _drivers[optimizer] = ref(self)

    def _initial_rhos(self) -> list[float]:
        """Return each group's ``rho``, without what an older schedule has made of it."""
        present = self.get_last_rho()
        older = schedule_of(self.optimizer)
        if older is None:
            return present
        pairs = zip(older.base_rhos, older._set, strict=True)
        initial = [base if rho == made else rho for (base, made), rho in zip(pairs, present, strict=False)]
        return initial + present[len(initial) :]

    @classmethod
    def linear_warmup(cls, optimizer: SharpnessAwareOptimizer, steps: int, start: float = 0.0) -> RhoScheduler:
        """Return a schedule that rises linearly from ``start`` times ``rho`` to ``rho``, and stays there.

        A radius that is right for a trained network can hold a freshly initialised one at the saddle it starts from.

        Args:
            optimizer: The optimizer to drive.
            steps: Number of scheduler steps to rise over, > 0.
            start: Factor at step 0, in [0, 1]. With 0, step 0 costs one pass.

        Raises:
            ValueError: If an argument is out of range.
        """
        _check_steps(steps)
        if not 0 <= start <= 1:
            raise ValueError(f"start must be in [0, 1], got {start}")
        return cls(optimizer, partial(_linear, steps=steps, start=start))

    @classmethod
    def cosine(cls, optimizer: SharpnessAwareOptimizer, steps: int, final: float = 0.0) -> RhoScheduler:
        """Return a schedule that falls from ``rho`` to ``final`` times ``rho`` along half a cosine, and stays there.

        Args:
            optimizer: The optimizer to drive.
            steps: Number of scheduler steps to fall over, > 0.
            final: Factor at the end, >= 0.

        Raises:
            ValueError: If an argument is out of range.
        """
        _check_steps(steps)
        if not final >= 0:
            raise ValueError(f"final must be >= 0, got {final}")
        return cls(optimizer, partial(_cosine, steps=steps, final=final))

    @classmethod
    def proportional_to_lr(
        cls, optimizer: SharpnessAwareOptimizer, max_lr: float, min_lr: float = 0.0, min_factor: float = 0.0
    ) -> RhoScheduler:
        """Return a schedule that follows the learning rate of the first group.

        ``rho_t = rho_min + (rho_max - rho_min) (lr_t - lr_min) / (lr_max - lr_min)``: Zhuang et al. 2022, "Surrogate
        Gap Minimization Improves Sharpness-Aware Training", section 4.2. Call ``step()`` after the learning-rate
        scheduler's.

        Args:
            optimizer: The optimizer to drive.
            max_lr: Learning rate at which ``rho`` is the group's own.
            min_lr: Learning rate at which it is ``min_factor`` times that.
            min_factor: Smallest factor, in [0, 1].

        Raises:
            ValueError: If an argument is out of range.
        """
        if not max_lr > min_lr:
            raise ValueError(f"max_lr must be larger than min_lr, got {max_lr} and {min_lr}")
        if not 0 <= min_factor <= 1:
            raise ValueError(f"min_factor must be in [0, 1], got {min_factor}")
        follow = partial(_follow_lr, optimizer=optimizer, max_lr=max_lr, min_lr=min_lr, min_factor=min_factor)
        return cls(optimizer, follow)

    @classmethod
    def every(cls, optimizer: SharpnessAwareOptimizer, k: int) -> RhoScheduler:
        """Return a schedule that perturbs in steps 0, k, 2k, ... and has ``rho = 0``, so one pass, in the others.

        Cost: ``1 + 1/k`` times the base's.

        Args:
            optimizer: The optimizer to drive.
            k: Period in scheduler steps, >= 1.

        Raises:
            ValueError: If ``k`` is less than 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        return cls(optimizer, partial(_every, k=k))

    @classmethod
    def late(
        cls,
        optimizer: SharpnessAwareOptimizer,
        start: int | str,
        ramp: int = 0,
        *,
        total: int | None = None,
        seconds: float | None = None,
    ) -> RhoScheduler:
        """Return a schedule with ``rho = 0``, so one pass a step, before ``start``, and the full ``rho`` after.

        A few epochs of SAM at the end find minima about as flat as SAM throughout (Zhou et al. 2025, "Sharpness-Aware
        Minimization Efficiently Selects Flatter Minima Late in Training"). Cost: with ``start`` halfway, 1.5 times the
        base's.

        Args:
            optimizer: The optimizer to drive.
            start: First perturbed step, >= 0; or a share of the run such as "last 25 %", with ``total`` or ``seconds``.
                A broken number of perturbed steps is rounded up.
            ramp: Number of steps over which ``rho`` rises linearly from there, >= 0; 0 with ``seconds``.
            total: With a share: scheduler steps of the whole run, >= 1.
            seconds: With a share: wall-clock time of the whole run, > 0. It is counted from here on, and goes on from
                the saved time after ``load_state_dict``. One process only.

        Raises:
            ValueError: If an argument is out of range, or does not go with another.

        Example:
            >>> import torch, samopt
            >>> w = torch.nn.Parameter(torch.zeros(2))
            >>> optimizer = samopt.SAM([w], torch.optim.SGD, rho=0.2, lr=0.1)
            >>> scheduler = samopt.RhoScheduler.late(optimizer, "last 25 %", total=8)
            >>> [(scheduler.get_last_rho()[0], scheduler.step())[0] for _ in range(8)]
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.2]
        """
        if ramp < 0:
            raise ValueError(f"ramp must be >= 0, got {ramp}")
        if not isinstance(start, str):
            if total is not None or seconds is not None:
                raise ValueError(
                    f'total= and seconds= go with a share of the run, such as start="last 25 %"; got start={start!r}'
                )
            if not _is_step(start):
                raise ValueError(f'start must be a step >= 0, or a share of the run such as "last 25 %"; got {start!r}')
            return cls(optimizer, partial(_late, start=start, ramp=ramp))
        share = share_of("start", start)
        if (total is None) == (seconds is None):
            raise ValueError(
                f"start={start!r} is a share of the run, so give either total= (its scheduler steps) or seconds= (its "
                f"time); got total={total} and seconds={seconds}"
            )
        if total is not None:
            if total < 1:
                raise ValueError(f"total must be at least 1, got {total}")
            return cls(optimizer, partial(_late, start=first_late_step(share, total), ramp=ramp))
        check_nonnegative("seconds", seconds)
        if seconds == 0 or ramp:
            raise ValueError(f"seconds must be > 0, and has no ramp of steps; got seconds={seconds} and ramp={ramp}")
        if runs_on_several_ranks():
            raise ValueError(
                "seconds= follows the clock of this process, so several processes would not perturb in the same steps, "
                "and would wait for each other; use total="
            )
        return cls(optimizer, _LateInTime(share, float(seconds or 0)))

    @classmethod
    def below_lr(cls, optimizer: SharpnessAwareOptimizer, lr: float) -> RhoScheduler:
        """Return a schedule that perturbs while the learning rate of the first group is at most ``lr``.

        Late-phase SAM aligned with the learning-rate decay: with a warmup, its low rates are perturbed as well. Call
        ``step()`` after the learning-rate scheduler's.

        Args:
            optimizer: The optimizer to drive.
            lr: Learning rate from which on to perturb, > 0.

        Raises:
            ValueError: If ``lr`` is not positive.
        """
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        return cls(optimizer, partial(_below_lr, optimizer=optimizer, lr=lr))

    def step(self) -> None:
        """Advance by one and set every group's ``rho``.

        Raises:
            RuntimeError: If a newer schedule drives the optimizer.
            ValueError: If the factor is negative or not finite; nothing has changed then.
        """
        newer = schedule_of(self.optimizer)
        if newer is not None and newer is not self:
            raise RuntimeError(
                "another RhoScheduler, made later, drives this optimizer, and both would set the same rho; "
                "step that one alone, or make one schedule of both factors: RhoScheduler(optimizer, lambda step: "
                "a(step) * b(step))"
            )
        self._move_to(self.last_step + 1, self.base_rhos)

    def get_last_rho(self) -> list[float]:
        """Return each group's present ``rho``."""
        return [self.optimizer.option(group, self.optimizer.radius.option) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the initial radii, and with ``seconds=`` the time that has passed.

        The factor itself is code and is not saved.
        """
        state: dict[str, Any] = {"last_step": self.last_step, "base_rhos": list(self.base_rhos)}
        if isinstance(self._factor, _LateInTime):
            state["seconds"] = self._factor.elapsed()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, and set every group's ``rho`` accordingly.

        Args:
            state_dict: What ``state_dict`` returned.

        Raises:
            ValueError: If it is the state for more parameter groups than there are; nothing has changed then.
        """
        base_rhos = list(state_dict["base_rhos"])
        if len(base_rhos) > len(self.optimizer.param_groups):
            raise ValueError(
                f"the saved schedule drives {len(base_rhos)} param groups, but the optimizer has "
                f"{len(self.optimizer.param_groups)}; add the others (add_param_group) before loading"
            )
        if isinstance(self._factor, _LateInTime):
            self._factor.go_on_from(state_dict.get("seconds", 0.0))
        self._move_to(state_dict["last_step"], base_rhos)

    def _move_to(self, step: int, base_rhos: list[float]) -> None:
        """Set every group's ``rho`` to that of ``step``; a group missing from ``base_rhos`` has its present one."""
        factor = self._factor(step)
        if not (factor >= 0 and math.isfinite(factor)):
            raise ValueError(f"the factor of rho must be >= 0 and finite, got {factor} at step {step}")
        self.last_step = step
        self.base_rhos = base_rhos + self.get_last_rho()[len(base_rhos) :]
        for group, rho in zip(self.optimizer.param_groups, self.base_rhos, strict=True):
            self.optimizer.set_option(group, self.optimizer.radius.option, rho * factor)
        self._set = self.get_last_rho()


def schedule_of(optimizer: SharpnessAwareOptimizer) -> RhoScheduler | None:
    """Return the schedule that drives an optimizer's radius, or None.

    Args:
        optimizer: One that a schedule may have been made for.
    """
    driver = _drivers.get(optimizer)
    return None if driver is None else driver()


# Module-level, with the optimizer as an argument, so that a copied or pickled schedule follows the copied optimizer.
def _linear(step: int, *, steps: int, start: float) -> float:
    return min(1.0, start + (1.0 - start) * step / steps)


def _cosine(step: int, *, steps: int, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


def _every(step: int, *, k: int) -> float:
    return 0.0 if step % k else 1.0


def _late(step: int, *, start: int, ramp: int) -> float:
    if step < start:
        return 0.0
    return min(1.0, (step - start + 1) / (ramp + 1))


class _LateInTime:
    """1 in the last share of a time, 0 before."""

    def __init__(self, share: Fraction, seconds: float) -> None:
        self._begin = float(1 - share) * seconds
        self.go_on_from(0.0)

    def __call__(self, step: int) -> float:
        return 1.0 if self.elapsed() >= self._begin else 0.0

    def elapsed(self) -> float:
        """Return the seconds of the run until now."""
        return self._before + time.monotonic() - self._since

    def go_on_from(self, seconds: float) -> None:
        """Count on from a time."""
        self._before, self._since = float(seconds), time.monotonic()

    def __getstate__(self) -> dict[str, float]:
        return {"_begin": self._begin, "_before": self.elapsed()}

    def __setstate__(self, state: dict[str, float]) -> None:
        self._begin = state["_begin"]
        self.go_on_from(state["_before"])  # another process has another clock


def _below_lr(step: int, *, optimizer: SharpnessAwareOptimizer, lr: float) -> float:
    return 1.0 if float(optimizer.param_groups[0]["lr"]) <= lr else 0.0


def _follow_lr(
    step: int, *, optimizer: SharpnessAwareOptimizer, max_lr: float, min_lr: float, min_factor: float
) -> float:
    fraction = (float(optimizer.param_groups[0]["lr"]) - min_lr) / (max_lr - min_lr)
    return min_factor + (1.0 - min_factor) * min(max(fraction, 0.0), 1.0)


def _is_step(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
