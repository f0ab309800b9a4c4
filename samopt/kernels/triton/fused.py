"""Restore and base step in one pass over memory, for torch's SGD, Adam and AdamW."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from samopt._callers.cuda_graphs import is_capturing
from samopt.kernels.memory import lie_alike, note_writes
from samopt.kernels.triton import base_steps
from samopt.kernels.triton.availability import interprets
from samopt.kernels.triton.launch import BLOCK, DTYPES, OPTIONS, Way, on, restore
from samopt.kernels.triton.tables import CHUNK, addresses_of, count_chunks, pointer_table

__all__ = ["restore_and_step"]


@dataclass(frozen=True)
class _Launch:
    """Tensors of one dtype and group that step alike."""

    kernel: Any
    weights: list[Tensor]
    gradients: list[Tensor]
    states: list[list[Tensor]]
    counters: list[Tensor]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]


def restore_and_step(base: Optimizer, ways: Sequence[Way]) -> bool:
    """Put the weights back and take the base's step, in one launch for each dtype and parameter group.

    States are made, named and counted by the base itself. Weights that the base does not step are put back only.

    Args:
        base: An optimizer whose class is SGD, Adam or AdamW.
        ways: The ways back of everything that has moved.

    Returns:
        Whether it was done; where a tensor has no such form, nothing is, and the caller restores and steps in turn.

    Raises:
        RuntimeError: If a graph is being captured and the base counts its steps on the host.
    """
    marks = {
        id(weight): (room, mark)
        for way in ways
        for weight, room, mark in zip(way.weights, way.rooms, _marks_of(way), strict=True)
    }
    moved = [weight for way in ways for weight in way.weights if weight.numel()]
    if len({weight.untyped_storage().data_ptr() for weight in moved}) < len(moved):
        return False  # of weights that share memory, the later one's backup holds what the earlier one moved to
    gradients = [(p, p.grad) for group in base.param_groups for p in group["params"] if p.grad is not None]
    if not all(_is_plain(p, g) for p, g in gradients) or _is_scaled(base):
        return False
    launches = [launch for group in base.param_groups for launch in _launches(base, group)]
    if not all(
        _is_plain(p, state)
        for launch in launches
        for states in launch.states
        for p, state in zip(launch.weights, states, strict=True)
    ):
        return False  # as after loading a checkpoint of another memory format
    counters = [counter for launch in launches for counter in launch.counters]
    if counters:
        torch._foreach_add_(counters, 1)
    for launch in launches:
        _run(launch, marks)
        if launch.kernel is base_steps.sgd_chunk:
            for states in launch.states:
                for p, buffer in zip(launch.weights, states, strict=True):
                    base.state[p]["momentum_buffer"] = buffer
    stepped = {id(p) for p, _ in gradients}
    for way in ways:
        if any(id(weight) not in stepped for weight in way.weights):
            restore(way)  # only what is still marked
    return True


def _launches(base: Optimizer, group: dict[str, Any]) -> Iterator[_Launch]:
    return _sgd_launches(base, group) if isinstance(base, SGD) else _adam_launches(base, group)


def _sgd_launches(base: Any, group: dict[str, Any]) -> Iterator[_Launch]:
    weights: list[Tensor] = []
    gradients: list[Tensor] = []
    momenta: list[Tensor | None] = []
    base._init_group(group, weights, gradients, momenta)
    momentum, rate = group["momentum"], group["lr"]
    buffers = momenta or [None] * len(weights)
    for indices in _alike([(p.dtype, p.device, b is None) for p, b in zip(weights, buffers, strict=True)]):
        first = buffers[indices[0]] is None
        states = []
        if momentum != 0:
            states = [[torch.empty_like(weights[i].detach()) if (b := buffers[i]) is None else b for i in indices]]
        yield _Launch(
            base_steps.sgd_chunk,
            [weights[i] for i in indices],
            [gradients[i] for i in indices],
            states,
            [],
            (*_rate(rate), float(momentum), 1.0 - group["dampening"], float(group["weight_decay"])),
            {
                "ON_DEVICE": _is_on_device(rate),
                "MOMENTUM": momentum != 0,
                "FIRST": first,
                "NESTEROV": bool(group["nesterov"]),
                "DECAY": group["weight_decay"] != 0,
                "MAXIMIZE": bool(group["maximize"]),
            },
        )


def _adam_launches(base: Any, group: dict[str, Any]) -> Iterator[_Launch]:
    lists: list[list[Tensor]] = [[] for _ in range(6)]
    base._init_group(group, *lists)
    weights, gradients, first, second, largest, steps = lists
    counted = bool(group["capturable"] or group["fused"])
    if not counted and any(map(is_capturing, {weight.device for weight in weights})):
        raise RuntimeError(
            f"a graph is being captured, but this {type(base).__name__} counts its steps on the host, so every replay "
            "would be the same step; make it with capturable=True"
        )
    beta1, beta2 = (float(beta) for beta in group["betas"])
    decay = "decoupled" if group.get("decoupled_weight_decay", isinstance(base, AdamW)) else "l2"
    for indices in _alike(
        [(p.dtype, p.device, 0.0 if counted else float(s)) for p, s in zip(weights, steps, strict=True)]
    ):
        states = [[state[i] for i in indices] for state in ((first, second, largest) if largest else (first, second))]
        counters = [steps[i] for i in indices]
        number = 0.0 if counted else float(counters[0]) + 1
        yield _Launch(
            base_steps.adam_chunk,
            [weights[i] for i in indices],
            [gradients[i] for i in indices],
            states,
            counters,
            (
                *_rate(group["lr"]), beta1, beta2, _log(beta1), _log(beta2), number,
                float(group["weight_decay"]), float(group["eps"]),
            ),
            {
                "ON_DEVICE": _is_on_device(group["lr"]),
                "COUNTED": counted,
                "AMSGRAD": bool(group["amsgrad"]),
                "DECAY": decay if group["weight_decay"] != 0 else "none",
                "MAXIMIZE": bool(group["maximize"]),
            },
        )  # fmt: skip


def _run(launch: _Launch, marks: dict[int, tuple[Tensor, int]]) -> None:
    weights = launch.weights
    device, width = weights[0].device, weights[0].element_size()
    sources = [marks[id(w)][0] if id(w) in marks else w for w in weights]
    own_marks = tuple(marks[id(w)][1] if id(w) in marks else 0 for w in weights)
    rows = [addresses_of(weights), addresses_of(sources), addresses_of(launch.gradients), own_marks]
    strides = [CHUNK * width] * 3 + [8]
    for state in launch.states:
        rows.append(addresses_of(state))
        strides.append(CHUNK * width)
    if launch.constants.get("COUNTED"):
        rows.append(addresses_of(launch.counters))
        strides.append(0)
    table = pointer_table(tuple(rows), tuple(strides), tuple(w.numel() for w in weights), device)
    if not table.chunks:
        return
    with on(device):
        launch.kernel[(table.chunks,)](
            table.data, table.chunks, *launch.numbers,
            DTYPE=DTYPES[weights[0].dtype], **launch.constants, INTERPRETED=interprets(), BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    note_writes(weights)


def _marks_of(way: Way) -> Iterator[int]:
    """Yield where the first chunk of each weight has its mark."""
    at = way.written.data_ptr()
    for weight in way.weights:
        yield at
        at += 8 * count_chunks([weight.numel()])


def _alike(keys: Sequence[Any]) -> list[list[int]]:
    """Return the indices of equal keys together."""
    together: dict[Any, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        together[key].append(index)
    return list(together.values())


def _is_plain(parameter: Tensor, gradient: Tensor) -> bool:
    return (
        type(gradient) is Tensor
        and gradient.layout is torch.strided
        and parameter.dtype in DTYPES
        and gradient.dtype is parameter.dtype
        and gradient.device == parameter.device
        and lie_alike(parameter.detach(), gradient)
    )


def _is_scaled(base: Optimizer) -> bool:
    """Return whether a ``GradScaler`` left its scale for the base to divide by."""
    return getattr(base, "grad_scale", None) is not None or getattr(base, "found_inf", None) is not None


def _rate(rate: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, rate) if _is_on_device(rate) else (float(rate), None)  # type: ignore[return-value]  # as asked


def _is_on_device(rate: float | Tensor) -> bool:
    return isinstance(rate, Tensor) and (rate.device.type != "cpu" or interprets())


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
