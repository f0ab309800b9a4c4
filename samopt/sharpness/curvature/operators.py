"""Products of the loss's curvature matrices with vectors, never forming the matrix."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samopt._numerics.low_precision import widen
from samopt.sharpness._measuring.measured_model import MeasuredModel
from samopt.sharpness._measuring.optimizer_parts import graph_nodes
from samopt.sharpness._measuring.results import mean_and_error
from samopt.sharpness.curvature.custom_functions import custom_functions_checked

__all__ = ["Curvature", "GaussNewton", "Hessian", "curvature", "dot", "product_cost"]

_CHUNK = 1 << 22
_NOT_FINITE = (
    "the curvature at the weights holds NaN or infinite numbers; measure a model that has not diverged, look at the "
    "batches, and at operations whose second derivative is infinite (sqrt or log at 0, say)"
)
_NO_SECOND_DERIVATIVE = (
    "is not implemented",  # "derivative for aten::... is not implemented"
    "no autograd formula was registered",  # an operator of torch.library, called in a backward
    "ouble backward",  # of cuDNN, of torch.compile
    "requires create_graph=False",  # of a compiled part
    "don't support automatic differentiation",  # a backward that writes with out=
    "once_differentiable",
)
_COSTS = {
    "hessian": 3.5,  # measured 2.9 to 3.7 on small ConvNets, an MLP and a transformer
    "gauss_newton": 3.0,  # measured 2.6 to 3.8
}


def dot(a: Tensor, b: Tensor) -> float:
    """Return ``a . b``, accumulated in fp64 (where the device has it), without a temporary of their size.

    Args:
        a: Shape ``(size,)``.
        b: Shape ``(size,)``.
    """
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    pairs = zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True)
    return math.fsum(float((one * other).sum(dtype=wide)) for one, other in pairs)


class BatchProduct(Protocol):
    """How one batch's matrix is multiplied."""

    def __call__(self, batch: Any, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the product with a vector that is given, and returned, as one tensor for each weight."""


class Curvature:
    """The mean over examples of a symmetric matrix, as a function of a flat vector.

    Vectors are flat, of all weights one after the other, on the first weight's device and in at least fp32. A product
    evaluates every batch again, so no graph is kept.

    Args:
        measured: What is measured.
        product: Multiplies one batch's matrix.
        cost: Of one product with one batch, in gradients.

    Raises:
        TypeError: If a weight is complex.
    """

    def __init__(self, measured: MeasuredModel, product: BatchProduct, cost: float) -> None:
        if any(weight.is_complex() for weight in measured.weights):
            raise TypeError(
                "curvature is measured over real weights, but one of the model's is complex; leave it out with "
                "parameters=, or use worst_case"
            )
        self._measured = measured
        self._product = product
        self._cost = cost
        self._sizes = [weight.numel() for weight in measured.weights]
        self.size = sum(self._sizes)
        """Number of rows."""
        self.device = measured.weights[0].device
        """Where vectors are."""
        self.dtype = widen(measured.weights[0]).dtype
        """What they are."""

    def __call__(self, vector: Tensor, quotients: list[float] | None = None) -> Tensor:
        """Return the product.

        Args:
            vector: Shape ``(size,)``.
            quotients: Where to append ``v . A_b v`` for the matrix of each batch; their mean is ``v . A v``.

        Raises:
            ValueError: If the product is not finite.
        """
        total: Tensor | None = None  # made after the first product, when the gradient's memory is free again
        parts = self.split(vector)
        for batch, size in zip(self._measured.batches, self._measured.sizes, strict=True):
            with _twice_differentiable():
                products = self._product(batch, parts)
            if total is None:
                total = torch.zeros_like(vector)
            for place, product in zip(torch.split(total, self._sizes), products, strict=True):
                if product is not None:
                    place.add_(product.detach().reshape(-1).to(total), alpha=size)
            if quotients is not None:
                quotients.append(_inner_product(parts, products))
            self._measured.progress.advance(self._cost)
        assert total is not None  # there is at least one batch
        if not total.isfinite().all():
            raise ValueError(_NOT_FINITE)
        return total.div_(sum(self._measured.sizes))

    def quotients(self, vector: Tensor) -> list[float]:
        """Return ``v . A_b v`` for the matrix of each batch, without the product's memory.

        Args:
            vector: Shape ``(size,)``.

        Raises:
            ValueError: If one is not finite.
        """
        parts = self.split(vector)
        found = []
        for batch in self._measured.batches:
            with _twice_differentiable():
                found.append(_inner_product(parts, self._product(batch, parts)))
            self._measured.progress.advance(self._cost)
        if not all(map(math.isfinite, found)):
            raise ValueError(_NOT_FINITE)
        return found

    def standard_error(self, quotients: Sequence[float]) -> float | None:
        """Return the standard error of their mean over batches, or None with fewer than two.

        Args:
            quotients: One for each batch.
        """
        return mean_and_error(quotients, self._measured.sizes)[1]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a flat vector as tensors shaped, placed and typed like the weights.

        Args:
            vector: Shape ``(size,)``.
        """
        weights = self._measured.weights
        pieces = torch.split(vector, self._sizes)
        return [piece.view(weight.shape).to(weight) for piece, weight in zip(pieces, weights, strict=True)]


class Hessian:
    """``H v`` by differentiating ``g . v`` (Pearlmutter 1994).

    Args:
        measured: What is measured.
    """

    def __init__(self, measured: MeasuredModel) -> None:
        self._measured = measured
        self._is_checked = False

    def __call__(self, batch: Any, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the product; None for weights on which the gradient does not depend."""
        measured = self._measured
        with torch.enable_grad():
            loss = measured.call(batch)
        _check_loss(measured, loss, batch)
        with nullcontext() if self._is_checked else custom_functions_checked([loss]):
            gradient = measured.differentiate([loss], measured.weights, create_graph=True)
        self._is_checked = True
        return _pull_back(measured, gradient, vectors, measured.weights)


class GaussNewton:
    """``J^T H_L J v``, with ``J`` the Jacobian of the model's outputs and ``H_L`` the loss's Hessian in them.

    What reaches the loss other than through the model's outputs (a penalty on the weights) does not count.

    Args:
        measured: What is measured.
    """

    def __init__(self, measured: MeasuredModel) -> None:
        self._measured = measured
        self._is_checked = False

    def __call__(self, batch: Any, vectors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the product; None for weights on which the outputs do not depend."""
        measured = self._measured
        outputs: list[Tensor] = []
        others: list[Tensor] = []

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            outputs.extend(_logits_of(output, type(module).__name__))
            if isinstance(output, tuple | list):
                others.extend(part for part in output[1:] if isinstance(part, Tensor) and part.requires_grad)

        handle = measured.model.register_forward_hook(collect)
        try:
            with torch.enable_grad():
                loss = measured.call(batch)
        finally:
            handle.remove()
        _check_loss(measured, loss, batch)
        if not outputs:
            raise ValueError(
                "the Gauss-Newton matrix needs the model's outputs, but loss_fn did not call the model it was given; "
                "call model(...) in it, or use hessian_eigenvalues"
            )
        is_first, self._is_checked = not self._is_checked, True
        with custom_functions_checked([loss]) if is_first else nullcontext():
            slope = measured.differentiate([loss], outputs, create_graph=True)
            if is_first:
                self._check(loss, outputs, others, slope)
            pushed = self._push_forward(outputs, vectors)
        bent = _pull_back(measured, slope, pushed, outputs, retain_graph=True)
        product = measured.differentiate(
            outputs, measured.weights, grad_outputs=[_or_zeros(b, z) for b, z in zip(bent, outputs, strict=True)]
        )
        return [None if part is None else _dense(part) for part in product]

    def _check(
        self, loss: Tensor, outputs: Sequence[Tensor], others: Sequence[Tensor], slope: Sequence[Tensor | None]
    ) -> None:
        """Refuse outputs that are not all that the loss depends on."""
        name = type(self._measured.model).__name__
        if all(part is None for part in slope):
            raise ValueError(
                f"the loss does not depend on the outputs of {name}, so its Gauss-Newton matrix is 0; compute the loss "
                "from what model(...) returns, or use hessian_eigenvalues"
            )
        if any(output.dim() == 0 for output in outputs) or _reaches(loss, outputs, others):
            raise ValueError(
                f"{name} returns several outputs, and the loss depends on more than the first, or is the first one; "
                "wrap the model so that it returns one tensor, from which loss_fn computes the loss, or use "
                "hessian_eigenvalues"
            )

    def _push_forward(self, outputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return ``J v``: the derivative in ``u`` of ``(J^T u) . v``."""
        measured = self._measured
        dummies = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = measured.differentiate(outputs, measured.weights, grad_outputs=dummies, create_graph=True)
        pushed = _pull_back(measured, pulled, vectors, dummies, retain_graph=True)
        return [_or_zeros(part, output) for part, output in zip(pushed, outputs, strict=True)]


def product_cost(matrix: str) -> float:
    """Return what the product of a batch's matrix with a vector costs, in gradients.

    Args:
        matrix: "hessian" or "gauss_newton".

    Raises:
        ValueError: If there is no such matrix.
    """
    if matrix not in _COSTS:
        raise ValueError(f'matrix must be "hessian" or "gauss_newton", got {matrix!r}')
    return _COSTS[matrix]


def curvature(measured: MeasuredModel, matrix: str) -> Curvature:
    """Return a matrix by name.

    Args:
        measured: What is measured.
        matrix: "hessian" or "gauss_newton".
    """
    product = Hessian(measured) if matrix == "hessian" else GaussNewton(measured)
    return Curvature(measured, product, product_cost(matrix))


def _pull_back(
    measured: MeasuredModel,
    outputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    **options: Any,
) -> Sequence[Tensor | None]:
    """Return the gradient of ``sum outputs . cotangents``, None everywhere where no output has a graph."""
    outputs = [None if o is None else _dense(o) for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    found = measured.differentiate(
        [o for o, _ in pairs], inputs, grad_outputs=[c.to(o.dtype) for o, c in pairs], **options
    )
    return [None if part is None else _dense(part) for part in found]


def _reaches(loss: Tensor, through: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether a loss depends on other outputs in another way than through the given ones."""
    stops = [output.grad_fn for output in through]
    wanted = [other.grad_fn for other in others]  # kept, so that the same node is the same object below
    return any(node in wanted for node in graph_nodes([loss], stops))


def _check_loss(measured: MeasuredModel, loss: Tensor, batch: Any) -> None:
    """Refuse a loss that is no number: cross-entropy without a label that counts is one, with a gradient of 0."""
    number = next((number for number, each in enumerate(measured.batches) if each is batch), 0)
    measured.checked(loss.detach(), number)


def _inner_product(vectors: Sequence[Tensor], products: Sequence[Tensor | None]) -> float:
    pairs = [(v, p.detach()) for v, p in zip(vectors, products, strict=True) if p is not None]
    return math.fsum(dot(v.reshape(-1), p.reshape(-1).to(v)) for v, p in pairs)


def _dense(tensor: Tensor) -> Tensor:
    """Return a gradient as a dense tensor: that of an ``nn.Embedding(sparse=True)`` has no inner products."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _logits_of(output: Any, name: str) -> list[Tensor]:
    candidate = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if candidate is None and isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        candidate = output[0]
    if not isinstance(candidate, Tensor):
        raise TypeError(
            f"the Gauss-Newton matrix needs a model that returns a tensor, or an output with logits, but {name} "
            f"returned {type(output).__name__}; wrap the model, or use hessian_eigenvalues"
        )
    return [candidate]


@contextmanager
def _twice_differentiable() -> Generator[None]:
    """Choose the attention kernel that has second derivatives, and explain an operation that has none."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        text = str(error)
        if not any(phrase in text for phrase in _NO_SECOND_DERIVATIVE):
            raise
        raise RuntimeError(
            f"curvature needs second derivatives, but an operation of the model has none: {text.splitlines()[0]}. Use "
            "another implementation of it (attn_implementation='eager' for a Hugging Face model, cuDNN off for an RNN, "
            "the module inside torch.compile) or a measure without curvature: worst_case, average_case"
        ) from error
