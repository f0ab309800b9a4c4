"""Autograd Functions of Python whose own backward cannot be differentiated again, so that curvature misses their part.

A fused loss computes its gradient in the forward, and a fused layer runs kernels in its backward. Both train as they
should. A second derivative takes what they return for a constant, and nothing says so: the largest eigenvalue of a
small classifier was half of its true value.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from samopt.sharpness._measuring.optimizer_parts import graph_nodes
from samopt.sharpness._measuring.seeds import stream

__all__ = ["custom_functions_checked"]

_IDENTITY = "BackwardHookFunction"  # what torch puts around a module with backward hooks
# The wrapper that the decorator makes has the same code around every function. Where the gradient that comes in is a
# constant, torch takes such a backward for one, too, and raises nothing.
_MARKED_ONCE = once_differentiable(lambda ctx: None).__code__


@contextmanager
def custom_functions_checked(outputs: Sequence[Tensor]) -> Generator[None]:
    """Look at every custom function that runs its backward in this context, which builds a graph.

    Args:
        outputs: What is differentiated; their graphs are looked through.

    Raises:
        RuntimeError: If a backward does not depend on the gradient that comes in, as far as autograd can tell, or is
            marked ``once_differentiable``.
    """
    nodes = _custom_nodes(outputs)
    opaque = {_name_of(node) for node in nodes if _is_marked_once(node)}
    constant: set[str] = set()
    handles = [node.register_hook(partial(_look_at, node, opaque, constant)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if opaque:
        raise RuntimeError(
            f"curvature needs second derivatives, but the backward of {_listed(opaque)} computes them in a way that "
            "autograd does not see, so their part would count as 0; use the plain implementation of it (without fused "
            "kernels, such as Liger's), or a measure without curvature: worst_case, average_case"
        )
    if constant:
        warnings.warn(
            f"the backward of {_listed(constant)} does not depend on its input, as far as autograd can tell, so its "
            "own curvature counts as 0; that is right for a linear function alone: use the plain implementation of a "
            "fused loss, which computes its gradient in the forward",
            stacklevel=2,
        )


def _look_at(
    node: Any, opaque: set[str], constant: set[str], gradients: Sequence[Any], incoming: Sequence[Tensor | None]
) -> None:
    """Run a function's backward once more, with random gradients: those that came in may be 0."""
    leaves = [None if each is None else _drawn_like(each).requires_grad_() for each in incoming]
    try:
        with torch.enable_grad():
            if not _has_graph(node.apply(*leaves)):
                opaque.add(_name_of(node))
            elif not _has_graph(node.apply(*(None if leaf is None else leaf.detach() for leaf in leaves))):
                constant.add(_name_of(node))
    except Exception:  # one that drops what it has used cannot run again, and so tells nothing
        constant.add(_name_of(node))


def _is_marked_once(node: Any) -> bool:
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _MARKED_ONCE


def _drawn_like(tensor: Tensor) -> Tensor:
    generator = stream(tensor.device, "custom functions")
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)


def _has_graph(returned: Any) -> bool:
    """Return whether gradients have a derivative, or need none: there are none, or all are 0."""
    parts = [part for part in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(part, Tensor)]
    return any(part.requires_grad for part in parts) or not any(part.count_nonzero() for part in parts)


def _custom_nodes(outputs: Sequence[Tensor]) -> list[Any]:
    nodes = graph_nodes(outputs)
    return [node for node in nodes if isinstance(node, BackwardCFunction) and _name_of(node) != _IDENTITY]


def _name_of(node: Any) -> str:
    return type(node).__name__.removesuffix("Backward")


def _listed(names: set[str]) -> str:
    return " and ".join(sorted(names))
