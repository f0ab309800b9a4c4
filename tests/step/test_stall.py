"""The warning about a radius that holds the model at its start: where it is due, and where it is not."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.stall_warning import StallDetector
from samopt.step_metrics import StepMetrics

REMEDY = r"(?s)still at its starting level.*smaller rho.*linear_warmup.*warn_on_stall=False"


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def conv_net(seed):
    """No normalisation: at its start it answers every image alike, which is a saddle."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def train(model, data, rho, *, steps=100, lr=0.1, seed=0, **options):
    """Train with SAM on batches of 64; return the warnings and the mean loss of the last ten steps."""
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), rho=rho, **options)
    images, labels = data
    generator, losses = torch.Generator().manual_seed(seed), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            batch = torch.randint(len(images), (64,), generator=generator)

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                return loss

            losses.append(float(optimizer.step(closure).detach()))
    return [str(w.message) for w in caught], sum(losses[-10:]) / 10


@pytest.mark.parametrize("seed", [0, 1])
def test_a_radius_that_holds_a_network_at_its_start_is_named_once(digits, seed):
    messages, loss = train(conv_net(seed), digits, 0.5, seed=seed)
    assert loss == pytest.approx(math.log(10), abs=0.03)  # it has learned nothing
    assert len(messages) == 1
    with pytest.warns(UserWarning, match=REMEDY):
        warnings.warn(messages[0], stacklevel=1)
    assert "after 100 perturbed steps" in messages[0] and "of radius 0.5" in messages[0]

    messages, loss = train(conv_net(seed), digits, 0.05, seed=seed)  # the smaller rho that it advises
    assert loss < 1.0 and not messages


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("form", ["closure", "explicit"])
def test_the_warning_can_be_turned_off_and_comes_once_in_either_form(form, on):
    noise, w = torch.Generator().manual_seed(0), nn.Parameter(torch.zeros(4))
    optimizer = samopt.SAM(torch.optim.SGD([w], lr=1e-3), rho=0.5, warn_on_stall=on)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(220):
            slope = 0.1 * torch.randn(4, generator=noise)

            def one_pass(slope=slope):
                optimizer.zero_grad()
                loss = 1 + w @ slope + 0.05 * slope[0] + 0.1 * w.square().sum()
                loss.backward()
                return loss

            if form == "closure":
                optimizer.step(one_pass)
                continue
            with optimizer.perturbed(loss=one_pass()) as second:
                second.loss = one_pass()
            optimizer.step()
    assert [("starting level" in str(w.message), w.category) for w in caught] == [(True, UserWarning)] * on
    assert all(w.filename == __file__ for w in caught)  # it points at the loop, not into the library


def test_labels_that_nobody_can_learn_are_not_the_perturbations_fault(digits):
    noise = digits[0], torch.randint(10, digits[1].shape, generator=torch.Generator().manual_seed(0))
    messages, loss = train(conv_net(0), noise, 0.05)
    assert loss > 2.2 and not messages
    plain, plain_loss = train(conv_net(0), noise, 0.0)
    assert plain_loss > 2.2 and not plain  # it is no better without a perturbation


def test_a_learning_rate_that_is_too_small_is_not_the_perturbations_fault(digits):
    messages, loss = train(conv_net(0), digits, 0.05, lr=1e-4)
    assert loss > 2.2 and not messages


@pytest.fixture(scope="module")
def trained(digits):
    model = conv_net(0)
    train(model, digits, 0.0, steps=150)
    return model


@pytest.mark.parametrize("rho, batch", [(0.05, "varied"), (0.2, "varied"), (0.2, "whole")])
def test_a_fine_tune_that_stays_where_it_was_is_no_stall(digits, trained, rho, batch):
    data = (digits[0][:64], digits[1][:64]) if batch == "whole" else digits
    messages, loss = train(copy.deepcopy(trained), data, rho, lr=1e-6)
    assert loss < 0.5 and not messages


def metrics_of(loss, rise, norm, perturbed_norm):
    one = torch.tensor(1.0, dtype=torch.float64)
    return StepMetrics(
        loss=loss if isinstance(loss, Tensor) else one * loss,
        perturbed_loss=one * loss + rise,
        grad_norm=one * norm,
        perturbed_grad_norm=one * perturbed_norm,
        radius=one * 0.5,
        applied_radius=one * 0.5,
    )


def wave(step):
    """A steady wobble without trend or a period that fits the windows."""
    return math.sin(2.4 * step)


# (loss, rise, gradient norm, perturbed gradient norm) by step, and the steps at which there is a warning.
TRACES = {
    "held": (lambda t: (2.3 + 0.01 * wave(t), 0.05, 0.1, 0.15), [100]),
    "held, negative loss": (lambda t: (-2.3 + 0.01 * wave(t), 0.05, 0.1, 0.15), [100]),
    "held, gradient shrinks": (lambda t: (2.3 + 0.01 * wave(t), 0.05, 0.1, 0.05), [100]),
    "held from the second check on": (
        lambda t: (2.3 + (0.3 if 10 < t < 90 else 0.01) * wave(t), 0.05, 0.1, 0.15),
        [200],
    ),
    "held from the third check on": (
        lambda t: (2.3 + (0.3 if 10 < t < 190 else 0.01) * wave(t), 0.05, 0.1, 0.15),
        [400],
    ),
    "held too late to look": (lambda t: (2.3 + (0.3 if 10 < t < 390 else 0.01) * wave(t), 0.05, 0.1, 0.15), []),
    "falls": (lambda t: (2.3 * 0.995**t + 0.01 * wave(t), 0.05, 0.1, 0.15), []),
    "falls slowly": (lambda t: (2.3 - 1e-4 * t + 1e-4 * wave(t), 0.05, 0.1, 0.15), []),
    "falls to another level": (lambda t: (5.0 if t < 10 else 2.3 + 0.01 * wave(t), 0.05, 0.1, 0.15), []),
    "differs by batch": (lambda t: (2.3 + 0.2 * wave(t), 0.05, 0.1, 0.15), []),
    "constant: nothing is trained": (lambda t: (2.3, 0.05, 0.1, 0.15), []),
    "near a minimum": (lambda t: (0.1 + 0.001 * wave(t), 0.06, 0.1, 0.15), []),
    "the gradient is the base's own": (lambda t: (2.3 + 0.01 * wave(t), 0.05, 0.1, 0.105), []),
    "not a number": (lambda t: (math.nan, 0.05, 0.1, 0.15), []),
    "infinities": (lambda t: ((-1) ** t * math.inf, math.inf, 0.1, 1e300), []),
    "huge": (lambda t: (1e308 * wave(t), 1e308, 1e308, 1e308), []),
    "no gradient": (lambda t: (2.3 + 0.01 * wave(t), 0.05, 0.0, 0.0), []),
    "zero": (lambda t: (0.0, 0.0, 0.0, 0.0), []),
}


def warned_at(detector, trace, steps=range(1, 500)):
    at = []
    for step in steps:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            detector.observe(trace(step))
        at += [step] * len(caught)
    return at


@pytest.mark.parametrize("name", TRACES)
def test_each_condition_decides_by_itself(name):
    trace, expected = TRACES[name]
    assert warned_at(StallDetector(), lambda step: metrics_of(*trace(step))) == expected


@pytest.mark.parametrize("name", ["held", "falls"])
def test_a_loss_that_is_written_into_the_same_memory_every_step_is_copied(name):
    trace, expected = TRACES[name]
    memory = torch.zeros((), dtype=torch.float64)

    def observed(step):
        loss, *others = trace(step)
        return metrics_of(memory.fill_(loss), *others)

    assert warned_at(StallDetector(), observed) == expected


def test_steps_without_a_perturbation_or_norms_do_not_count():
    held = TRACES["held"][0]
    detector = StallDetector()
    plain = StepMetrics(loss=torch.tensor(9.0), radius=torch.tensor(0.0))
    assert warned_at(detector, lambda step: plain if step <= 50 else metrics_of(*held(step))) == [150]
    for missing in ("loss", "perturbed_loss", "grad_norm", "perturbed_grad_norm"):
        without = {missing: None}
        assert warned_at(StallDetector(), lambda t, w=without: StepMetrics(**{**vars(metrics_of(*held(t))), **w})) == []


def test_a_copy_goes_on_watching_and_a_resumed_run_is_past_its_start():
    held = TRACES["held"][0]
    detector = StallDetector()
    warned_at(detector, lambda step: metrics_of(*held(step)), range(1, 80))
    for watcher in (copy.deepcopy(detector), detector):
        assert warned_at(watcher, lambda step: metrics_of(*held(step)), range(80, 300)) == [100]

    def resumed_at(state):
        (w,) = [nn.Parameter(torch.ones(2))]
        optimizer = samopt.SAM(torch.optim.SGD([w], lr=0.0, momentum=0.9), rho=0.5)
        w.grad = torch.ones(2)
        if state:
            with optimizer.perturbed():
                w.grad = torch.ones(2)
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return warned_at(optimizer._stall, lambda step: metrics_of(*held(step)))

    assert resumed_at(state=False) == [100]  # accelerate loads a fresh optimizer's state into itself
    assert resumed_at(state=True) == []


def test_losses_are_read_on_the_host_at_the_three_checks_only(monkeypatch):
    now, reads = [0], []
    for reader in ("item", "tolist", "__float__", "__bool__", "__int__", "numpy", "cpu", "__array__"):
        original = getattr(Tensor, reader)

        def counted(self, *args, original=original, **kwargs):
            reads.append(now[0])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, reader, counted)
    trace = TRACES["falls"][0]
    made = {step: metrics_of(*trace(step)) for step in range(1, 500)}

    def observed(step):
        now[0] = step
        return made[step]

    assert warned_at(StallDetector(), observed) == []
    assert sorted(set(reads)) == [100, 200, 400]
