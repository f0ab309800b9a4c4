"""The second pass sees what the first one saw, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from samopt._callers.compiled import is_called_from_compiled
from samopt._callers.cuda_graphs import is_capturing
from samopt._callers.user_warnings import warn_user
from samopt._replay.call_watch import PassFollower, watch
from samopt._replay.forward_calls import ForwardCalls
from samopt._replay.module_state import ModuleState, every_module
from samopt._replay.random_state import RngState
from samopt._replay.unwrap import outside_compile

__all__ = ["Replay"]


class Replay:
    """Repeats the random numbers of the first pass in the second, and puts back the state of the model after it.

    Args:
        models: The modules that the passes run; empty to look after the random streams only.
        accelerators: Returns the devices besides the CPU whose random streams the model may use.
        expects_second: Returns whether a second pass may follow the first one that begins.
        followers: Told of the calls of the first model, and when passes begin and end.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        accelerators: Callable[[], Sequence[torch.device]],
        expects_second: Callable[[], bool],
        followers: Iterable[PassFollower] = (),
    ) -> None:
        self.models = models
        self._expects_second = expects_second
        self._accelerators = accelerators
        self.state = ModuleState(models)
        self._has_begun = False  # whether the start of the first pass was told by ``begin_first``
        self._is_told = False  # whether that pass is running, so that clearing the gradients is a part of it
        self._calls = ForwardCalls(self._at_first_call, self._at_first_trained, self.state.bind_later_start)
        self._others = tuple(followers)
        self._followers: tuple[PassFollower, ...] = (self._calls, *self._others)
        self._end: RngState | None = None
        self._is_blind = False
        self._has_warned = False
        outermost = [outside_compile(model) for model in models[:1]]
        self._stops = [watch(outermost, follower, only_these=True) for follower in self._others]
        self._stops.append(watch(models, self._calls))

    def detach(self) -> None:
        """Follow the models' calls no longer."""
        for stop in self._stops:
            stop()

    def begin_first(self, generators: Iterable[Any] = (), modules: Iterable[nn.Module] = ()) -> RngState:
        """Start a first pass whose beginning is known, and return the random state there.

        Args:
            generators: Random generators that the loss function reads.
            modules: Modules that it may run besides the models.
        """
        self.forget()
        self.state.reach(modules)
        self._begin()
        self._has_begun = True
        return self.capture(generators)

    @contextmanager
    def told_first_pass(self) -> Generator[None]:
        """Let the first pass that ``begin_first`` began clear the gradients itself, as a closure does."""
        self._is_told = True
        try:
            yield
        except BaseException:
            self._has_begun = False
            raise
        finally:
            self._is_told = False

    def capture(self, generators: Iterable[Any] = ()) -> RngState:
        """Return the present random state of the streams this model may use.

        Args:
            generators: As for ``begin_first``.
        """
        return RngState.capture(self._calls.devices, generators=generators)

    def begin_second(self, start: RngState | None = None, moving: Iterable[Tensor] = ()) -> None:
        """Enter the second pass.

        Args:
            start: Random state at the start of the first pass, where known.
            moving: Parameters that the perturbation moves and puts back.
        """
        self._end = self.capture(() if start is None else start.generators)
        self.state.save(moving)
        self._is_blind = bool(self.models) and start is None and self._calls.is_empty
        if not self._has_warned and any(map(is_capturing, self._calls.devices)) and _has_dropout(self.models):
            self._has_warned = True
            warn_user(
                "random states cannot be set while a graph is captured, so in its replays the dropout of "
                f"{self._names()} draws other masks in the second pass than in the first. Set its rate to 0, or take "
                "these steps without a graph"
            )
        if start is not None:  # from there, the streams repeat by themselves, whatever the calls and their order
            self._calls.clear()
        for follower in self._followers:
            follower.replaying = True
        if start is not None:
            start.restore()

    def end_second(self) -> None:
        """Leave the second pass: state and random streams as the first pass left them; may be called again.

        Raises:
            RuntimeError: If random numbers could not be repeated, because the whole training step is compiled.
        """
        self.state.restore()
        unseen = self._end is not None and self._is_blind and self._end.has_moved()
        drew_others = self._calls.drew_others
        if self._end is not None:
            self._end.restore()
        self.forget()
        if unseen and is_called_from_compiled():
            raise RuntimeError(
                f"perturbed() ran inside a function that torch.compile compiled, where the calls of {self._names()} "
                "cannot be followed, so its dropout masks differed between the passes; nothing was updated. Compile "
                "the model or the function that computes the loss instead of the whole training step, or write "
                "'loss = optimizer.backward(compute_loss)' in it, which repeats every random number"
            )
        if drew_others and not self._has_warned:
            self._has_warned = True
            warn_user(
                f"a forward call of {self._names()} in the second pass drew random numbers and repeats none that is "
                "known of the first, so dropout masks differed between the passes. Run the same calls in both; a call "
                "is known if its output is differentiated (not hidden layers alone, taken by a hook). "
                "optimizer.backward(compute_loss) repeats every random number"
            )
        if unseen and not self._has_warned:
            self._has_warned = True
            warn_user(
                f"the second pass drew random numbers, but no forward call of {self._names()} was seen in the first, "
                "so dropout masks differed between the passes. Give model= the module that your loop calls, such as "
                "the one that torch.compile(model) returned (calls inside a compiled module, and those of one compiled "
                "in place by model.compile(), cannot be seen); or use optimizer.backward(compute_loss), which repeats "
                "all of them"
            )

    def leave_streams(self) -> None:
        """Do not put the random streams back at the end of the second pass: others have drawn from them since."""
        self._end = None

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: a forward call from now on starts a new first pass."""
        if not (self._calls.replaying or self._is_told):
            self._has_begun = False
        for follower in self._followers:
            follower.gradients_cleared()

    def forget(self) -> None:
        """Drop what was recorded, ready for the next first pass."""
        for follower in self._followers:
            follower.clear()
        self.state.reach(())
        self._end = None
        self._has_begun = False

    def check_first_pass(self) -> None:
        """Raise ``RuntimeError`` if a follower lacks what it needs of the first pass; changes nothing."""
        for follower in self._others:
            follower.check_first_pass()

    def check_second_pass(self) -> None:
        """Raise ``RuntimeError`` if the second pass did not repeat the first in what a follower needs."""
        for follower in self._others:
            follower.check_second_pass()

    def _at_first_call(self) -> None:
        """Note the start of a first pass, unless it was told already."""
        if not self._has_begun:
            self._begin()

    def _at_first_trained(self) -> None:
        """Note that the first pass may begin only now, after an evaluation, unless its start was told."""
        if not self._has_begun:
            self.state.note_later_start()

    def _begin(self) -> None:
        self._calls.devices = tuple(self._accelerators())
        self.state.begin(rewinds=self._expects_second())

    def _names(self) -> str:
        return "model=" + ", ".join(type(model).__name__ for model in self.models)


def _has_dropout(models: Sequence[nn.Module]) -> bool:
    """Return whether a module of torch's own draws masks, as far as its attributes tell."""
    modules = [module for module in every_module(models) if module.training]
    rates = [getattr(m, "p" if isinstance(m, _DropoutNd) else "dropout", None) for m in modules]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
