"""Keep the engine out of what ``torch.compile`` compiles, and tell whether compiled code is the caller."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

import torch._compile

__all__ = ["is_called_from_compiled", "never_compiled"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def never_compiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that runs as it is written, with all it calls, where a compiled function calls it.

    Compiling the engine would take seconds, gain nothing, and not be right: it swaps memory and random states. What was
    compiled apart (the model, the loss) runs compiled inside it all the same.

    Args:
        function: A function of the engine.
    """
    return torch._compile._disable_dynamo(function)  # the public form imports the compiler with samopt


def is_called_from_compiled() -> bool:
    """Return whether some caller was compiled, so that what it ran before could not be followed.

    Code after a graph break runs as it is written, where torch does not say that it belongs to a compiled function, so
    the call stack is asked.
    """
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    frame: FrameType | None = sys._getframe(1)
    while compiler is not None and frame is not None:
        if frame.f_globals is vars(compiler) and frame.f_code.co_name == "compile_wrapper":
            return True
        frame = frame.f_back
    return False
