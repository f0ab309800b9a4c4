"""A forward may do what it likes with the memory of its weights: they are put back through the parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import samopt
from tests.helpers.two_passes import FORMS, assert_leaves_no_trace, by_hand, watched_step

each_form = pytest.mark.parametrize("form", FORMS)
each_backend = pytest.mark.parametrize("backend", ["auto", "cpu", "foreach", "reference"])


class Network(nn.Module):
    """A small classifier that does something to its weights before it uses them."""

    def __init__(self, touch):
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 3)
        object.__setattr__(self, "_touch", touch)

    def forward(self, x):
        type(self).touches[self._touch](self)
        return self.last(torch.tanh(self.first(x)))


def assign_data(model):
    model.first.weight.data = model.first.weight.data.clone()


def assign_a_transposed_layout(model):
    weight = model.first.weight
    weight.data = weight.data.t().clone(memory_format=torch.contiguous_format).t()


def assign_a_constrained_weight(model):
    model.first.weight.data = torch.renorm(model.first.weight.data, 2, 0, 0.5)


def assign_every_parameter(model):
    vector_to_parameters(parameters_to_vector(model.parameters()), model.parameters())


def swap_two_memories(model):
    a, b = model.first.bias.data, model.last.bias.data
    model.first.bias.data, model.last.bias.data = a.clone(), b.clone()


def set_to_a_copy(model):
    with torch.no_grad():
        model.last.weight.set_(model.last.weight.detach().clone())


def resize_and_refill(model):
    with torch.no_grad():
        weight, values = model.first.weight, model.first.weight.detach().clone()
        weight.data.resize_(0)
        weight.data = torch.empty(0, dtype=weight.dtype)
        weight.data = values


def free_and_refill_the_storage(model):
    weight = model.first.weight
    values, storage = weight.detach().clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    weight.data.copy_(values)


def clamp_in_place(model):
    with torch.no_grad():
        model.first.weight.clamp_(-0.2, 0.2)
        model.last.bias.data.clamp_(-0.1, 0.1)


def renormalise_in_place(model):
    model.last.weight.data.div_(model.last.weight.data.norm())


def write_through_a_view(model):
    model.first.weight.data[0] = 0.25


def write_through_numpy(model):
    model.first.weight.detach().numpy()[1] *= 0.5


def flatten_into_one_memory(model):
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)


def load_a_state_dict(model):
    model.first.load_state_dict({k: v.clone() for k, v in model.first.state_dict().items()})


Network.touches = {
    each.__name__: each
    for each in (
        assign_data,
        assign_a_transposed_layout,
        assign_a_constrained_weight,
        assign_every_parameter,
        swap_two_memories,
        set_to_a_copy,
        resize_and_refill,
        free_and_refill_the_storage,
        clamp_in_place,
        renormalise_in_place,
        write_through_a_view,
        write_through_numpy,
        flatten_into_one_memory,
        load_a_state_dict,
    )
}
each_touch = pytest.mark.parametrize("touch", Network.touches)


def network(touch="assign_data"):
    torch.manual_seed(0)
    return Network(touch).double()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(10, 6, generator=generator, dtype=torch.float64), torch.arange(10) % 3


def loss_on(seed):
    x, y = batch(seed)
    return lambda model: nn.functional.cross_entropy(model(x), y)


def assert_returns(touch, form, **options):
    model = network(touch)
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.2), rho=0.3, **(options or {"model": model}))
    names = [name for name, _ in model.named_parameters()]
    for seed in range(3):
        want = by_hand(model, loss_on(seed), names, 0.3)
        assert_leaves_no_trace(watched_step(model, optimizer, form, loss_on(seed)), want)


@each_form
@each_touch
def test_weights_return_whatever_a_forward_does_to_them(touch, form):
    assert_returns(touch, form)


@each_backend
@each_touch
def test_weights_return_with_every_backend_without_a_model(touch, backend):
    assert_returns(touch, "perturbed", backend=backend)


@each_backend
@each_touch
def test_nothing_moves_where_nothing_is_learned(touch, backend):
    model, twin = network(touch).float(), network(touch).float()
    optimizer = samopt.ASAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=2.0, model=model, backend=backend)
    x, y = batch()
    for _ in range(5):
        twin(x.float())  # what one pass at w leaves
        FORMS["backward"](optimizer, lambda: nn.functional.cross_entropy(model(x.float()), y))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Replacing(nn.Module):
    """Has other parameter objects after each forward, or after the first."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 3)
        self.how = how

    def forward(self, x):
        if self.how == "assigned":
            self.first.weight = nn.Parameter(self.first.weight.detach().clone())
        elif self.how == "loaded":
            self.first.load_state_dict({k: v.clone() for k, v in self.first.state_dict().items()}, assign=True)
        elif self.how == "registered":
            self.first.register_parameter("bias", nn.Parameter(self.first.bias.detach() + 1))
        elif self.how == "a new module":
            replacement = nn.Linear(6, 9).double()
            replacement.load_state_dict(self.first.state_dict())
            self.first = replacement
        elif not hasattr(self, "late"):
            self.late = nn.Parameter(torch.ones(9, dtype=torch.float64))
        hidden = torch.tanh(self.first(x))
        return self.last(hidden * self.late if self.how == "made late" else hidden)


@each_form
@pytest.mark.parametrize("how", ["assigned", "loaded", "registered", "a new module", "made late"])
def test_replaced_parameters_are_those_of_the_first_pass(how, form):
    torch.manual_seed(0)
    model = Replacing(how).double()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
    kept = {id(p) for p in model.parameters()}
    objects = []

    def compute_loss(each):
        loss = loss_on(0)(each)
        if each is model:
            objects.append([id(p) for p in model.parameters()])
        return loss

    owned = [name for name, _ in model.named_parameters()]
    # The optimizer has the objects from before: a replaced one has no gradient in the first pass and does not move.
    replaced = {
        "assigned": ["first.weight"],
        "loaded": ["first.weight", "first.bias"],
        "registered": ["first.bias"],
        "a new module": ["first.weight", "first.bias"],
        "made late": [],
    }[how]
    want = by_hand(model, compute_loss, [name for name in owned if name not in replaced], 0.3)
    got = watched_step(model, optimizer, form, compute_loss)
    assert_leaves_no_trace(got, want)
    assert [id(p) for p in model.parameters()] == objects[0]
    assert kept & set(objects[0])


def test_an_exception_after_the_memory_was_replaced_leaves_the_weights():
    for touch in Network.touches:
        model, twin = network(touch), network(touch)
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
        loss_on(0)(twin)
        loss_on(0)(model).backward()
        with pytest.raises(ZeroDivisionError), optimizer.perturbed():
            loss_on(0)(model).backward()
            raise ZeroDivisionError
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        want = by_hand(model, loss_on(1), [name for name, _ in model.named_parameters()], 0.3)
        assert_leaves_no_trace(watched_step(model, optimizer, "perturbed", loss_on(1)), want)
