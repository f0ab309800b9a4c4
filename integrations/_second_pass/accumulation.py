"""Both passes over one accumulation window, in a loop that steps the optimizer itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn

from samopt._step.window import MicroBatch
from samopt.distributed import unsynced
from samopt.optimizer import SharpnessAwareOptimizer

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]  # accelerate ships no types

__all__ = ["Kept", "TwoPasses"]

Kept: TypeAlias = Callable[[], tuple[Sequence[nn.Module], Iterable[tuple[object, Collection[str]]]]]


class TwoPasses:
    """Runs every micro-batch once as usual and, at the last one of a window, all of them again at ``w + epsilon``.

    The window is everything since the last optimizer step or ``zero_grad()``. So it holds exactly what the accumulated
    gradients hold, also where an epoch ended it early. After the last micro-batch the gradients are the second pass's;
    the loop unscales, clips and steps them.

    Args:
        accelerator: Says when a window is complete (``sync_gradients``), and suspends gradient exchange.
        optimizer: Moves and restores the weights; its ``step`` is not called.
        model: The prepared model.
        sync_perturbation: With several processes: perturb along the averaged gradients instead of each process's own.
        kept: Returns what the second pass must leave alone besides the optimizer's model, at the start of each window:
            modules, and objects with the names of attributes to ignore.

    Attributes:
        optimizer: The sharpness-aware optimizer.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: SharpnessAwareOptimizer,
        model: nn.Module,
        *,
        sync_perturbation: bool = False,
        kept: Kept = lambda: ((), ()),
    ) -> None:
        self.optimizer = optimizer
        self._accelerator = accelerator
        self._model = model
        # Shards of a gradient belong together, so that sharded parameters have one perturbation.
        synced = sync_perturbation or optimizer.sync_perturbation or accelerator.is_fsdp2
        self._per_rank = accelerator.num_processes > 1 and not synced
        if synced and optimizer.two_passes is not None:
            optimizer.two_passes.share_perturbation()
        self._kept = kept

    def run(self, once: Callable[[], Tensor], again: Callable[[], Tensor]) -> Tensor:
        """Run the first pass of a micro-batch and, if it completes the window, the second pass of all of them.

        Args:
            once: Forward and backward of the micro-batch; returns the loss as differentiated.
            again: The same, for the second pass.

        Returns:
            What ``once`` returned.

        Raises:
            RuntimeError: If the gradients of a second pass wait for the step, or others were there when a window began,
                or were changed inside one.
        """
        passes = self.optimizer.two_passes
        if passes is None:  # no weight moves in one pass
            return once()
        if self.optimizer.waits_for_step:
            raise RuntimeError(
                "a second micro-batch came before optimizer.step(), but the accelerator was not told to accumulate: it "
                "ended the window at the first one. Make it with Accelerator(gradient_accumulation_steps=k), put 'with "
                "accelerator.accumulate(model):' around each micro-batch, and do not divide the loss by k"
            )
        passes.check_window()
        is_first = not passes.window
        if is_first:
            passes.refuse_leftovers()
            passes.include(*self._kept())
        start = passes.begin_micro_batch(is_first=is_first)
        with self._unsynced() if self._per_rank and passes.keeps_on_rank([self._model]) else nullcontext():
            loss = once()
        passes.window.append(MicroBatch(again, loss.detach(), start))
        if self._accelerator.sync_gradients:
            window, passes.window = passes.window, []
            passes.run_again(window, self._exchange)
        else:
            passes.end_micro_batch()
        return loss

    def _exchange(self, is_last: bool) -> AbstractContextManager[None]:
        syncs_each = bool(self._accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False))
        return nullcontext() if is_last or syncs_each else self._unsynced()

    def _unsynced(self) -> AbstractContextManager[None]:
        if not self._accelerator.is_fsdp2:
            return unsynced(self._model)
        context: AbstractContextManager[None] = self._accelerator.no_sync(model=self._model)
        return context
