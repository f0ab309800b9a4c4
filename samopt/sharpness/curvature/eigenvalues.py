"""The extreme eigenvalues of the loss's Hessian, or of its Gauss-Newton part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from samopt.sharpness._measuring.losses import Loss
from samopt.sharpness._measuring.measured_model import measuring
from samopt.sharpness._measuring.optional_packages import require
from samopt.sharpness._measuring.progress import ProgressOption
from samopt.sharpness._measuring.results import Result
from samopt.sharpness._measuring.seeds import stream
from samopt.sharpness._measuring.style import BLUE, GREY, ORANGE
from samopt.sharpness._measuring.weights import Selection
from samopt.sharpness.curvature.operators import Curvature, curvature, dot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Eigenvalues", "Solver", "WarmStart", "gauss_newton_eigenvalues", "hessian_eigenvalues"]

_WHICH = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
_SMALL = 32  # rows up to which the whole matrix is cheaper than an iteration
_RESTARTS = 300
_NOISE = 0.1
_WARM_BASIS = 6


@dataclass(frozen=True)
class Eigenvalues(Result):
    """What the eigenvalue measures return; ``value`` is the first eigenvalue.

    Attributes:
        values: The eigenvalues asked for: the largest first (for "smallest" the smallest, for "magnitude" the largest
            in magnitude).
        residuals: ``||A v - lambda v||`` for each, with ``||v|| = 1``: there is an eigenvalue within that distance.
        per_batch: ``v . H_b v`` for the first eigenvector and each batch's own matrix: their mean is ``value``, and the
            standard error is theirs, which to first order is that of the eigenvalue.
        threshold: Where the optimizer's stability ends, for ``preconditioned_eigenvalues``; otherwise None.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    per_batch: tuple[float, ...]
    threshold: float | None = None

    def draw(self, axes: Axes, *, label: str | None = None, color: str = BLUE) -> None:
        """Draw the eigenvalues along an axis, as a spectrum; with the stability threshold where there is one.

        Args:
            axes: Matplotlib axes to draw into.
            label: Name in the legend.
            color: Of the lines.
        """
        row = label or str(self.settings.get("model", ""))
        axes.errorbar(
            self.values, [row] * len(self.values), xerr=self.residuals, fmt="|", markersize=26, color=color, capsize=3
        )
        axes.annotate(f"{self.value:.4g}", (self.value, row), (0, 16), textcoords="offset points", ha="center")
        axes.axvline(0, color=GREY, linewidth=0.8)
        if self.threshold is not None:
            axes.axvline(self.threshold, color=ORANGE, linestyle="--", label=f"stable below {self.threshold:.4g}")
        axes.set_xlabel(f"{self.measure.replace('_', ' ')} (loss per squared unit of weight)")
        axes.margins(x=0.1, y=0.5)


class WarmStart:
    """Lets repeated measurements of a model in training start from the eigenvectors found last: fewer products.

    Give the same object to every call. It keeps one vector of the size of the weights in host memory. The first call,
    and one whose weights have another size, starts from a random vector.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(10, 10)
        >>> batch = torch.randn(64, 10), torch.randint(10, (64,))
        >>> start = sharpness.WarmStart()
        >>> costs = [
        ...     sharpness.hessian_eigenvalues(model, torch.nn.CrossEntropyLoss(), [batch], start=start).cost
        ...     for _ in range(2)
        ... ]
        >>> costs[1] < costs[0]
        True
    """

    def __init__(self) -> None:
        self._vector: Tensor | None = None

    def fits(self, like: Tensor) -> bool:
        """Return whether there is a vector of this size.

        Args:
            like: A vector.
        """
        return self._vector is not None and self._vector.shape == like.shape

    def mix_into(self, random: Tensor) -> Tensor:
        """Return the vector to start from.

        Args:
            random: A random vector, a little of which keeps the start from lying in a subspace that the matrix maps
                into itself.
        """
        assert self._vector is not None
        noise = random * (_NOISE / torch.linalg.vector_norm(random))
        mixed: Tensor = noise.add_(self._vector.to(random))
        return mixed

    def keep(self, vectors: Sequence[Tensor]) -> None:
        """Remember what was found.

        Args:
            vectors: Eigenvectors of norm 1.
        """
        total = torch.stack([vector.cpu() for vector in vectors]).sum(dim=0)
        self._vector = total / torch.linalg.vector_norm(total)


class Solution(NamedTuple):
    """Eigenvalues as ``Solver`` finds them."""

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    per_batch: tuple[float, ...]
    standard_error: float | None


@dataclass(frozen=True)
class Solver:
    """Finds extreme eigenpairs of a symmetric matrix by restarted Lanczos (scipy's ARPACK).

    Args:
        k: How many, >= 1.
        which: "largest", "smallest", or "magnitude".
        tolerance: Relative accuracy, > 0.
        basis: Lanczos vectors kept in host memory; None for the larger of ``2 k + 1`` and 20.
        seed: Decides the start.
        start: What is known from earlier, or None.

    Raises:
        ValueError: If an argument is out of range.
    """

    k: int
    which: str
    tolerance: float
    basis: int | None
    seed: int
    start: WarmStart | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")
        if self.which not in _WHICH:
            raise ValueError(f'which must be "largest", "smallest" or "magnitude", got {self.which!r}')
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be > 0, got {self.tolerance}")
        if self.basis is not None and self.basis <= self.k:
            raise ValueError(f"basis must be larger than k={self.k}, got {self.basis}; leave it out for the default")

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, for a result."""
        return {"k": self.k, "which": self.which, "tolerance": self.tolerance, "seed": self.seed}

    def solve(self, matrix: Curvature) -> Solution:
        """Return the eigenvalues, the residual of each, and what the first one is made of.

        Args:
            matrix: The matrix.

        Raises:
            RuntimeError: If they do not converge.
            ValueError: If there are fewer.
        """
        if self.k > matrix.size:
            raise ValueError(f"k must be at most {matrix.size}, the number of weights, got {self.k}")
        if matrix.size <= max(_SMALL, 2 * self.k + 1):
            values, vectors = self._decompose(matrix)
        else:
            values, vectors = self._iterate(matrix)
        order = sorted(range(len(values)), key=lambda i: self._rank(values[i]))[: self.k]
        quotients: list[float] = []
        residuals = []
        for i in order:
            product = matrix(vectors[i], quotients if i == order[0] else None)
            residuals.append(float(torch.linalg.vector_norm(product - values[i] * vectors[i])))
        if self.start is not None:
            self.start.keep([vectors[i] for i in order])
        error = matrix.standard_error(quotients)
        return Solution(tuple(values[i] for i in order), tuple(residuals), tuple(quotients), error)

    def _rank(self, value: float) -> float:
        return {"largest": -value, "smallest": value, "magnitude": -abs(value)}[self.which]

    def _decompose(self, matrix: Curvature) -> tuple[list[float], list[Tensor]]:
        """Form the matrix, column by column."""
        identity = torch.eye(matrix.size, device=matrix.device, dtype=matrix.dtype)
        columns = torch.stack([matrix(row) for row in identity])
        values, vectors = torch.linalg.eigh((columns + columns.T).div_(2))
        return values.tolist(), list(vectors.T)

    def _iterate(self, matrix: Curvature) -> tuple[list[float], list[Tensor]]:
        linalg = require("scipy.sparse.linalg", "an eigenvalue")

        def to_matrix(vector: Any) -> Tensor:
            return torch.as_tensor(vector.reshape(-1).copy(), device=matrix.device, dtype=matrix.dtype)

        generator = stream(matrix.device, "lanczos", self.seed)
        start = torch.randn(matrix.size, generator=generator, device=matrix.device, dtype=matrix.dtype)
        basis = self.basis
        if self.start is not None and self.start.fits(start):
            start = self.start.mix_into(start)
            basis = basis or max(2 * self.k + 1, _WARM_BASIS)  # the search checks itself once its basis is full
        host = start.cpu().numpy()
        values: list[float] = []
        vectors: list[Tensor] = []

        def multiply(vector: Any) -> Any:
            given = to_matrix(vector)
            product = matrix(given)
            # What was found goes to the other end of the spectrum.
            far = {"largest": 1, "smallest": -1, "magnitude": 0}[self.which] * max(map(abs, values), default=0.0)
            for value, known in zip(values, vectors, strict=True):
                product.sub_(known, alpha=(value + far) * dot(known, given))
            return product.cpu().numpy()

        def search(count: int, begin: Any) -> tuple[list[float], list[Tensor]]:
            operator = linalg.LinearOperator((matrix.size, matrix.size), matvec=multiply, dtype=host.dtype)
            try:
                found, columns = linalg.eigsh(
                    operator,
                    k=count,
                    which=_WHICH[self.which],
                    v0=begin,
                    ncv=None if basis is None else min(basis, matrix.size),
                    tol=self.tolerance,
                    maxiter=_RESTARTS,
                )
            except linalg.ArpackError as error:
                shown = ", ".join(f"{value:.4g}" for value in getattr(error, "eigenvalues", ()))
                raise RuntimeError(
                    f"the {self.k} {self.which} eigenvalues did not converge to tolerance={self.tolerance:g} (found: "
                    f"{shown or 'none'}); use a larger tolerance or a larger basis"
                ) from error
            return found.tolist(), [to_matrix(columns[:, i]) for i in range(columns.shape[1])]

        values, vectors = search(self.k, host)
        # One start vector meets one vector of each eigenspace, so the search may miss some of an eigenvalue that occurs
        # several times: each output of a regression has the same curvature. Look on until what is left ranks lower.
        while self.k > 1 and any(values) and len(values) < matrix.size - 1:
            last = sorted(values, key=self._rank)[self.k - 1]
            again = torch.randn(matrix.size, generator=generator, device=matrix.device, dtype=matrix.dtype)
            (more,), (direction,) = search(1, again.cpu().numpy())
            if self._rank(more) >= self._rank(last) - 2 * self.tolerance * abs(last):
                break
            values, vectors = [*values, more], [*vectors, direction]
        return values, vectors


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    k: int = 1,
    which: str = "largest",
    tolerance: float = 1e-3,
    basis: int | None = None,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    start: WarmStart | None = None,
    progress: ProgressOption = None,
) -> Eigenvalues:
    """Return the extreme eigenvalues of the Hessian of the mean loss over all batches.

    The largest is ``max of v . H v over ||v||_2 = 1``: the curvature along the one worst direction. At a minimum
    the worst case is ``rho^2 / 2`` times it, to second order. The eigenvalues come from scipy's ARPACK, a restarted
    Lanczos iteration. Attention kernels without second derivatives are replaced; RNN kernels without them, and a
    custom ``autograd.Function`` that is marked ``once_differentiable``, are an error.

    Misleads: it changes when weights are rescaled, also where the function does not. Well into training
    cross-entropy's Hessian shrinks towards 0 because the loss does, so models that fit better look flatter.

    Cost: about 3.5 gradients a batch for each matrix-vector product; the largest eigenvalue takes 20 to 60 of them,
    the smallest often more, and ``k > 1`` as many again to make sure that no eigenvalue which occurs twice was
    missed. Memory: about four copies of the weights, and on the host ``basis + 4`` vectors of their size.

    Args:
        model: The model; it comes back bit for bit.
        loss_fn: ``loss_fn(model, batch) -> scalar``, or a torch loss such as ``nn.CrossEntropyLoss()``.
        batches: Batches; read once and kept. Means weigh examples.
        k: How many eigenvalues, >= 1.
        which: "largest", "smallest" (the most negative), or "magnitude".
        tolerance: Relative accuracy, > 0.
        basis: Lanczos vectors; fewer take less memory and more products. None for the larger of ``2 k + 1`` and 20.
        parameters: Names or patterns: the block of the Hessian to look at; None for every trainable parameter.
        mode: "eval", "train", or "keep".
        seed: Decides the start vector.
        start: What earlier measurements of this model found, see ``WarmStart``.
        progress: See ``ProgressOption``.

    Returns:
        The eigenvalues, each with a bound on its error.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        RuntimeError: If the iteration does not converge, or an operation has no second derivative.
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (torch.tensor([1.0, 2.0, 3.0]) * model.weight**2).sum() / 2
        >>> [round(value, 4) for value in sharpness.hessian_eigenvalues(model, loss_fn, [None], k=2).values]
        [3.0, 2.0]
    """
    return _eigenvalues(
        "hessian", model, loss_fn, batches, Solver(k, which, tolerance, basis, seed, start), parameters, mode, progress
    )


def gauss_newton_eigenvalues(
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    k: int = 1,
    which: str = "largest",
    tolerance: float = 1e-3,
    basis: int | None = None,
    parameters: Selection = None,
    mode: str = "eval",
    seed: int = 0,
    start: WarmStart | None = None,
    progress: ProgressOption = None,
) -> Eigenvalues:
    """Return the extreme eigenvalues of the Gauss-Newton matrix ``mean of J^T H_L J`` over all batches.

    It is the Hessian without the curvature of the model itself, and has no negative eigenvalue where the loss is convex
    in the model's outputs. For cross-entropy it is the Fisher information matrix.

    ``J`` is the Jacobian of the model's outputs, ``H_L`` the loss's Hessian with respect to them.

    Misleads: it does not see the model's own curvature, nor penalties on the weights inside ``loss_fn``.

    Cost: about 3 gradients a batch for each product; otherwise as ``hessian_eigenvalues``.

    Args:
        model: The model; returns a tensor, or an output with ``logits``.
        loss_fn: ``loss_fn(model, batch) -> scalar``; calls the model.
        batches: As for ``hessian_eigenvalues``.
        k: As for ``hessian_eigenvalues``.
        which: As for ``hessian_eigenvalues``.
        tolerance: As for ``hessian_eigenvalues``.
        basis: As for ``hessian_eigenvalues``.
        parameters: As for ``hessian_eigenvalues``.
        mode: As for ``hessian_eigenvalues``.
        seed: As for ``hessian_eigenvalues``.
        start: As for ``hessian_eigenvalues``.
        progress: As for ``hessian_eigenvalues``.

    Returns:
        The eigenvalues, each with a bound on its error.

    Raises:
        ModuleNotFoundError: If scipy is not installed.
        RuntimeError: If the iteration does not converge, or an operation has no second derivative.
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from samopt import sharpness
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return model(batch).square().sum() / 2
        >>> round(sharpness.gauss_newton_eigenvalues(model, loss_fn, [torch.tensor([[3.0, 4.0]])]).value, 4)  # |x|^2
        25.0
    """
    return _eigenvalues(
        "gauss_newton",
        model,
        loss_fn,
        batches,
        Solver(k, which, tolerance, basis, seed, start),
        parameters,
        mode,
        progress,
    )


def _eigenvalues(
    matrix: str,
    model: nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    solver: Solver,
    parameters: Selection,
    mode: str,
    progress: ProgressOption,
) -> Eigenvalues:
    name = f"{matrix}_eigenvalues"
    with measuring(
        model,
        loss_fn,
        batches,
        name=name.replace("_", " "),
        parameters=parameters,
        mode=mode,
        progress=progress,
    ) as measured:
        found = solver.solve(curvature(measured, matrix))
        cost = measured.progress.cost
    return Eigenvalues(
        measure=name,
        value=found.values[0],
        standard_error=found.standard_error,
        cost=cost,
        settings={**solver.settings, **measured.settings},
        values=found.values,
        residuals=found.residuals,
        per_batch=found.per_batch,
    )
