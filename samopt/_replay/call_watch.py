"""Calls of the modules of a model, followed without hooks in the modules' own registries.

torch has a slot for what runs instead of a module's call: ``module.compile()`` fills ``_compiled_call_impl``. It is
left out when a module is pickled, copied or saved, so a watched model stays the user's: copies and files hold nothing
of samopt. A ``finally`` around the call also runs at a ``KeyboardInterrupt``, which forward hooks miss.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import Any

import torch
from torch import nn

from samopt._callers.lightning import runs_step_as_forward

__all__ = ["RAISED", "CallWatcher", "PassFollower", "followed", "is_compiled", "watch"]

_SLOT = "_compiled_call_impl"

RAISED = object()
"""Stands for the output of a call that raised."""


class CallWatcher:
    """Told when the outermost call of a module in a watched tree begins and ends.

    It follows the calls of the thread that trains, and those in a backward pass, which may have a thread of its own. A
    call that evaluates in another thread meanwhile is left alone.

    Attributes:
        running: The module whose outermost call is running; None between calls.
        thread: The thread of that call.
        trains: Whether that call is one in training, with gradients on.
        training_thread: The thread of the last such call that was not in a backward pass; None before the first.
        steps_aside: Whether ``step_aside`` is to be asked about the calls inside the outermost one.
    """

    running: nn.Module | None = None
    thread: int | None = None
    trains = False
    training_thread: int | None = None
    steps_aside = False

    def follows(self, module: nn.Module) -> bool:
        """Return whether a call that begins now is to be followed, as an outermost one.

        Args:
            module: What is called.
        """
        trains = module.training and torch.is_grad_enabled()
        in_backward = torch._C._current_graph_task_id() != -1
        if self.running is not None:  # in another thread
            return trains and not in_backward and not self.trains
        return trains or in_backward or self.training_thread in (None, get_ident())

    def enter(self, module: nn.Module) -> None:
        """Note that a call begins that is to be followed.

        Args:
            module: What is called.
        """
        self.thread = get_ident()
        self.running = module
        self.trains = module.training and torch.is_grad_enabled()
        if self.trains and torch._C._current_graph_task_id() == -1:
            self.training_thread = self.thread

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a call begins.

        Args:
            module: What is called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note that a call is over; may be called twice where an interrupt hit the first time.

        Args:
            module: What was called.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            output: What it returned; ``RAISED`` where it raised.
        """

    def step_aside(self, module: nn.Module) -> Callable[[], None] | None:
        """Leave a call inside the outermost one alone, if it runs on other parameters than the module's own.

        Args:
            module: What is called.

        Returns:
            What ends this after the call; None if the call is as any other.
        """
        return None


class PassFollower(CallWatcher):
    """Gathers facts about the first pass from its calls, and drops them with it.

    Attributes:
        replaying: Whether the second pass is running. It is set from outside, and by ``clear``.
    """

    replaying: bool = False

    def gradients_cleared(self) -> None:
        """Note that gradients were cleared: a forward call from now on starts a new first pass."""

    def check_first_pass(self) -> None:
        """Raise ``RuntimeError`` if the first pass lacks what is needed of it; called before the weights move."""

    def check_second_pass(self) -> None:
        """Raise ``RuntimeError`` if the second pass did not repeat the first; called once the weights are back."""

    def clear(self) -> None:
        """Drop what was gathered, and set ``replaying`` to False."""
        self.replaying = False


class _WatchedCall:
    """Runs a module's call and tells its watchers; stands in the module's slot."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)  # the module holds this object: a strong reference would be a cycle
        self.inner: Callable[..., Any] | None = vars(module).get(_SLOT)  # of module.compile()
        self.watchers: tuple[CallWatcher, ...] = ()

    # nn.Module leaves the slot out of copies and pickles. RNNs, parametrized modules and other classes with a
    # __getstate__ of their own do not, and the copy would run the forward of the original. None is an empty slot.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, is_compiling = self.module(), torch.compiler.is_compiling()
        if not is_compiling:
            caller = sys._getframe(1).f_locals.get("self")  # of nn.Module.__call__
            if caller is not module and isinstance(caller, nn.Module) and vars(caller).get(_SLOT) is self:
                # A copy of the attributes of another module, as meta-learning packages and DataParallel make them.
                module = caller
        assert module is not None
        call = self.inner or module._call_impl
        if is_compiling:
            return call(*args, **kwargs)
        outermost, resume, thread = [], [], get_ident()
        for watcher in self.watchers:
            if watcher.running is None or watcher.thread != thread:
                if watcher.follows(module):
                    outermost.append(watcher)
            elif watcher.steps_aside and (end_aside := watcher.step_aside(module)) is not None:
                resume.append(end_aside)
        if outermost and _runs_on_fake_tensors():
            outermost = []
        if resume:
            try:
                return self._run(outermost, call, module, args, kwargs)
            finally:
                for end_aside in resume:
                    end_aside()
        if not outermost or runs_step_as_forward(module):
            return call(*args, **kwargs)
        return self._run(outermost, call, module, args, kwargs)

    def _run(
        self,
        outermost: list[CallWatcher],
        call: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a call that is the outermost one for some watchers."""
        output: Any = RAISED
        try:
            try:
                for watcher in outermost:
                    watcher.enter(module)
                    watcher.begin(module, args, kwargs)
                output = call(*args, **kwargs)
                return output
            finally:
                _end(outermost, module, args, kwargs, output)
        finally:
            if outermost:  # an interrupt hit the first one
                _end(outermost, module, args, kwargs, output)


def _runs_on_fake_tensors() -> bool:
    """Return whether the call only finds out shapes: ``torch.export`` of torch 2.4 makes one that does not compile."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _end(
    watchers: list[CallWatcher], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Tell every watcher that the call is over, innermost first."""
    while watchers:
        watcher = watchers[-1]
        if watcher.thread != get_ident():  # a call that trains, in another thread, has taken over
            watchers.pop()
            continue
        try:
            watcher.end(module, args, kwargs, output)
        except Exception:
            watcher.running = None
            watchers.pop()
            _end(watchers, module, args, kwargs, output)
            raise
        watcher.running = None  # before the pop: an interrupt between them only repeats this
        watchers.pop()


def watch(models: Iterable[nn.Module], watcher: CallWatcher, *, only_these: bool = False) -> Callable[[], None]:
    """Have a watcher told of the calls of every module in some models.

    Modules inside a compiled one and inside ``nn.DataParallel`` are not followed: they run as compiled code, or as
    copies. The outer module itself is.

    Args:
        models: The models.
        watcher: What is told. It is held by the modules, so it must not hold what keeps an optimizer alive.
        only_these: Follow the models themselves, and not the modules in them.

    Returns:
        A function that ends this; it may be called more than once.
    """
    calls: list[_WatchedCall] = []
    for module in list(models) if only_these else followed(models):
        call = vars(module).get(_SLOT)
        if not isinstance(call, _WatchedCall):
            call = _WatchedCall(module)
            vars(module)[_SLOT] = call  # not by setattr: OptimizedModule would pass it on to the module inside
        if watcher not in call.watchers:
            call.watchers = (*call.watchers, watcher)
            calls.append(call)

    def stop() -> None:
        for call in calls:
            call.watchers = tuple(each for each in call.watchers if each is not watcher)
            module = call.module()
            if module is None or call.watchers or vars(module).get(_SLOT) is not call:
                continue
            if call.inner is None:
                del vars(module)[_SLOT]
            else:
                vars(module)[_SLOT] = call.inner
        calls.clear()

    return stop


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is the wrapper of ``torch.compile``, or was compiled in place by ``module.compile()``.

    Args:
        module: Any module.
    """
    call = vars(module).get(_SLOT)
    if isinstance(call, _WatchedCall):
        call = call.inner
    return call is not None or "_orig_mod" in module._modules


def followed(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules in some models whose calls ``watch`` follows, each once.

    Args:
        models: The models.
    """
    found: dict[nn.Module, None] = {}
    pending = list(models)
    while pending:
        module = pending.pop()
        if module in found or isinstance(module, torch.jit.ScriptModule):
            continue
        found[module] = None
        if not isinstance(module, nn.DataParallel) and not is_compiled(module):
            pending.extend(child for child in module._modules.values() if child is not None)
    return list(found)
