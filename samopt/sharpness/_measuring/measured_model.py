"""A model under measurement: evaluated as often as a measure likes, then exactly as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from samopt._numerics.low_precision import full_precision, is_low_precision
from samopt.sharpness._measuring.batches import batch_size, fresh, read_batches
from samopt.sharpness._measuring.logits import normalized_logits
from samopt.sharpness._measuring.losses import (
    Loss,
    LossFn,
    accuracy,
    as_loss_fn,
    has_one_class_each,
    modules_of,
    takes_labels,
)
from samopt.sharpness._measuring.optimizer_parts import (
    MovableWeights,
    RngState,
    SavedState,
    clear_cached_weights,
    leaves_of,
    unobserved,
)
from samopt.sharpness._measuring.progress import Progress, ProgressOption
from samopt.sharpness._measuring.results import mean_and_error
from samopt.sharpness._measuring.weights import Selection, refuse_without_values, select, unwrap

__all__ = ["FORWARD", "GRADIENT", "MODES", "MeasuredModel", "accuracy_for", "measuring"]

FORWARD = 1 / 3  # the cost of a forward pass alone, in gradients: a backward pass costs about twice a forward pass
GRADIENT = 1.0
MODES = ("eval", "train", "keep")


class MeasuredModel:
    """A model, its loss and its batches, in the same state at the start of every evaluation.

    Random numbers (dropout masks), buffers, attributes of the modules and the batch are the same for every evaluation,
    so the loss is a function of the weights and the batch.

    Args:
        model: The module, unwrapped and in the mode to measure in.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        weights: The parameters that the measure is about, by name.
        batches: The batches.
        mode: The mode's name.
        state: The buffers and attributes to start from.
        start: The random state to start from.
        progress: Where the cost goes.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        weights: dict[str, nn.Parameter],
        batches: list[Any],
        mode: str,
        state: SavedState,
        start: RngState,
        progress: Progress,
    ) -> None:
        self.model = model
        self.names = list(weights)
        self.weights = list(weights.values())
        self.batches = batches
        self.sizes = [batch_size(batch) for batch in batches]
        """Number of examples of each batch: means over batches weigh them by it."""
        self.progress = progress
        self.settings: dict[str, Any] = {"model": type(model).__name__, "examples": sum(self.sizes), "mode": mode}
        """For a result: what was measured, and on how much."""
        self._loss_fn = loss_fn
        self._state = state
        self._start = start
        self._has_warned = False
        self._is_of_model = False

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of one batch, detached: 0-dim; costs a forward pass.

        Args:
            batch: The batch.
        """
        with torch.no_grad():
            loss = self.call(batch)
        self.progress.advance(FORWARD)
        return loss

    def mean(self, values: Sequence[float]) -> float:
        """Return the mean over examples of a number that is known for each batch.

        Args:
            values: One for each batch.
        """
        return mean_and_error(values, self.sizes)[0]

    def mean_loss(self) -> float:
        """Return the mean loss over the examples of all batches; costs a forward pass each."""
        return self.mean([float(self.loss(batch)) for batch in self.batches])

    def mean_over(self, batches: Sequence[Any]) -> float:
        """Return the mean loss over the examples of other batches; costs a forward pass each.

        Args:
            batches: The batches.
        """
        losses = [float(self.loss(batch)) for batch in batches]
        return mean_and_error(losses, [batch_size(batch) for batch in batches])[0]

    def mean_of(self, function: Callable[[nn.Module, Any], Tensor]) -> float:
        """Return the mean over examples of another number, such as the accuracy; costs a forward pass a batch.

        Args:
            function: Called as ``function(model, batch)``; returns a scalar.
        """
        return self.mean([self.evaluate(function, batch) for batch in self.batches])

    def evaluate(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> float:
        """Return another number that a function computes from the model and one batch; costs a forward pass.

        Args:
            function: Called as ``function(model, batch)``; returns a scalar.
            batch: The batch.
        """
        with torch.no_grad():
            self._rewind()
            number = float(function(self.model, fresh(batch)))
        self._state.check_parameters()
        self.progress.advance(FORWARD)
        return number

    def put_back_state(self) -> None:
        """Put buffers and attributes back to where evaluations start from, without an evaluation."""
        self._state.restore()

    def keep_buffers(self) -> None:
        """Let evaluations start from the present buffers and attributes; the first ones are put back in the end."""
        self._state = SavedState([self.model, *modules_of(self._loss_fn)], self.weights)

    def loss_in_graph(self, batch: Any) -> Tensor:
        """Return the loss of one batch, detached, from a forward pass that could have been differentiated.

        Some layers compute differently under ``no_grad``; differences of losses must not see that.

        Args:
            batch: The batch.
        """
        with torch.enable_grad():
            loss = self.call(batch).detach()
        self.progress.advance(FORWARD)
        return loss

    def gradient(self, batch: Any) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss of one batch, detached, and its gradient, None for weights that it does not depend on.

        Args:
            batch: The batch.
        """
        with torch.enable_grad():
            loss = self.call(batch)
        gradient = self.differentiate([loss], self.weights)
        self.progress.advance(GRADIENT)
        return loss.detach(), list(gradient)

    def differentiate(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], **options: Any
    ) -> tuple[Tensor | None, ...]:
        """Return ``torch.autograd.grad``, outside any autocast; the parameters' ``.grad`` stays as it is.

        Args:
            outputs: What to differentiate.
            inputs: With respect to what; None is returned for what the outputs do not depend on.
            **options: As for ``torch.autograd.grad``.
        """
        with full_precision(outputs[0].device.type, "cpu"):
            gradient: tuple[Tensor | None, ...] = torch.autograd.grad(outputs, inputs, allow_unused=True, **options)
        return gradient

    @contextmanager
    def movable_weights(self) -> Generator[MovableWeights]:
        """Let the weights be moved inside this context; they are put back bit for bit, also after an interrupt.

        Yields:
            What moves them.
        """
        movable = MovableWeights(self.weights)
        try:
            try:
                yield movable
            finally:
                movable.undo()
        finally:
            movable.undo()  # once more, in case an interrupt hit the first one

    @staticmethod
    def checked(loss: Tensor, number: int) -> float:
        """Return a loss at the unmoved weights as a number.

        Args:
            loss: 0-dim.
            number: Which batch it is of, from 0.

        Raises:
            ValueError: If it is not finite.
        """
        value = float(loss)
        if not math.isfinite(value):
            raise ValueError(
                f"the loss of batch {number} is {value} at the weights themselves, so its rise means nothing; measure "
                "a model that has not diverged, and look at that batch"
            )
        return value

    def call(self, batch: Any) -> Tensor:
        """Return ``loss_fn(model, batch)`` from the common starting state.

        Args:
            batch: The batch.

        Raises:
            TypeError: If it is no scalar tensor.
            ValueError: If a graph is being built and the loss has none.
        """
        self._rewind()
        try:
            loss = self._loss_fn(self.model, fresh(batch))
        except TypeError as error:
            if "must be Tensor, not" not in str(error):
                raise
            raise TypeError(
                f"{error}. A loss function is called as loss_fn(model, batch); a loss of outputs and labels must name "
                "its arguments so, as in def loss(outputs, labels)"
            ) from error
        self._state.check_parameters()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"loss_fn(model, batch) must return a scalar tensor, got {found}; return the mean over the batch's "
                "examples, as in torch.nn.functional.cross_entropy(model(x), y)"
            )
        if is_low_precision(loss) and not self._has_warned:
            self._has_warned = True
            step = torch.finfo(loss.dtype).eps
            warnings.warn(
                f"the loss is in {str(loss.dtype).removeprefix('torch.')}, whose steps are {step:.2g} of its value, so "
                "smaller rises cannot be seen; let loss_fn compute it in fp32, as in cross_entropy(logits.float(), y)",
                stacklevel=2,
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's trainable parameters: it has no graph; check that loss_fn "
                "uses the model it is given, and neither detaches nor calls .item()"
            )
        if torch.is_grad_enabled() and not self._is_of_model:
            self._check_model(loss)
            self._is_of_model = True
        return loss.reshape(())

    def _check_model(self, loss: Tensor) -> None:
        """Refuse a loss that another model computes: no weight of this one would change it.

        Args:
            loss: With its graph.

        Raises:
            ValueError: If it depends on none of the model's trainable parameters.
        """
        own = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        if own and not any(id(leaf) in own for leaf in leaves_of([loss])):
            raise ValueError(
                f"the loss depends on none of the trainable parameters of {type(self.model).__name__}: loss_fn uses "
                "another model than the one it is given; write loss_fn(model, batch) with model(...) in it"
            )

    def _rewind(self) -> None:
        """Go back to the common starting state."""
        clear_cached_weights()
        self._start.restore()
        self._state.restore()


@contextmanager
def measuring(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    name: str,
    parameters: Selection = None,
    mode: str = "eval",
    m: int | None = None,
    normalize_logits: bool = False,
    frozen: bool = False,
    cost_per_batch: float | None = None,
    progress: ProgressOption = None,
) -> Generator[MeasuredModel]:
    """Make a model ready to be measured, and afterwards put back everything but weights that were moved.

    Modes, buffers, random streams and hooks come back; weights are put back by who moves them (``MovableWeights``), and
    ``.grad`` is never touched.

    Args:
        model: The module, perhaps compiled or data-parallel.
        loss_fn: See ``as_loss_fn``.
        batches: An iterable of batches.
        name: What is measured, for the progress bar.
        parameters: Which weights the measure is about.
        mode: "eval", "train", or "keep" for the mode that each module is in.
        m: Examples a piece, or None.
        normalize_logits: Whether the model's outputs are normalised.
        frozen: Whether parameters that are not trainable count, too.
        cost_per_batch: Expected cost in gradients, or None where it cannot be known.
        progress: See ``ProgressOption``.

    Yields:
        The model, ready to be measured.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be "eval", "train" or "keep", got {mode!r}')
    compute_loss = as_loss_fn(loss_fn)
    model = unwrap(model)
    refuse_without_values(model)
    weights = select(model, parameters, frozen=frozen)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        start = RngState.capture({parameter.device for parameter in model.parameters()})
        stack.callback(start.restore)
        read = read_batches(batches, m)
        stack.enter_context(_in_mode(model, mode))
        state = SavedState([model, *modules_of(compute_loss)], weights.values())
        stack.callback(state.restore)
        stack.callback(clear_cached_weights)
        stack.enter_context(unobserved())
        if normalize_logits:
            stack.enter_context(normalized_logits(model, has_labels=takes_labels(compute_loss)))
        total = None if cost_per_batch is None else cost_per_batch * len(read)
        counter = Progress(progress, name, total)
        stack.callback(counter.close)
        yield MeasuredModel(model, compute_loss, weights, read, mode, state, start, counter)


def accuracy_for(model: nn.Module, loss_fn: Loss, batch: Any) -> Callable[[nn.Module, Any], Tensor] | None:
    """Return ``accuracy`` where each example has one label that is a class; None where an accuracy means nothing.

    Args:
        model: The model.
        loss_fn: Its loss.
        batch: A batch of it.
    """
    with measuring(model, loss_fn, [batch], name="accuracy", frozen=True, progress=False) as measured:
        answer = measured.evaluate(lambda model, b: torch.tensor(has_one_class_each(model, b)), measured.batches[0])
        return accuracy if answer else None


@contextmanager
def _in_mode(model: nn.Module, mode: str) -> Generator[None]:
    """Set every module's flag, without the side effects that an overridden ``train()`` may have."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, training in before:
            module.training = training if mode == "keep" else mode == "train"
        yield
    finally:
        for module, training in before:
            module.training = training
