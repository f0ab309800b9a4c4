"""What may be passed as a loss and as batches; and that a mean weighs examples, however they are batched."""

from __future__ import annotations

import functools
import math
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from samopt import sharpness
from samopt.sharpness._measuring.batches import batch_size
from samopt.sharpness._measuring.results import mean_and_error


def classifier(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def examples(count=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=dtype)
    return x, torch.randint(3, (count,), generator=generator)


def split(sizes):
    x, y = examples(sum(sizes))
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def hand(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def squared(outputs, labels):
    return (outputs - functional.one_hot(labels, 3)).square().mean()


MODEL_LOSSES = {
    "module": (nn.CrossEntropyLoss(), hand),
    "module with options": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda model, b: functional.cross_entropy(model(b[0]), b[1], label_smoothing=0.1),
    ),
    "function of torch": (functional.cross_entropy, hand),
    "partial": (
        functools.partial(functional.cross_entropy, label_smoothing=0.1),
        lambda model, b: functional.cross_entropy(model(b[0]), b[1], label_smoothing=0.1),
    ),
    "own function": (squared, lambda model, b: squared(model(b[0]), b[1])),
}


@pytest.mark.parametrize("name", MODEL_LOSSES)
def test_a_loss_of_outputs_and_labels_is_the_loss_written_by_hand(name):
    loss, by_hand = MODEL_LOSSES[name]
    result = sharpness.worst_case(classifier(), loss, split([12, 12]), steps=3)
    assert result == sharpness.worst_case(classifier(), by_hand, split([12, 12]), steps=3)


def test_an_own_loss_module_may_take_the_model():
    class Penalised(nn.Module):
        def forward(self, model, batch):
            return hand(model, batch) + sum(p.square().sum() for p in model.parameters())

    expected = sharpness.worst_case(classifier(), lambda m, b: Penalised()(m, b), split([8]), steps=1)
    assert sharpness.worst_case(classifier(), Penalised(), split([8]), steps=1) == expected


class TakesNames(nn.Module):
    """A model whose forward names its input, as Hugging Face's do, and returns logits in an output."""

    def __init__(self):
        super().__init__()
        self.inner = classifier()

    def forward(self, values):
        return UserDict(logits=self.inner(values))


class Output(UserDict):
    """A mapping with attributes, as Hugging Face's outputs are."""

    def __getattr__(self, name):
        return self.data[name]


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("key", ["labels", "label", "target", "targets", "y"])
def test_a_dict_batch_is_the_pair(kind, key):
    (x, y) = examples()
    expected = sharpness.worst_case(classifier(), nn.CrossEntropyLoss(), [(x, y)], steps=2)
    assert sharpness.worst_case(classifier(), nn.CrossEntropyLoss(), [kind({"x": x, key: y})], steps=2) == expected
    assert sharpness.worst_case(classifier(), sharpness.cross_entropy, [kind({"x": x, key: y})], steps=2) == expected


def test_a_dict_batch_goes_to_the_arguments_that_forward_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def forward(self, values, scale):
            return Output(logits=scale * self.inner(values))

    x, y = examples()
    batch = {"scale": torch.tensor(2.0), "values": x, "labels": y}
    expected = functional.cross_entropy(2 * classifier()(x), y).item()
    result = sharpness.worst_case(Named(), nn.CrossEntropyLoss(), [batch], steps=1)
    assert result.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "batch", "kind", "text"),
    [
        (nn.CrossEntropyLoss, None, TypeError, "is the class CrossEntropyLoss"),
        (nn.CrossEntropyLoss(reduction="sum"), None, ValueError, 'reduction="sum"'),
        (functools.partial(functional.cross_entropy, reduction="none"), None, ValueError, 'reduction="none"'),
        (lambda a, b: functional.cross_entropy(a, b), None, TypeError, r"loss\(outputs, labels\)"),
        (3, None, TypeError, "got int"),
        (nn.CrossEntropyLoss(), {"x": torch.zeros(2, 5)}, TypeError, "needs labels"),
        (nn.CrossEntropyLoss(), [torch.zeros(2, 5)], TypeError, "pair"),
    ],
)
def test_what_is_no_loss_or_batch_is_refused_with_what_to_write(loss, batch, kind, text):
    with pytest.raises(kind, match=text):
        sharpness.worst_case(classifier(), loss, [examples() if batch is None else batch], steps=1)


SPLITS = [[16, 8], [20, 4], [1, 23], [5, 6, 13]]
MEANS = {
    "hessian_eigenvalues": functools.partial(sharpness.hessian_eigenvalues, tolerance=1e-8),
    "gauss_newton_eigenvalues": functools.partial(sharpness.gauss_newton_eigenvalues, tolerance=1e-8),
    "hessian_trace": functools.partial(sharpness.hessian_trace, samples=3),
    "spectral_density": functools.partial(sharpness.spectral_density, steps=5, samples=1),
    "landscape": functools.partial(sharpness.landscape, points=3),
    "interpolate": lambda model, *arguments: sharpness.interpolate(
        model, *arguments, {k: -v for k, v in model.state_dict().items()}, points=3, accuracy_fn=sharpness.accuracy
    ),
}


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("name", MEANS)
def test_unequal_batches_give_the_answer_of_one_batch(name, sizes):
    model = classifier()
    whole = MEANS[name](model, nn.CrossEntropyLoss(), split([24]))
    parts = MEANS[name](model, nn.CrossEntropyLoss(), split(sizes))
    assert parts.value == pytest.approx(whole.value, rel=1e-7)
    for field in ("losses", "accuracies"):
        if hasattr(whole, field):
            assert getattr(parts, field) == pytest.approx(getattr(whole, field), rel=1e-7)


@pytest.mark.parametrize("measure", [sharpness.worst_case, sharpness.average_case])
def test_a_mean_over_batches_weighs_their_examples(measure):
    result = measure(classifier(), nn.CrossEntropyLoss(), split([20, 4]))
    assert result.value == pytest.approx((20 * result.per_batch[0] + 4 * result.per_batch[1]) / 24, rel=1e-12)
    x, y = examples(24)
    assert result.loss == pytest.approx(hand(classifier(), (x, y)).item(), rel=1e-12)


def test_a_weighted_mean_and_its_error():
    assert mean_and_error([1.0, 4.0], [2, 1]) == pytest.approx((2.0, math.sqrt(2 * ((2 / 3) ** 2 + (2 / 3) ** 2))))
    assert mean_and_error([1.0, 2.0, 6.0], [5, 5, 5]) == pytest.approx(mean_and_error([1.0, 2.0, 6.0]))
    assert mean_and_error([3.0], [4]) == (3.0, None)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((torch.zeros(7, 3), torch.zeros(7)), 7),
        ((torch.zeros(50, 7, 3), torch.zeros(7)), 7),  # inputs whose first dimension is time
        ({"mask": torch.zeros(1, 9), "labels": torch.zeros(4, 9)}, 4),
        ([torch.zeros(3)], 3),
        (torch.zeros(6, 2), 6),
        ((torch.zeros(3, 2), 1.0), 3),
        (None, 1),
        ("text", 1),
    ],
)
def test_the_number_of_examples_is_the_length_of_the_labels(batch, size):
    assert batch_size(batch) == size


# --- a point without a gradient -----------------------------------------------------------------------------------


def saturated(scale=1e4):
    """A classifier whose logits are so far apart that its loss and its gradient are exactly 0 in fp32."""
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    torch.manual_seed(3)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(16, 2))
        model[0].bias.zero_()
        model[2].weight.copy_(scale * torch.stack([model[0].weight[:, 0], -model[0].weight[:, 0]]))
        model[2].bias.zero_()
    angles = torch.linspace(-0.4, 0.4, 8)
    x = torch.cat([torch.stack([angles.cos(), angles.sin()], 1), torch.stack([-angles.cos(), angles.sin()], 1)])
    return model, [(x, torch.tensor([0] * 8 + [1] * 8))]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_point_without_a_gradient_is_left(norm):
    model, data = saturated()
    loss = nn.CrossEntropyLoss()(model(data[0][0]), data[0][1])
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert float(loss) == 0.0 and all(g.count_nonzero() == 0 for g in gradient)

    options = {"rho": 20.0 if norm == "l2" else 3.0, "norm": norm}
    alone = sharpness.worst_case(model, nn.CrossEntropyLoss(), data, **options)
    with_restarts = sharpness.worst_case(model, nn.CrossEntropyLoss(), data, restarts=3, **options)
    assert with_restarts.value > 1
    assert alone.value > 0.5 * with_restarts.value
    assert alone.cost == pytest.approx(20 + 1 / 3)  # no more than a search from any other point


def test_one_step_at_a_point_without_a_gradient_is_none_as_the_optimizers():
    model, data = saturated()
    assert sharpness.worst_case(model, nn.CrossEntropyLoss(), data, rho=20.0, steps=1).value == 0


def test_a_constant_loss_stays_flat():
    model, data = saturated(scale=0.0)
    model[2].requires_grad_(False)
    result = sharpness.worst_case(model, nn.CrossEntropyLoss(), data, rho=1.0)
    assert result.value == 0 and result.loss == pytest.approx(math.log(2))
