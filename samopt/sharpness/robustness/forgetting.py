"""The loss on the old data after a short fine-tune on other data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from samopt.sharpness._measuring.batches import fresh, read_batches
from samopt.sharpness._measuring.losses import Loss, as_loss_fn, copied_with_loss
from samopt.sharpness._measuring.measured_model import GRADIENT, measuring
from samopt.sharpness._measuring.optimizer_parts import RngState
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.weights import unwrap
from samopt.sharpness.robustness.result import Robustness, rises_at

__all__ = ["Forgetting", "forgetting"]

_DEFAULT = functools.partial(SGD, lr=0.01, momentum=0.9)
_PARTS = 4  # how often the old data is looked at


@dataclass(frozen=True)
class Forgetting(Robustness):
    """What ``forgetting`` returns; the levels are numbers of steps.

    Attributes:
        new_losses: Mean loss on the other data before the first step and at each level: whether it was learned.
    """

    new_losses: tuple[float, ...]


def forgetting(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    elsewhere: Iterable[Any],
    *,
    steps: int = 40,
    optimizer: Callable[[Any], Optimizer] | None = None,
    accuracy_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    mode: str = "eval",
    progress: ProgressOption = None,
) -> Forgetting:
    """Return the rise of the loss on ``batches`` after a short fine-tune of a copy on ``elsewhere``.

    A flat minimum is said to forget less when training goes on with other data; this measures it, at a quarter, half,
    three quarters and all of the steps.

    The rise is ``L_old(w after some steps on other data) - L_old(w)``.

    Misleads: a model that learns the other data faster forgets faster; look at ``new_losses``, too.

    Cost: ``steps`` gradients of a batch of ``elsewhere``, and 5/3 gradients for each batch of both. Memory: a copy of
    the model, with the optimizer's state.

    Args:
        model: The model; it comes back bit for bit, since a copy is trained.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches of the old data; means weigh examples.
        elsewhere: Batches of the other data, for the same loss; gone through in their order, again and again.
        steps: Optimizer steps, >= 1.
        optimizer: Makes the optimizer from the trainable parameters; None for SGD with ``lr=0.01, momentum=0.9``.
        accuracy_fn: ``accuracy_fn(model, batch) -> scalar`` on the old data, such as ``sharpness.accuracy``.
        mode: "eval", "train", or "keep": how both data are measured; training is in training mode.
        progress: See ``ProgressOption``.

    Returns:
        The rise on the old data, and the loss on the other.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the loss at the weights is not finite.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.weight.data = torch.tensor([[1.0]])
        >>> def loss_fn(model, batch):
        ...     return (model.weight - batch).square().sum() / 2
        >>> old, new = [torch.tensor(1.0)], [torch.tensor(0.0)]
        >>> result = sharpness.forgetting(model, loss_fn, old, new, steps=1, optimizer=partial(torch.optim.SGD, lr=1.0))
        >>> result.value, result.new_losses
        (0.5, (0.5, 0.0))
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a function that makes an optimizer for the copy that is trained, got an object of "
            f"{type(optimizer).__name__}; write functools.partial(torch.optim.{type(optimizer).__name__}, lr=...)"
        )
    compute_loss = as_loss_fn(loss_fn)
    other = read_batches(elsewhere)
    twin, compute_loss, _ = copied_with_loss(unwrap(model), compute_loss)
    levels = sorted({-(-steps * part // _PARTS) for part in range(1, _PARTS + 1)})
    losses, accuracies, learned = [], [], []
    with measuring(
        twin,
        compute_loss,
        batches,
        name="forgetting",
        mode=mode,
        progress=progress,
    ) as measured:
        base = (optimizer or _DEFAULT)([weight for weight in twin.parameters() if weight.requires_grad])
        modes = [(module, module.training) for module in twin.modules()]

        def look() -> list[float]:
            for module, training in modes:
                module.training = training
            measured.keep_buffers()
            stream = RngState.capture({weight.device for weight in twin.parameters()})
            learned.append(measured.mean_over(other))
            if accuracy_fn is not None:
                accuracies.append(measured.mean_of(accuracy_fn))
            found = [float(measured.loss(batch)) for batch in measured.batches]
            measured.put_back_state()  # training goes on as if nothing had been looked at
            stream.restore()
            return found

        before = [
            measured.checked(torch.tensor(loss, dtype=torch.float64), number) for number, loss in enumerate(look())
        ]
        for step, batch in enumerate(itertools.islice(itertools.cycle(other), steps), start=1):
            twin.train()
            base.zero_grad()
            with torch.enable_grad():
                loss = compute_loss(twin, fresh(batch))
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
            base.step()
            measured.progress.advance(GRADIENT)
            if step in levels:
                losses.append(look())
        fields = rises_at(losses, before, measured.sizes)
        cost = measured.progress.cost
    return Forgetting(
        measure="forgetting",
        cost=cost,
        settings={"levels": "steps of training on other data", "optimizer": type(base).__name__, **measured.settings},
        levels=tuple(float(level) for level in levels),
        accuracies=tuple(accuracies) if accuracy_fn is not None else None,
        new_losses=tuple(learned),
        **fields,
    )
