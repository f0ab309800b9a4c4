"""Wherever a model keeps its state, a step of two passes leaves what one forward at w leaves."""

from __future__ import annotations

import copy
import random
import warnings
from array import array
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import samopt
from tests.helpers.cases import assert_same
from tests.helpers.two_passes import FORMS, assert_leaves_no_trace, by_hand, state_of, watched_step

each_form = pytest.mark.parametrize("form", FORMS)


class Stateful(nn.Module):
    """A small network whose forward also does what a subclass adds."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.set_up()

    def set_up(self):
        pass

    def update(self, hidden):
        return hidden

    def forward(self, x):
        return self.last(self.update(torch.tanh(self.first(x))))


def mean_of(hidden):
    return hidden.detach().mean(0)


class ReplacedBuffer(Stateful):
    def set_up(self):
        self.register_buffer("average", torch.zeros(8))

    def update(self, hidden):
        self.average = 0.9 * self.average + 0.1 * mean_of(hidden)
        return hidden


class HiddenStateInABuffer(Stateful):
    def set_up(self):
        self.register_buffer("hidden", torch.zeros(8))

    def update(self, hidden):
        hidden = hidden + 0.5 * self.hidden
        self.hidden = mean_of(hidden)
        return hidden


class AnnealedBuffer(Stateful):
    def set_up(self):
        self.register_buffer("temperature", torch.tensor(1.0))

    def update(self, hidden):
        self.temperature = self.temperature * 0.5
        return hidden / self.temperature


class BufferMadeAtTheFirstCall(Stateful):
    def update(self, hidden):
        if "scale" not in self._buffers:
            self.register_buffer("scale", mean_of(hidden).abs() + 0.1)
            return hidden * 3
        return hidden / self.scale


class ResizedBuffer(Stateful):
    def set_up(self):
        self.register_buffer("bank", torch.zeros(0, 8))

    def update(self, hidden):
        with torch.no_grad():
            rows = len(self.bank)
            self.bank.resize_(rows + 1, 8)
            self.bank[rows] = mean_of(hidden)
        return hidden


class ShrinkingBuffer(Stateful):
    def set_up(self):
        self.register_buffer("bank", torch.ones(20, 8))

    def update(self, hidden):
        self.bank.data = self.bank.data[1:].clone()
        return hidden


class AddedBuffers(Stateful):
    def update(self, hidden):
        self.register_buffer(f"seen_{len(self._buffers)}", mean_of(hidden))
        return hidden


class RemovedBuffer(Stateful):
    def set_up(self):
        for i in range(9):
            self.register_buffer(f"left_{i}", torch.full((2,), float(i)))

    def update(self, hidden):
        del self._buffers[next(iter(self._buffers))]
        return hidden


class IntegersAndFlags(Stateful):
    def set_up(self):
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("used", torch.zeros(8, dtype=torch.bool))
        self.register_buffer("ready", torch.tensor(False))

    def update(self, hidden):
        self.calls += 1
        self.used |= hidden.detach().amax(0) > 0.5
        self.ready.fill_(True)
        return hidden


class WrittenThroughData(Stateful):
    def set_up(self):
        self.register_buffer("average", torch.zeros(8))

    def update(self, hidden):
        self.average.data.mul_(0.9).add_(0.1 * mean_of(hidden))
        return hidden


class LargeCodebook(Stateful):
    """100,000 elements, updated through ``.data``, which leaves the version counter alone."""

    def set_up(self):
        self.register_buffer("codes", torch.randn(12_500, 8))

    def update(self, hidden):
        self.codes.data.mul_(0.99).add_(0.01 * mean_of(hidden))
        return hidden


class FewRowsOfALargeCodebook(Stateful):
    def set_up(self):
        self.register_buffer("codes", torch.randn(12_500, 8))

    def update(self, hidden):
        with torch.no_grad():
            self.codes[7] += mean_of(hidden)
        return hidden


class CodebookParameter(Stateful):
    def set_up(self):
        self.codes = nn.Parameter(torch.randn(12_500, 8), requires_grad=False)

    def update(self, hidden):
        self.codes.data.mul_(0.99).add_(0.01 * mean_of(hidden))
        return hidden


class MomentumEncoder(Stateful):
    def set_up(self):
        self.teacher = copy.deepcopy(self.first).requires_grad_(False)

    def update(self, hidden):
        with torch.no_grad():
            for theirs, ours in zip(self.teacher.parameters(), self.first.parameters(), strict=True):
                theirs.lerp_(ours, 0.1)
        return hidden + 0.1 * self.teacher.bias


class MomentumEncoderThroughData(Stateful):
    def set_up(self):
        self.teacher = copy.deepcopy(self.first).requires_grad_(False)

    def update(self, hidden):
        for theirs, ours in zip(self.teacher.parameters(), self.first.parameters(), strict=True):
            theirs.data = theirs.data * 0.9 + ours.data * 0.1
        return hidden


class TargetNetworkReplaced(Stateful):
    def set_up(self):
        self.teacher = copy.deepcopy(self.first)

    def update(self, hidden):
        self.teacher = copy.deepcopy(self.first).requires_grad_(False)
        return hidden


class StatisticsInParameters(Stateful):
    def set_up(self):
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)
        self.count = nn.Parameter(torch.zeros(()), requires_grad=False)

    def update(self, hidden):
        self.mean.data.lerp_(mean_of(hidden), 0.1)
        self.count.data += 1
        return hidden


class TrainableWrittenInForward(Stateful):
    """A parameter that the optimizer trains, which has no gradient: a frozen prototype."""

    def set_up(self):
        self.prototype = nn.Parameter(torch.zeros(8))

    def update(self, hidden):
        self.prototype.data.lerp_(mean_of(hidden), 0.5)
        return hidden + self.prototype.detach()


class HiddenState(Stateful):
    def set_up(self):
        self.hidden = None

    def update(self, hidden):
        if self.hidden is not None:
            hidden = hidden + 0.5 * self.hidden.mean(0)
        self.hidden = hidden.detach()
        return hidden


class HiddenTuple(Stateful):
    def set_up(self):
        self.hidden = (torch.zeros(8), torch.zeros(8))

    def update(self, hidden):
        hidden = hidden + self.hidden[0]
        self.hidden = (mean_of(hidden), self.hidden[0])
        return hidden


class TensorAttributeInPlace(Stateful):
    def set_up(self):
        self.running = torch.zeros(8, dtype=torch.float64)

    def update(self, hidden):
        self.running.lerp_(mean_of(hidden), 0.3)
        return hidden


class LargeTensorAttributeThroughData(Stateful):
    def set_up(self):
        self.running = torch.zeros(12_500, 8, dtype=torch.float64)

    def update(self, hidden):
        self.running.data.add_(mean_of(hidden))
        return hidden


class Counters(Stateful):
    def set_up(self):
        self.calls, self.name, self.seen_training = 0, "start", None

    def update(self, hidden):
        self.calls += 1
        self.name = f"call {self.calls}"
        self.seen_training = self.training
        return hidden


class Containers(Stateful):
    def set_up(self):
        self.history, self.recent = [], deque(maxlen=3)
        self.by_name, self.shapes = {"calls": 0}, set()
        self.ordered = OrderedDict(a=1, b=2)

    def update(self, hidden):
        self.history.append(float(hidden.detach().sum()))
        self.recent.append(mean_of(hidden))
        self.by_name["calls"] += 1
        self.by_name.setdefault("first", mean_of(hidden))
        self.shapes.add((tuple(hidden.shape), len(self.history)))
        self.ordered.move_to_end("a")
        return hidden


class NestedContainers(Stateful):
    def set_up(self):
        self.metrics = {
            "train": {"loss": [], "counts": [0, 0]},
            "held": ([], {"x": torch.zeros(8, dtype=torch.float64)}),
        }

    def update(self, hidden):
        self.metrics["train"]["loss"].append(float(hidden.detach().sum()))
        self.metrics["train"]["counts"][1] += 1
        self.metrics["held"][0].append(1)
        self.metrics["held"][1]["x"].add_(mean_of(hidden))
        return hidden


class NewAttributes(Stateful):
    def update(self, hidden):
        made = [name for name in vars(self) if name.startswith("made_")]
        setattr(self, f"made_{len(made)}", mean_of(hidden))
        self.cache = {"hidden": mean_of(hidden)}
        return hidden


class DeletedAttribute(Stateful):
    def set_up(self):
        self.waiting = {"once": 1}

    def update(self, hidden):
        if hasattr(self, "waiting"):
            del self.waiting
            return hidden * 1.5
        return hidden


class ModeChanged(Stateful):
    def update(self, hidden):
        self.last.train(not self.last.training)
        return hidden


class Tally:
    """A user's own object, without a method that torch knows."""

    def __init__(self):
        self.calls, self.total = 0, torch.zeros(8, dtype=torch.float64)

    def add(self, values):
        self.calls += 1
        self.total = self.total + values


class ObjectInAttribute(Stateful):
    def set_up(self):
        self.tally, self.tallies = Tally(), [Tally()]

    def update(self, hidden):
        self.tally.add(mean_of(hidden))
        self.tallies[0].add(mean_of(hidden))
        return hidden


class Mask:
    """An augmentation: called like a function, with a generator and a counter of its own."""

    def __init__(self):
        self.generator, self.calls = torch.Generator().manual_seed(5), 0

    def __call__(self, hidden):
        self.calls += 1
        return hidden * (torch.rand(8, generator=self.generator, dtype=hidden.dtype) > 0.3)


class CallableInAttribute(Stateful):
    def set_up(self):
        self.mask, self.masks = Mask(), {"inner": [Mask()]}

    def update(self, hidden):
        return self.masks["inner"][0](self.mask(hidden))


class Trainer:
    """An object that holds other objects, one of which holds it."""

    def __init__(self):
        self.tally, self.mask, self.owner = Tally(), Mask(), {}
        self.owner["trainer"] = self


class ObjectsInObjects(Stateful):
    def set_up(self):
        self.trainer = Trainer()

    def update(self, hidden):
        self.trainer.tally.add(mean_of(hidden))
        return self.trainer.mask(hidden)


class Slotted:
    __slots__ = ("calls", "later", "total")

    def __init__(self):
        self.calls, self.total = 0, torch.zeros(8, dtype=torch.float64)


class SlottedObject(Stateful):
    def set_up(self):
        self.slotted = Slotted()

    def update(self, hidden):
        self.slotted.calls += 1
        self.slotted.later = mean_of(hidden)
        self.slotted.total += mean_of(hidden)
        return hidden * self.slotted.calls


class ArraysOfPython(Stateful):
    def set_up(self):
        self.flags, self.sums = bytearray(2), array("d", [0.0])

    def update(self, hidden):
        self.flags.append(1)
        self.sums[0] += float(hidden.detach().sum())
        return hidden * len(self.flags)


class ScheduledRates(Stateful):
    """A forward that schedules the numbers of torch's own modules."""

    def set_up(self):
        self.drop, self.norm = nn.Dropout(0.1), nn.BatchNorm1d(8)

    def update(self, hidden):
        self.drop.p += 0.1
        self.norm.momentum *= 0.5
        return self.norm(self.drop(hidden))


class ArrayInAttribute(Stateful):
    def set_up(self):
        self.counts, self.totals = np.zeros(8), {"x": np.zeros((20_000, 8))}

    def update(self, hidden):
        self.counts += mean_of(hidden).numpy()
        self.totals["x"][3] += 1
        return hidden


class OwnGenerators(Stateful):
    """Draws from generators of its own: both passes must draw the same."""

    def set_up(self):
        self.torch_generator = torch.Generator().manual_seed(1)
        self.numpy_generator, self.old_numpy = np.random.default_rng(2), np.random.RandomState(3)
        self.python_generator = random.Random(4)

    def update(self, hidden):
        mask = torch.rand(8, generator=self.torch_generator, dtype=hidden.dtype) > 0.3
        scale = self.numpy_generator.random() + self.old_numpy.rand() + self.python_generator.random()
        return hidden * mask * scale


class GrownModuleList(Stateful):
    def set_up(self):
        self.adapters = nn.ModuleList()

    def update(self, hidden):
        self.adapters.append(nn.Linear(8, 8, dtype=torch.float64))
        return self.adapters[-1](hidden)


class GrownParameterList(Stateful):
    def set_up(self):
        self.scales = nn.ParameterList()

    def update(self, hidden):
        self.scales.append(nn.Parameter(torch.full((8,), 1.5, dtype=torch.float64)))
        return hidden * self.scales[-1]


class StateInATorchModule(Stateful):
    """Attributes that a hook leaves on a module of torch's own."""

    def set_up(self):
        self.first.register_forward_hook(keep_activation)

    def update(self, hidden):
        return hidden


def keep_activation(module, args, output):
    module.activation = output.detach().mean(0)
    module.calls = getattr(module, "calls", 0) + 1


class BatchNormed(Stateful):
    def set_up(self):
        self.norm = nn.BatchNorm1d(8)

    def update(self, hidden):
        return self.norm(hidden)


class CumulativeBatchNorm(Stateful):
    def set_up(self):
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def update(self, hidden):
        return self.norm(hidden)


class SpectralNorm(Stateful):
    def set_up(self):
        self.middle = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def update(self, hidden):
        return self.middle(hidden)


class Dropped(Stateful):
    def set_up(self):
        self.drop = nn.Dropout(0.4)
        self.register_buffer("average", torch.zeros(8))

    def update(self, hidden):
        hidden = self.drop(hidden)
        self.average.lerp_(mean_of(hidden), 0.1)
        return hidden


KINDS = {each.__name__: each for each in Stateful.__subclasses__()}


def make(kind):
    torch.manual_seed(0)
    return KINDS[kind]().double()


def loss_on(seed):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda model: nn.functional.cross_entropy(model(x), torch.arange(10) % 3)


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@each_form
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_one_forward(kind, form):
    take_steps(kind, form, owns="trainable")


@pytest.mark.parametrize(
    "kind", ["MomentumEncoder", "MomentumEncoderThroughData", "StatisticsInParameters", "CodebookParameter"]
)
def test_state_is_that_of_one_forward_where_the_optimizer_has_parameters_without_gradient(kind):
    take_steps(kind, "perturbed", owns="all")


def take_steps(kind, form, owns):
    model = make(kind)
    parameters = [p for p in model.parameters() if owns == "all" or p.requires_grad]
    optimizer = samopt.SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.3, model=model)
    owned = [name for name, p in model.named_parameters() if any(p is each for each in parameters)]
    for seed in range(3):
        want = by_hand(model, loss_on(seed), owned, 0.3, seed)
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(seed), seed), want)


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_one_forward_after_a_second_pass_that_fails(kind):
    model = make(kind)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    owned = trainable(model)
    want = by_hand(model, loss_on(0), owned, 0.3)
    torch.manual_seed(0)
    loss_on(0)(model).backward()
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():
        loss_on(0)(model)
        raise ZeroDivisionError
    assert_same(state_of(model), want.state)
    optimizer.zero_grad()
    want = by_hand(model, loss_on(1), [name for name in owned if name in dict(model.named_parameters())], 0.3)
    assert_leaves_no_trace(watched_step(model, optimizer, "perturbed", loss_on(1)), want)


def weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)
    return lambda: torch._weight_norm(module.weight_v, module.weight_g, 0)


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.4)
    return lambda: module.weight_orig * module.weight_mask


def bound_in_a_hook(module):
    weight = module._parameters.pop("weight")
    module.register_parameter("raw", weight)
    module.register_forward_pre_hook(lambda module, args: setattr(module, "weight", torch.tanh(module.raw)))
    return lambda: torch.tanh(module.raw)


@each_form
@pytest.mark.parametrize("reparametrize", [weight_norm, pruned, bound_in_a_hook])
def test_a_weight_that_hooks_compute_is_the_one_of_the_weights_after_the_passes(reparametrize, form):
    model = make("Counters")
    computed = reparametrize(model.first)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3, model=model)  # a step changes nothing
    FORMS[form](optimizer, lambda: loss_on(0)(model))
    assert torch.equal(model.first.weight, computed())


def test_a_large_part_that_does_not_change_is_not_copied():
    torch.manual_seed(0)
    backbone = nn.Sequential(*[nn.Linear(100, 100) for _ in range(5)]).requires_grad_(False)
    head = nn.Linear(100, 3)
    backbone.register_buffer("table", torch.zeros(300, 300))
    model = nn.Sequential(backbone, head)
    optimizer = samopt.SAM(torch.optim.SGD(head.parameters(), lr=0.1), rho=0.1, model=model)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 100)).square().mean().backward()
        with optimizer.perturbed():
            copies = optimizer._passes._replay.state._copies
            copied = sum(copy.values.numel() for copy in copies)
            model(torch.ones(4, 100)).square().mean().backward()
        optimizer.step()
        assert copied <= 5 * 100, step  # the biases, which are small
