"""Curvature through autograd Functions of Python: right, or said to be wrong."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from samopt import sharpness

MEASURES = {
    "hessian": sharpness.hessian_eigenvalues,
    "gauss-newton": sharpness.gauss_newton_eigenvalues,
    "trace": functools.partial(sharpness.hessian_trace, samples=2),
    "density": functools.partial(sharpness.spectral_density, steps=4, samples=1),
    "trace of gauss-newton": functools.partial(sharpness.hessian_trace, samples=2, matrix="gauss_newton"),
}


class Differentiable(torch.autograd.Function):
    """Cross-entropy whose backward is made of operations on what was saved."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return functional.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, slope):
        logits, labels = ctx.saved_tensors
        return (logits.softmax(1) - functional.one_hot(labels, 3)) / len(logits) * slope, None


class Fused(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward, as in fused kernels."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward((logits.softmax(1) - functional.one_hot(labels, 3)) / len(logits))
        return functional.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx, slope):
        return ctx.saved_tensors[0] * slope, None


class Once(Fused):
    """The same, used once."""

    @staticmethod
    def backward(ctx, slope):
        gradient = ctx.gradient = getattr(ctx, "gradient", ctx.saved_tensors[0])
        if hasattr(ctx, "used"):
            raise AttributeError("used")
        ctx.used = True
        return gradient * slope, None


class Opaque(torch.autograd.Function):
    """A layer whose backward is a kernel, which autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, slope):
        with torch.no_grad():
            return slope * ctx.saved_tensors[0].cos()


class Rounded(torch.autograd.Function):
    """A layer without a slope."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, slope):
        return torch.zeros_like(slope)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(3, (12,), generator=generator))]


def loss_of(function):
    return lambda model, batch: function.apply(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", MEASURES)
def test_a_function_that_can_be_differentiated_twice_is_measured_in_silence(name):
    expected = MEASURES[name](model(), nn.CrossEntropyLoss(), batches())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = MEASURES[name](model(), loss_of(Differentiable), batches())
    assert result.value == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize("function", [Fused, Once])
def test_a_loss_that_computes_its_gradient_in_the_forward_is_warned_about(function):
    right = sharpness.hessian_trace(model(), nn.CrossEntropyLoss(), batches(), samples=2)
    with pytest.warns(UserWarning, match=f"the backward of {function.__name__} does not depend on its input.*plain"):
        wrong = sharpness.hessian_trace(model(), loss_of(function), batches(), samples=2)
    assert abs(wrong.value / right.value - 1) > 0.1  # so there is something to warn about
    with pytest.warns(UserWarning, match=f"the backward of {function.__name__}"):
        MEASURES["trace of gauss-newton"](model(), loss_of(function), batches())


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("place", ["loss", "model"])
def test_a_backward_that_autograd_does_not_see_is_refused(name, place):
    class Layer(nn.Module):
        def forward(self, x):
            return Opaque.apply(x)

    subject = nn.Sequential(model(), Layer()) if place == "model" else model()

    def loss(model, batch):
        outputs = model(batch[0])
        return functional.cross_entropy(Opaque.apply(outputs) if place == "loss" else outputs, batch[1])

    with pytest.raises(
        RuntimeError, match="backward of Opaque computes them in a way .*, or a measure without curvature"
    ):
        MEASURES[name](subject, loss, batches())
    assert sharpness.worst_case(subject, loss, batches(), steps=2).value > 0  # which needs first derivatives alone


def test_a_function_without_a_slope_adds_no_curvature():
    def loss(model, batch):
        outputs = model(batch[0])
        return functional.cross_entropy(outputs + Rounded.apply(outputs), batch[1])

    def by_hand(model, batch):
        outputs = model(batch[0])
        return functional.cross_entropy(outputs + outputs.round().detach(), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sharpness.hessian_eigenvalues(model(), loss, batches())
    expected = sharpness.hessian_eigenvalues(model(), by_hand, batches())
    assert result.value == pytest.approx(expected.value, rel=1e-9)


def test_hooks_around_a_module_are_no_function_of_the_users():
    hooked = model()
    hooked[1].register_full_backward_hook(lambda module, inner, outer: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = sharpness.hessian_eigenvalues(hooked, nn.CrossEntropyLoss(), batches())
    expected = sharpness.hessian_eigenvalues(model(), nn.CrossEntropyLoss(), batches())
    assert result.value == pytest.approx(expected.value, rel=1e-9)
