"""A measure evaluates the loss again and again: every evaluation begins with the same state and the same batch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

import samopt
from samopt import sharpness

MEASURES = {
    "worst_case": partial(sharpness.worst_case, rho=0.1, steps=3),
    "average_case": partial(sharpness.average_case, rho=0.1, samples=2),
    "trace": partial(sharpness.hessian_trace, samples=2),
    "gauss_newton": partial(sharpness.gauss_newton_eigenvalues, tolerance=0.1),
    "landscape": partial(sharpness.landscape, points=3),
    "quantization": sharpness.quantization,
    "fgsm": sharpness.fgsm,
    "forgetting": lambda model, loss, batches, **options: sharpness.forgetting(
        model, loss, batches, batches[:1], steps=4, **options
    ),
}


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(2)]


class Stateless(nn.Module):
    """What the models below compute in their first call."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def shift(self, outputs):
        return torch.ones(3)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs * self.shift(outputs.detach())


class CountsInABuffer(Stateless):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))

    def shift(self, outputs):
        self.calls += 1
        return self.calls.clone()


class CountsInAnAttribute(Stateless):
    calls = 0

    def shift(self, outputs):
        self.calls += 1
        return torch.full((3,), float(self.calls))


class CountsInAList(Stateless):
    def __init__(self):
        super().__init__()
        self.calls = []

    def shift(self, outputs):
        self.calls.append(None)
        return torch.full((3,), float(len(self.calls)))


class KeepsAHiddenState(Stateless):
    hidden = None

    def shift(self, outputs):
        before, self.hidden = self.hidden, outputs.mean(0)
        return torch.ones(3) if before is None else before


MODELS = [CountsInABuffer, CountsInAnAttribute, CountsInAList, KeepsAHiddenState]


def values_of(result):
    found = result.to_dict()
    del found["settings"]
    return found


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", [name for name in MEASURES if name != "forgetting"])  # its copy's state goes on
def test_a_model_with_a_state_is_measured_from_its_state_now(name, kind, mode):
    model, measure = kind(), MEASURES[name]
    before = copy.deepcopy(model.state_dict())
    found = measure(model, nn.CrossEntropyLoss(), batches(), mode=mode)
    assert values_of(found) == values_of(measure(Stateless(), nn.CrossEntropyLoss(), batches(), mode=mode))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert getattr(model, "hidden", None) is None
    assert isinstance(model, CountsInABuffer) or getattr(model, "calls", None) in (None, 0, [])


@pytest.mark.parametrize("how", ["inputs in place", "a dict is emptied"])
@pytest.mark.parametrize("name", MEASURES)
def test_a_loss_that_changes_its_batch_gets_a_fresh_one_each_time(name, how):
    def changing(model, batch):
        inputs, labels = (batch.pop("inputs"), batch.pop("labels")) if isinstance(batch, dict) else batch
        return functional.cross_entropy(model(inputs.sub_(0.5).mul_(2)), labels)

    def clean(model, batch):
        return functional.cross_entropy(model((batch[0] - 0.5) * 2), batch[1])

    data = batches()
    given = [{"inputs": x.clone(), "labels": y} for x, y in data] if how == "a dict is emptied" else batches()
    found = MEASURES[name](linear(), changing, given)
    assert values_of(found) == values_of(MEASURES[name](linear(), clean, data))
    for (inputs, labels), after in zip(data, given, strict=True):
        after = (after["inputs"], after["labels"]) if isinstance(after, dict) else after
        assert torch.equal(after[0], inputs) and torch.equal(after[1], labels)


def test_find_rho_trains_every_step_on_a_fresh_batch():
    def changing(model, batch):
        return functional.cross_entropy(model(batch[0].sub_(0.5).mul_(2)), batch[1])

    def clean(model, batch):
        return functional.cross_entropy(model((batch[0] - 0.5) * 2), batch[1])

    found = [
        samopt.find_rho(
            linear(), loss, batches() * 3, optimizer=partial(torch.optim.SGD, lr=0.1), radii=(0.1,), steps=6, folds=2
        )
        for loss in (changing, clean)
    ]
    assert values_of(found[0]) == values_of(found[1])


class Centred(nn.Module):
    """A loss with a state and a weight of its own, as a center loss has them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, outputs, labels):
        with torch.no_grad():
            self.centre.lerp_(outputs.mean(0), 0.5)
        return functional.cross_entropy(self.scale * (outputs - self.centre), labels)


def first_centred(model, batch):
    outputs = model(batch[0])
    return functional.cross_entropy(2 * (outputs - 0.5 * outputs.detach().mean(0)), batch[1])


@pytest.mark.parametrize("name", [name for name in MEASURES if name not in ("forgetting", "gauss_newton")])
def test_a_loss_with_a_state_is_measured_from_its_state_now(name):
    loss = Centred()
    found = MEASURES[name](linear(), loss, batches())
    expected = MEASURES[name](linear(), first_centred, batches())
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    assert loss.centre.count_nonzero() == 0 and loss.scale.grad is None


def test_a_loss_with_weights_is_left_alone_by_what_trains_copies():
    loss, model = Centred(), linear()
    sharpness.forgetting(model, loss, batches(), batches(), steps=3)
    assert loss.centre.count_nonzero() == 0 and loss.scale.grad is None

    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    samopt.find_rho(model, loss, batches() * 3, optimizer=optimizer, radii=(0.1,), steps=4, folds=2)
    assert loss.centre.count_nonzero() == 0 and loss.scale.grad is None and loss.scale.item() == 2.0


def test_find_rho_trains_the_weights_of_the_loss_with_the_model():
    """Oracle: model and loss in one module, whose copy is trained as a whole."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.loss = linear(), Centred()

    options = {"radii": (0.1,), "steps": 6, "folds": 2}
    model, loss = linear(), Centred()
    own = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    found = samopt.find_rho(model, loss, batches() * 3, optimizer=own, **options)
    whole = Whole()
    base = torch.optim.SGD(whole.parameters(), lr=0.1)
    expected = samopt.find_rho(
        whole,
        lambda both, batch: both.loss(both.model(batch[0]), batch[1]),
        batches() * 3,
        optimizer=base,
        accuracy_fn=lambda both, batch: sharpness.accuracy(both.model, batch),
        **options,
    )
    assert found.gains == expected.gains and found.loss_rises == pytest.approx(expected.loss_rises, abs=1e-6)


def test_a_weight_that_a_hook_computes_is_what_it_was():
    with pytest.warns(FutureWarning):
        model = nn.utils.weight_norm(linear())
    model(batches()[0][0])
    before = model.weight.detach().clone()
    sharpness.worst_case(model, nn.CrossEntropyLoss(), batches(), rho=1.0, steps=2)
    assert torch.equal(model.weight, before)


class Codebook(Stateless):
    """Writes into a parameter that is not trained."""

    def __init__(self, size):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(size, 3), requires_grad=False)

    def shift(self, outputs):
        with torch.no_grad():
            self.codes.add_(1)
        return self.codes[0].clone()


@pytest.mark.parametrize(("size", "mode"), [(10, "train"), (3000, "train")])
def test_a_frozen_parameter_that_the_forward_writes_is_put_back_in_training_mode(size, mode):
    model, plain = Codebook(size), Stateless()
    found = sharpness.average_case(model, nn.CrossEntropyLoss(), batches(), mode=mode)
    assert found.value == sharpness.average_case(plain, nn.CrossEntropyLoss(), batches(), mode=mode).value
    assert model.codes.count_nonzero() == 0


@pytest.mark.parametrize("name", MEASURES)
def test_a_forward_that_writes_into_its_weights_is_refused(name):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(5, 4, max_norm=0.5), nn.Linear(4, 3)

        def forward(self, words):
            return self.head(self.words(words.long()).mean(1))

    data = [(torch.arange(10.0).remainder(5).view(2, 5), torch.tensor([0, 2]))]
    with pytest.raises(ValueError, match=r"wrote into the parameter 'words.weight'.*max_norm"):
        MEASURES[name](Words(), nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_forgetting_trains_as_if_the_model_were_not_looked_at(mode):
    """Oracle: the same training by hand, without a look in between, with dropout and normalisation."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    data = batches()
    measured = model()
    torch.manual_seed(1)
    found = sharpness.forgetting(measured, nn.CrossEntropyLoss(), data[:1], data[1:], steps=8, mode=mode)

    twin = model()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(9):
        if step in (0, 8):
            looked_at = copy.deepcopy(twin).train(mode != "eval")
            state = torch.get_rng_state()
            torch.manual_seed(1)
            with torch.no_grad():
                losses.append(float(functional.cross_entropy(looked_at(data[0][0]), data[0][1])))
            torch.set_rng_state(state)
        optimizer.zero_grad()
        functional.cross_entropy(twin(data[1][0]), data[1][1]).backward()
        optimizer.step()
    assert found.value == pytest.approx(losses[1] - losses[0], abs=1e-6)


def test_forgetting_says_that_it_needs_a_function_for_the_optimizer():
    model = linear()
    with pytest.raises(TypeError, match=r"function that makes an optimizer.*functools.partial\(torch.optim.SGD"):
        sharpness.forgetting(
            model, nn.CrossEntropyLoss(), batches(), batches(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )


def test_inputs_that_require_a_gradient_still_do_in_every_evaluation():
    """As losses of differential equations need it. Oracle: the slope of a linear model is its weight."""

    def slope(model, batch):
        with torch.enable_grad():
            (derivative,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
        return derivative.square().mean()

    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 1), torch.randn(5, 3, requires_grad=True)
    expected = model.weight.detach().square().mean()
    assert sharpness.average_case(model, slope, [inputs], rho=0.0).loss == pytest.approx(float(expected))
    assert sharpness.worst_case(model, slope, [inputs], rho=0.0).loss == pytest.approx(float(expected))
    assert inputs.grad is None
