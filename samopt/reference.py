"""Every optimizer of this package as a plain loop: read this first.

Each function is one training step around a stock torch optimizer ``base``, as the paper's algorithm says it, with one
parameter group and no regard for speed, precision, several devices, dropout or BatchNorm. ``compute_loss()`` runs the
forward pass and returns the loss. The package computes the same numbers (``tests/variants/test_reference.py``); use the
package to train.

Notation: ``w`` weights, ``g`` gradient at ``w``, ``epsilon`` perturbation, ``g_p`` gradient at ``w + epsilon``, ``rho``
radius, ``T`` geometry, ``v`` the base's second moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "asam",
    "fisher_sam",
    "flat_lora",
    "friendly_sam",
    "functional_sam",
    "gsam",
    "le_sam",
    "looksam",
    "momentum_sam",
    "preconditioned_sam",
    "sam",
    "tram",
    "wsam",
]

Loss: TypeAlias = Callable[[], Tensor]


def gradient(parameters: Sequence[Tensor], compute_loss: Loss) -> tuple[Tensor, list[Tensor]]:
    """Return the loss and its gradient."""
    loss = compute_loss()
    return loss.detach(), list(torch.autograd.grad(loss, list(parameters)))


def perturbed_gradient(parameters: Sequence[Tensor], compute_loss: Loss, epsilon: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient at ``w + epsilon``; the weights are exactly ``w`` again afterwards."""
    weights = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, step in zip(parameters, epsilon, strict=True):
            parameter.add_(step)
    _, perturbed = gradient(parameters, compute_loss)
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)
    return perturbed


def update(parameters: Sequence[Tensor], base: Optimizer, gradients: Sequence[Tensor]) -> None:
    """Step the base optimizer with given gradients."""
    for parameter, entry in zip(parameters, gradients, strict=True):
        parameter.grad = entry
    base.step()


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product over all parameters."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def norm(vector: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm over all parameters."""
    return dot(vector, vector).sqrt()


def sam(parameters: Sequence[Tensor], base: Optimizer, compute_loss: Loss, rho: float = 0.05) -> Tensor:
    """SAM (Foret et al. 2021, algorithm 1): ``epsilon = rho g / ||g||``."""
    loss, g = gradient(parameters, compute_loss)
    length = norm(g)
    epsilon = [rho * entry / length for entry in g]
    update(parameters, base, perturbed_gradient(parameters, compute_loss, epsilon))
    return loss


def asam(
    parameters: Sequence[Tensor], base: Optimizer, compute_loss: Loss, rho: float = 0.5, eta: float = 0.01
) -> Tensor:
    """ASAM (Kwon et al. 2021, algorithm 1): ``epsilon = rho T^2 g / ||T g||`` with ``T = |w| + eta``."""
    loss, g = gradient(parameters, compute_loss)
    # Biases and the scales of norm layers keep T = 1, as in the paper's experiments.
    t = [w.detach().abs() + eta if w.dim() > 1 else torch.ones_like(w) for w in parameters]
    length = norm([a * b for a, b in zip(t, g, strict=True)])
    epsilon = [rho * a * a * b / length for a, b in zip(t, g, strict=True)]
    update(parameters, base, perturbed_gradient(parameters, compute_loss, epsilon))
    return loss


def fisher_sam(
    parameters: Sequence[Tensor], base: Optimizer, compute_loss: Loss, rho: float = 0.1, eta: float = 0.1
) -> Tensor:
    """Fisher SAM (Kim et al. 2022, algorithm 1): ``T^2 = 1 / (1 + eta g^2)``."""
    loss, g = gradient(parameters, compute_loss)
    t_squared = [1 / (1 + eta * entry * entry) for entry in g]
    length = torch.stack([(a * b * b).sum() for a, b in zip(t_squared, g, strict=True)]).sum().sqrt()
    epsilon = [rho * a * b / length for a, b in zip(t_squared, g, strict=True)]
    update(parameters, base, perturbed_gradient(parameters, compute_loss, epsilon))
    return loss


def preconditioned_sam(parameters: Sequence[Tensor], base: Optimizer, compute_loss: Loss, rho: float = 0.01) -> Tensor:
    """SAM in Adam's geometry: ``T^2 = 1 / (sqrt(v_hat) + eps)`` with the second moment of ``base``, here Adam or AdamW.

    The first step, which has no second moment yet, is a plain one.
    """
    loss, g = gradient(parameters, compute_loss)
    states, group = [base.state[w] for w in parameters], base.param_groups[0]
    if not states[0]:
        update(parameters, base, g)
        return loss
    v_hat = [state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"])) for state in states]
    # An entry that never had a gradient has no scale, and does not move.
    t_squared = [torch.where(v > 0, 1 / (v.sqrt() + group["eps"]), 0.0) for v in v_hat]
    length = torch.stack([(a * b * b).sum() for a, b in zip(t_squared, g, strict=True)]).sum().sqrt()
    epsilon = [rho * a * b / length for a, b in zip(t_squared, g, strict=True)]
    update(parameters, base, perturbed_gradient(parameters, compute_loss, epsilon))
    return loss


def tram(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_loss: Loss,
    distance: Callable[[], Tensor],
    scale: float = 1.0,
    eta: float = 0.01,
) -> Tensor:
    """TRAM (Sherborne et al. 2024, algorithm 1): ASAM with ``rho = scale * distance``, measured in every step.

    ``distance()`` compares the model's outputs on this batch with those of a version that is trusted.
    """
    return asam(parameters, base, compute_loss, rho=scale * float(distance()), eta=eta)


def le_sam(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_loss: Loss,
    budget: float = 0.05,
    max_radius: float = 0.5,
) -> Tensor:
    """LE-SAM (Wang et al. 2026): SAM with ``rho = min(budget / ||g||, max_radius)``."""
    loss, g = gradient(parameters, compute_loss)
    length = norm(g)
    rho = (budget / length).clamp(max=max_radius)
    epsilon = [rho * entry / length for entry in g]
    update(parameters, base, perturbed_gradient(parameters, compute_loss, epsilon))
    return loss


def momentum_sam(parameters: Sequence[Tensor], base: Optimizer, compute_loss: Loss, rho: float = 0.3) -> Tensor:
    """Momentum-SAM (Becker et al. 2024): one pass at ``w - rho m / ||m||``, with ``m`` the base's momentum.

    Returns the loss there. The first step, which has no momentum yet, is a plain one.
    """
    momenta = [base.state[w].get("momentum_buffer", base.state[w].get("exp_avg")) for w in parameters]
    if momenta[0] is None:
        loss, g = gradient(parameters, compute_loss)
        update(parameters, base, g)
        return loss
    length = norm(momenta)
    losses: list[Tensor] = []

    def noted_loss() -> Tensor:
        losses.append(compute_loss())
        return losses[-1]

    epsilon = [-rho * m / length for m in momenta]
    update(parameters, base, perturbed_gradient(parameters, noted_loss, epsilon))
    return losses[0].detach()


def flat_lora(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_loss: Loss,
    memory: dict[str, Any],
    rho: float = 0.05,
    seed: int = 0,
    layers: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Flat-LoRA (Li et al. 2025, section 3.3): one pass at ``W + s B A + epsilon``, with ``W`` frozen.

    Row ``i`` of ``epsilon`` is Gaussian, with deviation ``rho ||(W + s B A)_i|| / sqrt(n)``. ``layers`` has ``W`` and
    ``W + s B A`` of each adapter layer; without adapters, both are each trained matrix. ``memory`` is a dict that is
    kept between steps. Returns the loss at the perturbed weights.
    """
    step = memory["step"] = memory.get("step", -1) + 1
    layers = layers or [(w, w) for w in parameters if w.dim() > 1]
    kept = [w.detach().clone() for w, _ in layers]
    with torch.no_grad():
        for index, (w, whole) in enumerate(layers):
            deviation = rho * torch.linalg.vector_norm(whole, dim=1, keepdim=True) / w.shape[1] ** 0.5
            w.add_(deviation * normal(w, seed, step, index))
    loss, g = gradient(parameters, compute_loss)
    with torch.no_grad():
        for (w, _), value in zip(layers, kept, strict=True):
            w.copy_(value)
    update(parameters, base, g)
    return loss


def normal(like: Tensor, seed: int, step: int, index: int) -> Tensor:
    """Return normal numbers that the seed, the step and the place of a layer decide alone."""
    key = (seed * 0x9E3779B97F4A7C15 + step + index * 0xD1B54A32D192ED03) % 2**63
    generator = torch.Generator(like.device).manual_seed(key)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def friendly_sam(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_loss: Loss,
    memory: dict[str, Any],
    rho: float = 0.1,
    sigma: float = 1.0,
    decay: float = 0.9,
) -> Tensor:
    """Friendly SAM (Li et al. 2024, algorithm 1): ``epsilon = rho d / ||d||`` with ``d = g - sigma EMA(g)``.

    ``memory`` is a dict that is kept between steps, empty before the first.
    """
    loss, g = gradient(parameters, compute_loss)
    before = memory.get("average", [torch.zeros_like(entry) for entry in g])
    average = memory["average"] = [decay * m + (1 - decay) * entry for m, entry in zip(before, g, strict=True)]
    d = [entry - sigma * m for entry, m in zip(g, average, strict=True)]
    length = norm(d)
    epsilon = [rho * entry / length for entry in d]
    update(parameters, base, perturbed_gradient(parameters, compute_loss, epsilon))
    return loss


def looksam(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_loss: Loss,
    memory: dict[str, Any],
    rho: float = 0.1,
    every: int = 5,
    alpha: float = 0.1,
) -> Tensor:
    """LookSAM (Liu et al. 2022, algorithm 1): a second pass every k steps, its orthogonal part in the others.

    Norms and inner products are those of each tensor.
    ``memory`` is a dict that is kept between steps, empty before the first.
    """
    loss, g = gradient(parameters, compute_loss)
    step = memory["step"] = memory.get("step", -1) + 1
    if step % every == 0:
        length = norm(g)
        g_p = perturbed_gradient(parameters, compute_loss, [rho * entry / length for entry in g])
        shares = [dot([entry], [p]) / dot([entry], [entry]) for entry, p in zip(g, g_p, strict=True)]
        memory["component"] = [p - share * entry for p, entry, share in zip(g_p, g, shares, strict=True)]
        update(parameters, base, g_p)
    else:
        pairs = list(zip(g, memory["component"], strict=True))
        update(parameters, base, [entry + alpha * norm([entry]) / norm([v]) * v for entry, v in pairs])
    return loss


def functional_sam(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_outputs: Loss,
    loss_of: Callable[[Tensor], Tensor],
    rho: float = 0.05,
) -> Tensor:
    """Functional SAM (Singh et al. 2025): ``J(w + epsilon)^T v``, with ``v = dL/df`` at ``f(w)`` and SAM's ``epsilon``.

    ``compute_outputs()`` runs the forward pass and returns the outputs ``f``; ``loss_of(f)`` is their loss ``L``.
    """
    loss, g = gradient(parameters, lambda: loss_of(compute_outputs()))
    length = norm(g)
    outputs = compute_outputs().detach().requires_grad_()
    (v,) = torch.autograd.grad(loss_of(outputs), outputs)
    epsilon = [rho * entry / length for entry in g]
    # The gradient of <f, v> is J^T v.
    update(parameters, base, perturbed_gradient(parameters, lambda: (compute_outputs() * v).sum(), epsilon))
    return loss


def gsam(
    parameters: Sequence[Tensor], base: Optimizer, compute_loss: Loss, rho: float = 0.05, alpha: float = 0.4
) -> Tensor:
    """GSAM (Zhuang et al. 2022, algorithm 1): ``g_p - alpha g_v``, ``g_v`` the part of ``g`` orthogonal to ``g_p``."""
    loss, g = gradient(parameters, compute_loss)
    length = norm(g)
    g_p = perturbed_gradient(parameters, compute_loss, [rho * entry / length for entry in g])
    share = dot(g, g_p) / dot(g_p, g_p)
    update(parameters, base, [p - alpha * (entry - share * p) for p, entry in zip(g_p, g, strict=True)])
    return loss


def wsam(
    parameters: Sequence[Tensor],
    base: Optimizer,
    compute_loss: Loss,
    rho: float = 0.05,
    gamma: float = 0.9,
) -> Tensor:
    """WSAM (Yue et al. 2023, its algorithm): the base steps with ``g``, the sharpness is subtracted after."""
    loss, g = gradient(parameters, compute_loss)
    length = norm(g)
    g_p = perturbed_gradient(parameters, compute_loss, [rho * entry / length for entry in g])
    update(parameters, base, g)
    factor = base.param_groups[0]["lr"] * gamma / (1 - gamma)
    with torch.no_grad():
        for parameter, entry, p in zip(parameters, g, g_p, strict=True):
            parameter.sub_(factor * (p - entry))
    return loss
