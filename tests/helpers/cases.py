"""The tables that drive the tests, and the independent oracles that they are held against.

A new optimizer joins every conformance test by adding a row to ``VARIANTS``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samopt

Epsilon = Callable[[Sequence[Tensor], Sequence[Tensor | None], Sequence[float]], list[Tensor]]
Textbook = Callable[[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]], Tensor]
"""One step of a stock base by a paper's algorithm; returns the loss that the wrapper's ``step`` returns."""


@dataclass(frozen=True)
class Variant:
    """A sharpness-aware optimizer with the fp64 formula of its perturbation."""

    name: str
    wrap: Callable[..., samopt.SharpnessAwareOptimizer]
    epsilon: Epsilon
    rho: float
    scale_invariant: bool = True
    """Whether a multiple of the gradient gives the same perturbation, as it meets under a ``GradScaler``."""

    def textbook(self) -> Textbook:
        """The paper's loop."""
        return functools.partial(textbook_step, epsilon=self.epsilon)


def in_fp64(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients in fp64, zeros where there is none."""
    return [
        torch.zeros_like(w, dtype=torch.float64) if g is None else g.double()
        for w, g in zip(weights, gradients, strict=True)
    ]


def sam_epsilon(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rhos: Sequence[float]) -> list[Tensor]:
    """``rho g / ||g||`` in fp64 (Foret et al. 2021, equation 2)."""
    wide = in_fp64(weights, gradients)
    norm = sum(float((g * g).sum()) for g in wide) ** 0.5
    return [rho * g / norm if norm > 0 else g for g, rho in zip(wide, rhos, strict=True)]


def asam_epsilon(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rhos: Sequence[float], eta: float = 0.01
) -> list[Tensor]:
    """``rho T^2 g / ||T g||`` in fp64 with ``T = |w| + eta``, and 1 where dim <= 1 (Kwon et al. 2021, algorithm 1)."""
    wide = in_fp64(weights, gradients)
    lengths = [w.double().abs() + eta if w.dim() > 1 else torch.ones_like(w, dtype=torch.float64) for w in weights]
    norm = sum(float(((t * g) ** 2).sum()) for t, g in zip(lengths, wide, strict=True)) ** 0.5
    return [rho * t * t * g / norm if norm > 0 else g for t, g, rho in zip(lengths, wide, rhos, strict=True)]


def fisher_epsilon(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rhos: Sequence[float], eta: float = 0.1
) -> list[Tensor]:
    """``rho F^-1 g / sqrt(g F^-1 g)`` in fp64 with ``F = 1 + eta g^2`` (Kim et al. 2022, algorithm 1)."""
    wide = in_fp64(weights, gradients)
    natural = [g / (1 + eta * g * g) for g in wide]
    norm = sum(float((g * n).sum()) for g, n in zip(wide, natural, strict=True)) ** 0.5
    return [rho * n / norm if norm > 0 else n for n, rho in zip(natural, rhos, strict=True)]


DISTANCE = 0.75  # what the trust region of the table's TRAM answers


def tram(params: Any, base_optimizer: Any = None, *, rho: float = 1.0, **options: Any) -> samopt.TRAM:
    """TRAM in a trust region of constant distance, where it has ASAM's formula."""
    distance = functools.partial(torch.tensor, DISTANCE, dtype=torch.float64)
    return samopt.TRAM(params, base_optimizer, scale=rho, trust_region=distance, **options)


def tram_epsilon(weights: Sequence[Tensor], gradients: Sequence[Tensor | None], rhos: Sequence[float]) -> list[Tensor]:
    """``d T^2 g / ||T g||`` in fp64 with ASAM's ``T`` (Sherborne et al. 2024, equation 7)."""
    return asam_epsilon(weights, gradients, [rho * DISTANCE for rho in rhos])


VARIANTS = [
    Variant("sam", samopt.SAM, sam_epsilon, 0.05),
    Variant("asam", samopt.ASAM, asam_epsilon, 0.5),
    Variant("fisher", samopt.FisherSAM, fisher_epsilon, 0.1, scale_invariant=False),
    Variant("tram", tram, tram_epsilon, 0.6),
]


@dataclass(frozen=True)
class Preset:
    """An optimizer whose step is more than a perturbation, with its paper's loop in fp64."""

    name: str
    wrap: Callable[..., samopt.SharpnessAwareOptimizer]
    textbook: Callable[[], Textbook]
    """Makes a stepper with a memory of its own."""
    rho: float
    needs_model: bool = False
    without: tuple[str, ...] = ()
    """Those of ``BASES`` that it does not work with."""

    @property
    def usual_base(self) -> str:
        """The name of a base with a state that it works with."""
        return "adamw" if "sgd-momentum" in self.without else "sgd-momentum"


BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "sgd-momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}

DTYPES = [torch.float32, torch.bfloat16]

STATEFUL = ["sgd-momentum", "adamw", "adamw-fused"]  # those of BASES that a checkpoint must carry something for

# Largest difference, relative to the update's own size, that one rounding per operation explains.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 2e-6, "atol": 2e-7},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
}


def mlp(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A small classifier without randomness or buffers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def norms() -> nn.Sequential:
    """BatchNorm (one without a fixed momentum), dropout and three classes; not seeded."""
    return nn.Sequential(
        nn.Linear(6, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8, momentum=None),
        nn.Linear(8, 3),
    )


def rhos_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each parameter's number for the radius: ``rho``, or ``scale`` in the groups of a TRAM."""
    return [
        group["rho"] if "rho" in group else group["scale"] for group in optimizer.param_groups for _ in group["params"]
    ]


def batch(dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs ``(size, 6)`` and labels ``(size,)``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator).to(dtype)
    return x, torch.randint(3, (size,), generator=generator)


def parameter_groups(model: nn.Module, rhos: Sequence[float]) -> list[dict[str, Any]]:
    """One group with the first of ``rhos``, or two (weights, biases) with a ``rho`` each."""
    parameters = list(model.parameters())
    if len(rhos) == 1:
        return [{"params": parameters} | radius(rhos[0])]
    return [
        {"params": [p for p in parameters if p.dim() > 1]} | radius(rhos[0]),
        {"params": [p for p in parameters if p.dim() <= 1]} | radius(rhos[1]),
    ]


def radius(rho: float) -> dict[str, float]:
    """A group's number for the radius under each name that a variant may read it by."""
    return {"rho": rho, "scale": rho, "budget": rho}


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy in fp32."""
    return nn.functional.cross_entropy(model(data[0]).float(), data[1])


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """A closure by torch's contract."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, data)
        loss.backward()
        return loss

    return closure


def textbook_step(
    model: nn.Module,
    base: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    epsilon: Epsilon,
) -> Tensor:
    """One sharpness-aware step in plain torch around a stock base; each group's ``rho`` is the radius.

    Returns:
        The first pass's loss.
    """

    def backward() -> Tensor:
        loss = loss_of(model, data)
        loss.backward()
        return loss

    first, _ = second_gradient(parameters_of(base), backward, epsilon, rhos_of(base))
    base.step()
    return first


def bits(model: nn.Module) -> list[Tensor]:
    """Copies of every parameter, to compare with ``torch.equal``."""
    return [p.detach().clone() for p in model.parameters()]


def same_bits(model: nn.Module, before: Sequence[Tensor]) -> bool:
    """Whether every parameter holds exactly the values of ``before``."""
    return all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def second_gradient(
    parameters: Sequence[Tensor], backward: Callable[[], Tensor], epsilon: Epsilon, radius: float | list[float]
) -> tuple[Tensor, Tensor]:
    """Leave the gradient at ``w + epsilon`` in ``.grad`` and ``w`` as it was: both passes of the textbook, plain torch.

    ``backward`` computes the loss of the whole batch, calls backward, however often, and returns the loss. The radius
    is one for all parameters, or a list with each one's.

    Returns:
        Both passes' losses.
    """
    for p in parameters:
        p.grad = None
    first = backward()
    saved = [p.detach().clone() for p in parameters]
    gradients = [p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad for p in parameters]
    moves = epsilon(saved, gradients, radius if isinstance(radius, list) else [radius] * len(saved))
    with torch.no_grad():
        for p, move in zip(parameters, moves, strict=True):
            p.copy_(p.double() + move)
            p.grad = None
    second = backward()
    with torch.no_grad():
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)
    return first.detach(), second.detach()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of every group, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def general_epsilon(parameters: Sequence[Tensor], rhos: Sequence[float], eta: float | None) -> list[Tensor]:
    """``rho T^2 g / ||T g||`` in fp64 from the gradients, sparse and complex ones too; ``eta=None`` is SAM."""
    with torch.no_grad():
        wide = [torch.complex128 if p.is_complex() else torch.float64 for p in parameters]
        gradients = [
            torch.zeros_like(p, dtype=kind) if p.grad is None else p.grad.to_dense().to(kind)
            for p, kind in zip(parameters, wide, strict=True)
        ]
        one = torch.ones((), dtype=torch.float64)
        lengths = [p.to(k).abs() + eta if eta and p.dim() > 1 else one for p, k in zip(parameters, wide, strict=True)]
        norm = sum(float((t * g).abs().square().sum()) for t, g in zip(lengths, gradients, strict=True)) ** 0.5
        return [rho * t * t * g / (norm or 1) for rho, t, g in zip(rhos, lengths, gradients, strict=True)]


def two_pass_step(
    base: torch.optim.Optimizer,
    passes: Sequence[Callable[[], Tensor]],
    rhos: Sequence[float | None],
    eta: float | None,
) -> None:
    """A two-pass step in plain torch around a stock base.

    ``passes`` are the losses of the two passes; ``rhos`` holds each parameter's radius, None to leave it out.
    """
    parameters = [p for group in base.param_groups for p in group["params"]]
    base.zero_grad()
    passes[0]().backward()
    saved = [p.detach().clone() for p in parameters]
    moving = [(p, rho) for p, rho in zip(parameters, rhos, strict=True) if rho is not None]
    steps = general_epsilon([p for p, _ in moving], [rho for _, rho in moving], eta)
    with torch.no_grad():
        for (p, _), step in zip(moving, steps, strict=True):
            p.copy_(p + step)
    base.zero_grad()
    passes[1]().backward()
    with torch.no_grad():
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)
    base.step()


def wrapped_step(optimizer: samopt.SharpnessAwareOptimizer, passes: Sequence[Callable[[], Tensor]], form: str) -> int:
    """The same step through the wrapper, as "closure" or "explicit"; returns the number of passes made."""
    optimizer.zero_grad()
    if form == "explicit":
        passes[0]().backward()
        with optimizer.perturbed():
            passes[1]().backward()
        optimizer.step()
        return 2
    made: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        made.append(passes[len(made)]())
        made[-1].backward()
        return made[-1]

    optimizer.step(closure)
    return len(made)


def tensors(*shapes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Normal parameters of these shapes; the same values in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def linear(parameters: Sequence[Tensor], *slopes: Tensor | None) -> Callable[[], Tensor]:
    """A loss with the gradients ``slopes``; None leaves that parameter without one."""
    return lambda: sum((p * s).sum() for p, s in zip(parameters, slopes, strict=True) if s is not None)


def curved(parameters: Sequence[Tensor], used: Sequence[int]) -> Callable[[], Tensor]:
    """A loss with curvature in those parameters that are ``used``."""
    return lambda: sum(((p**2).sum() + p.sum()).sin() for p, use in zip(parameters, used, strict=True) if use)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps of the closure form, each from its own batch and random stream."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        torch.manual_seed(step)
        optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))


def assert_same(got: Any, want: Any) -> None:
    """Equality of nested state dicts, tensors bit for bit."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    elif isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
    else:
        assert got == want or (got != got and want != want)  # nan is the same as nan


def assert_shared(optimizer: samopt.SharpnessAwareOptimizer) -> None:
    """Whether groups, state and defaults are the base's own objects, not copies."""
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.defaults is optimizer.base_optimizer.defaults


def closure_form(optimizer: torch.optim.Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """One step of the closure form."""
    optimizer.step(closure_of(optimizer, model, data))


def keyword_closure_form(optimizer: torch.optim.Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """One step of the closure form, with the closure by keyword."""
    optimizer.step(closure=closure_of(optimizer, model, data))


def explicit_form(optimizer: samopt.SharpnessAwareOptimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """One step of the explicit form."""
    optimizer.zero_grad()
    loss_of(model, data).backward()
    with optimizer.perturbed():
        loss_of(model, data).backward()
    optimizer.step()


def two_step_form(optimizer: samopt.SharpnessAwareOptimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """One step as the widely used SAM script writes it."""
    optimizer.zero_grad()
    loss_of(model, data).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, data).backward()
    optimizer.second_step(zero_grad=True)


FORMS: dict[str, Callable[..., None]] = {
    "closure": closure_form,
    "closure=": keyword_closure_form,
    "explicit": explicit_form,
    "first_step/second_step": two_step_form,
}


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    """Equality of fp64 parameters up to the rounding of their operations."""
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])


def plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the identities of their parameters instead of the parameters."""
    return [{**group, "params": [id(p) for p in group["params"]]} for group in groups]


@contextmanager
def refused(
    match: str, model: nn.Module, base: torch.optim.Optimizer, error: Any = (RuntimeError, ValueError, TypeError)
) -> Generator[None]:
    """The block raises with this message, and weights, gradients, state, groups and random streams stay."""
    base = getattr(base, "base_optimizer", base)
    weights, gradients = bits(model), [None if p.grad is None else (p.grad, p.grad.clone()) for p in model.parameters()]
    state, groups, group_list = copy.deepcopy(base.state_dict()), plain(base.param_groups), base.param_groups
    training, stream = model.training, torch.get_rng_state()
    with pytest.raises(error, match=match):
        yield
    assert same_bits(model, weights)
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or (parameter.grad is before[0] and torch.equal(before[0], before[1]))
    assert_same(base.state_dict(), state)
    assert plain(base.param_groups) == groups
    assert base.param_groups is group_list
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), stream)
