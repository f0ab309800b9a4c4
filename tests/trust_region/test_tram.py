"""TRAM's radius and update, number by number, against an fp64 softmax regression written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.trust_region import EMA, TRUST_REGIONS, InputNoise
from tests.helpers.cases import batch, bits, closure_of, loss_of, mlp, same_bits

SCALE = 3.0
LR = 0.5
DECAY = 0.7
EXACT = {"rtol": 1e-10, "atol": 1e-13}
REFERENCED: list[Tensor] = []


class Softmax(nn.Module):
    """``logits = x W^T + b``; remembers the inputs of every forward without a graph, which are the reference's.

    It does so in a global variable: what a module and its class keep is put back after the reference's forward.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        REFERENCED.clear()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            REFERENCED.append(x)
        return x @ self.weight.T + self.bias


def data(step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return (
        torch.randn(size, 4, generator=generator, dtype=torch.float64),
        torch.randint(3, (size,), generator=generator),
    )


Weights = tuple[Tensor, Tensor]


def outputs(weights: Weights, x: Tensor) -> Tensor:
    return x @ weights[0].T + weights[1]


def softmax(z: Tensor) -> Tensor:
    return torch.exp(z) / torch.exp(z).sum(1, keepdim=True)


def gradient(weights: Weights, x: Tensor, y: Tensor) -> Weights:
    error = (softmax(outputs(weights, x)) - nn.functional.one_hot(y, 3)) / len(y)
    return error.T @ x, error.sum(0)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum(1).mean())


def mmd(first: Tensor, second: Tensor) -> float:
    def mean_kernel(one: Tensor, other: Tensor) -> float:
        squares = ((one[:, None] - other[None]) ** 2).sum(2)
        return float(((1 + squares / one.shape[1]) ** -0.5).mean())

    return mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second)


DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "kl": lambda y, z: kl(softmax(y), softmax(z)),
    "reverse_kl": lambda y, z: kl(softmax(z), softmax(y)),
    "symmetric_kl": lambda y, z: kl(softmax(y), softmax(z)) + kl(softmax(z), softmax(y)),
    "l2": lambda y, z: float(((y - z) ** 2).sum(1).sqrt().mean()),
    "mmd": mmd,
}


def lengths(geometry: str, weights: Weights, g: Weights, eta: float) -> list[Tensor]:
    if geometry == "adaptive":
        return [weights[0].abs() + eta, torch.ones_like(weights[1])]
    if geometry == "fisher":
        return [(1 + eta * each**2) ** -0.5 for each in g]
    return [torch.ones_like(each) for each in g]


def hand_step(
    weights: Weights, g: Weights, radii: tuple[float, float], geometry: str, eta: float, x: Tensor, y: Tensor
) -> Weights:
    """SGD with the gradient at ``w + r T^2 g / ||T g||``."""
    scales = lengths(geometry, weights, g, eta)
    norm = math.sqrt(sum(float(((t * each) ** 2).sum()) for t, each in zip(scales, g, strict=True)))
    moved = [w + r * t * t * each / norm for w, r, t, each in zip(weights, radii, scales, g, strict=True)]
    second = gradient((moved[0], moved[1]), x, y)
    return weights[0] - LR * second[0], weights[1] - LR * second[1]


class Trusted:
    """The reference of each trust region, kept in plain tensors."""

    def __init__(self, name: str, weights: Weights) -> None:
        self.name = name
        self.weights: Weights | None = weights if name == "pretrained" else None

    def outputs(self, weights: Weights, x: Tensor, noisy: Tensor) -> Tensor:
        if self.name == "input_noise":
            return outputs(weights, noisy)
        return outputs(weights if self.weights is None else self.weights, x)

    def advance(self, weights: Weights) -> None:
        if self.name == "previous" or (self.name == "ema" and self.weights is None):
            self.weights = weights
        elif self.name == "ema":
            old = self.weights
            self.weights = tuple(DECAY * o + (1 - DECAY) * w for o, w in zip(old, weights, strict=True))


def backward(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def region(name: str) -> object:
    return EMA(decay=DECAY) if name == "ema" else InputNoise(std=0.3) if name == "input_noise" else name


@pytest.mark.parametrize("geometry", ["adaptive", "euclidean", "fisher"])
@pytest.mark.parametrize("divergence", DISTANCES)
@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_radius_and_update_by_hand(name: str, divergence: str, geometry: str) -> None:
    model = Softmax()
    weights: Weights = (model.weight.detach().clone(), model.bias.detach().clone())
    base = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "scale": 0.5 * SCALE}], lr=LR)
    eta = {"adaptive": 0.02, "euclidean": 0.0, "fisher": 2.0}[geometry]
    optimizer = samopt.TRAM(
        base, model=model, trust_region=region(name), divergence=divergence, scale=SCALE, geometry=geometry, eta=eta
    )
    trusted = Trusted(name, weights)
    seen = []
    for step in range(5):
        x, y = data(step)
        REFERENCED.clear()
        optimizer.step(lambda x=x, y=y: backward(optimizer, model, x, y))
        noisy = REFERENCED[0] if REFERENCED else x
        reference, current = trusted.outputs(weights, x, noisy), outputs(weights, x)
        distance = DISTANCES[divergence](reference, current)
        trusted.advance(weights)
        radii = (SCALE * distance, 0.5 * SCALE * distance)
        weights = hand_step(weights, gradient(weights, x, y), radii, geometry, eta, x, y)
        assert optimizer.last_step.distance.item() == pytest.approx(distance, rel=1e-9, abs=1e-15)
        assert optimizer.last_step.radius.item() == pytest.approx(radii[0], rel=1e-9, abs=1e-15)
        torch.testing.assert_close((model.weight.data, model.bias.data), weights, **EXACT)
        seen.append(distance)
    assert (seen[0] == 0.0) == (name != "input_noise")
    assert min(seen[1:]) > 1e-4


def test_input_noise_is_what_it_says() -> None:
    for kind, bound in (("normal", math.inf), ("uniform", math.sqrt(3) * 0.3)):
        model = Softmax()
        optimizer = samopt.TRAM(
            torch.optim.SGD(model.parameters(), lr=LR), model=model, trust_region=InputNoise(std=0.3, kind=kind)
        )
        for step in range(2):
            optimizer.step(closure_of(optimizer, model, data(step, size=4000)))
        first, second = (noisy - data(step, size=4000)[0] for step, noisy in enumerate(REFERENCED))
        assert not torch.equal(first, second)
        for noise in (first, second):
            assert noise.abs().max() <= bound
            assert noise.mean().abs() < 0.3 * 4 / math.sqrt(noise.numel())
            assert noise.std().item() == pytest.approx(0.3, rel=4 / math.sqrt(2 * noise.numel()))


@pytest.mark.parametrize("form", ["explicit", "primitives", "migration", "closure"])
@pytest.mark.parametrize("name", TRUST_REGIONS)
def test_every_form_takes_the_same_steps(name: str, form: str) -> None:
    model, reference = mlp(torch.float64), mlp(torch.float64)
    optimizer, expected = (
        samopt.TRAM(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), model=m, trust_region=region(name), scale=20)
        for m in (model, reference)
    )
    for step in range(4):
        each = batch(torch.float64, seed=step)
        expected.step(closure_of(expected, reference, each))
        if form == "closure":
            optimizer.step(closure_of(optimizer, model, each))
            continue
        optimizer.zero_grad()
        loss_of(model, each).backward()
        if form == "explicit":
            with optimizer.perturbed():
                loss_of(model, each).backward()
            optimizer.step()
        elif form == "primitives":
            optimizer.ascend()
            loss_of(model, each).backward()
            optimizer.restore()
            optimizer.step()
        else:
            optimizer.first_step(zero_grad=True)
            loss_of(model, each).backward()
            optimizer.second_step(zero_grad=True)
        assert optimizer.last_step.distance == expected.last_step.distance
    assert same_bits(model, bits(reference))


@pytest.mark.parametrize("name", ["previous", "pretrained"])
def test_micro_batches_count_by_their_examples(name: str) -> None:
    model, whole = mlp(torch.float64), mlp(torch.float64)
    optimizer, expected = (
        samopt.TRAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m, trust_region=name, scale=20)
        for m in (model, whole)
    )
    for step in range(4):
        x, y = batch(torch.float64, seed=step)
        expected.step(closure_of(expected, whole, (x, y)))

        def accumulate(x=x, y=y) -> None:
            for part in (slice(0, 3), slice(3, 4), slice(4, 16)):
                (loss_of(model, (x[part], y[part])) * len(y[part]) / 16).backward()

        optimizer.zero_grad()
        accumulate()
        with optimizer.perturbed():
            accumulate()
        optimizer.step()
        torch.testing.assert_close(optimizer.last_step.distance, expected.last_step.distance, **EXACT)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_bf16_model_is_compared_in_fp32() -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.5), model=model, scale=1.0)
    outputs = []
    for step in range(3):
        x, y = batch(torch.bfloat16)
        with torch.no_grad():
            outputs.append(model(x).double())
        optimizer.step(closure_of(optimizer, model, (x, y)))
        distance = optimizer.last_step.distance
        assert distance.dtype is torch.float32
        expected = kl(outputs[max(step - 1, 0)].softmax(1), outputs[step].softmax(1))
        assert distance.item() == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert expected > 1e-4


def test_grad_scaler_changes_nothing() -> None:
    model, plain = mlp(torch.float64), mlp(torch.float64)
    optimizer, expected = (
        samopt.TRAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m, scale=20.0) for m in (model, plain)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        each = batch(torch.float64, seed=step)
        if step == 2:  # a step that the scaler skips does not count: theta_{t-1} stays
            optimizer.zero_grad()
            scaler.scale(loss_of(model, each) * math.inf).backward()
            with optimizer.perturbed():
                scaler.scale(loss_of(model, each)).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        scaler.scale(loss_of(model, each)).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, each)).backward()
        scaler.step(optimizer)
        scaler.update()
        expected.step(closure_of(expected, plain, each))
        torch.testing.assert_close(optimizer.last_step.distance, expected.last_step.distance, **EXACT)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_fisher_under_a_grad_scaler_needs_eta_over_the_squared_scale() -> None:
    model, plain = mlp(torch.float64), mlp(torch.float64)
    optimizer, expected = (
        samopt.FisherSAM(torch.optim.SGD(m.parameters(), lr=0.1), eta=5.0, model=m) for m in (model, plain)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    each = batch(torch.float64)
    scaler.scale(loss_of(model, each)).backward()
    optimizer.param_groups[0]["eta"] = 5.0 / scaler.get_scale() ** 2
    with optimizer.perturbed():
        scaler.scale(loss_of(model, each)).backward()
    scaler.step(optimizer)
    expected.step(closure_of(expected, plain, each))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_previous_with_lbfgs_is_the_evaluation_before() -> None:
    model = mlp(torch.float64)
    optimizer = samopt.TRAM(torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=3), model=model, scale=1.0)
    points, distances = [], []
    closure = closure_of(optimizer, model, batch(torch.float64))

    def watched() -> Tensor:
        if not optimizer.is_perturbed:
            with torch.no_grad():
                points.append(model(batch(torch.float64)[0]).softmax(1))
        else:
            distances.append(optimizer.radius.metrics()["distance"].item())
        return closure()

    optimizer.step(watched)
    optimizer.step(watched)
    expected = [0.0] + [kl(p, q) for p, q in zip(points, points[1:], strict=False)]
    assert len(distances) >= 4
    assert distances == pytest.approx(expected, rel=1e-9, abs=1e-15)


class Labelled(nn.Module):
    """A regression that is given more than its input, and that first."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, labels: Tensor, loss_mask: Tensor, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize("by_name", [False, True])
def test_input_noise_leaves_labels_and_masks_alone(by_name: bool) -> None:
    x, distances = batch(seed=0)[0], []
    labels, mask = torch.randn(len(x), 3), torch.ones(len(x))
    for is_labelled in (True, False):
        model = Labelled(mlp()) if is_labelled else mlp()
        optimizer = samopt.TRAM(
            torch.optim.SGD(model.parameters(), lr=LR), model=model, trust_region=InputNoise(std=0.3), divergence="l2"
        )

        def loss(model=model, is_labelled=is_labelled) -> Tensor:
            given = {"labels": labels, "loss_mask": mask, "x": x}
            output = model(x) if not is_labelled else model(**given) if by_name else model(*given.values())
            return nn.functional.mse_loss(output, labels)

        optimizer.backward(loss)
        distances.append(float(optimizer.last_step.distance))
    assert distances[0] == distances[1] > 0


def test_an_error_of_the_forward_is_the_models_own() -> None:
    failures: list[Exception] = [ArithmeticError()]

    class FailsOnce(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if failures:
                raise failures.pop()
            return x

    model = nn.Sequential(mlp(), FailsOnce())
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=LR), model=model, trust_region=InputNoise(std=0.3))
    with pytest.raises(ArithmeticError):
        optimizer.backward(lambda: loss_of(model, batch(seed=0)))
    optimizer.backward(lambda: loss_of(model, batch(seed=0)))
    assert float(optimizer.last_step.distance) > 0


def test_without_a_scale_it_is_the_base_and_measures_no_distance() -> None:
    model, stock = mlp(), mlp()
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=LR), model=model, scale=0.0)
    plain = torch.optim.SGD(stock.parameters(), lr=LR)
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
        plain.step(closure_of(plain, stock, batch(seed=step)))
        assert optimizer.last_step.distance is None
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    loss_of(model, batch(seed=2)).backward()
    with optimizer.perturbed():
        loss_of(model, batch(seed=2)).backward()
    assert optimizer.last_step.distance is None and float(optimizer.last_step.radius) == 0.0
