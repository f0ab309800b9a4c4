"""bf16 and fp16 models: exact restores, unbiased perturbations, honest metrics, equal replicas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import (
    VARIANTS,
    batch,
    bits,
    closure_of,
    linear,
    mlp,
    tensors,
)

LOW = [torch.bfloat16, torch.float16]
low = pytest.mark.parametrize("dtype", LOW, ids=str)
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


@pytest.mark.parametrize("variant", VARIANTS[:2], ids=lambda variant: variant.name)  # long; the others take few steps
def test_a_thousand_steps_without_a_learning_rate_leave_every_bit(variant):
    kinds = [torch.float32, *LOW, torch.float64]
    shapes = [(7, 5), (33,)]
    weights = [w for kind in kinds for w in tensors(*shapes, dtype=kind)]
    groups = [{"params": weights[0::2], "rho": variant.rho}, {"params": weights[1::2], "rho": 3 * variant.rho}]
    optimizer = variant.wrap(torch.optim.SGD(groups, lr=0.0, momentum=0.9))
    slopes = [[s.detach() for kind in kinds for s in tensors(*shapes, seed=i, dtype=kind)] for i in range(7)]
    before = [w.detach().clone() for w in weights]
    moved = [0] * len(weights)
    for step in range(1000):
        for w, slope in zip(weights, slopes[step % 7], strict=True):
            w.grad = slope
        with optimizer.perturbed():
            if step % 100 == 0:
                moved = [m + (not torch.equal(w, b)) for m, w, b in zip(moved, weights, before, strict=True)]
            for w, slope in zip(weights, slopes[(step + 1) % 7], strict=True):
                w.grad = slope
        optimizer.step()
    assert moved == [10] * len(weights)
    for now, was in zip(weights, before, strict=True):
        assert torch.equal(now.detach().view(torch.uint8), was.view(torch.uint8))


def ascend_once(variant, dtype, seed, stochastic=True, size=(64, 50), rho=None):
    """One ascent from fixed weights and gradients: start, move applied, move asked (both fp64), and the metrics."""
    weights = tensors(size, (40,), dtype=dtype)
    slopes = [s.detach().to(dtype) for s in tensors(size, (40,), seed=1)]
    rho = variant.rho if rho is None else rho
    optimizer = variant.wrap(
        torch.optim.SGD(weights, lr=0.0), rho=rho, seed=seed, stochastic_rounding=stochastic, warn_on_stall=False
    )
    start = [w.detach().double() for w in weights]
    linear(weights, *slopes)().backward()
    asked = variant.epsilon([w.detach() for w in weights], [w.grad for w in weights], [rho, rho])
    with optimizer.perturbed():
        applied = [w.detach().double() - s for w, s in zip(weights, start, strict=True)]
        linear(weights, *slopes)().backward()
    return flat(start), flat(applied), flat(asked), optimizer.last_step.to_dict()


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance to the next number of ``dtype``, for normal fp64 ``values``."""
    exponent = torch.frexp(values)[1] - 1
    return torch.ldexp(torch.ones_like(values), exponent) * torch.finfo(dtype).eps


@low
@variants
def test_the_applied_perturbation_is_unbiased_over_seeds(variant, dtype):
    seeds = 400
    start, _, asked, _ = ascend_once(variant, dtype, 0)
    total = torch.zeros_like(asked)
    for seed in range(seeds):
        _, applied, _, _ = ascend_once(variant, dtype, seed)
        total += applied
    # One coin per entry, worth one spacing: standard deviation at most half of it, and none from zero and back.
    sigma = 0.5 * spacing(torch.maximum(start.abs(), (start + asked).abs()), dtype) / seeds**0.5
    error = total / seeds - asked
    assert bool((error.abs() < 5.5 * sigma).all())  # 3,240 entries
    assert abs(float((error / sigma).mean())) < 5 / len(error) ** 0.5
    along = float(error @ asked / asked.norm() ** 2)
    assert abs(along) < 5 * float((asked * sigma).norm() / asked.norm() ** 2)


@low
@variants
def test_rounding_to_nearest_loses_what_stochastic_rounding_keeps(variant, dtype):
    rho = variant.rho / 100  # below half an ulp nearly everywhere
    start, nearest, asked, metrics = ascend_once(variant, dtype, 0, stochastic=False, rho=rho)
    exact = (start + asked).float().to(dtype).double() - start
    assert torch.equal(nearest, exact)
    below = asked.abs() < 0.5 * spacing(start, dtype) / 2
    assert float(below.double().mean()) > 0.8
    assert not bool(nearest[below].any())
    assert 0 <= metrics["applied_radius"] < 0.8 * metrics["radius"]
    lost = asked[below].norm()
    assert float(lost) > 0.2 * float(asked.norm())

    # Where nearest rounding moves nothing at all, the stochastic one still moves uphill, by as much as asked.
    share = []
    for seed in range(40):
        _, applied, _, stochastic = ascend_once(variant, dtype, seed, rho=rho)
        share.append(float(applied[below] @ asked[below] / (asked[below] @ asked[below])))
        assert stochastic["applied_radius"] > stochastic["radius"]  # the noise of rounding is part of what is applied
    mean, spread = torch.tensor(share).mean(), torch.tensor(share).std() / len(share) ** 0.5
    assert abs(float(mean) - 1.0) < 5 * float(spread) and float(spread) < 0.1


@low
@variants
def test_equal_seeds_make_equal_replicas(variant, dtype):
    def train(seed, global_seed):
        model = mlp(dtype)
        optimizer = variant.wrap(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), rho=variant.rho, seed=seed)
        torch.manual_seed(global_seed)  # has no say
        for step in range(6):
            optimizer.step(closure_of(optimizer, model, batch(dtype, seed=step)))
        return bits(model)

    first, again, other = train(0, 1), train(0, 2), train(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
