"""One pass along the momentum for each kind of module: every step is that of a loop by hand in fp64."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint

import samopt
from tests.helpers.cases import bits, same_bits
from tests.helpers.one_pass import RHO, assert_close, hand_step, momenta_of, one_pass, sgd, train_both

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:dropout option adds dropout")


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cells, self.head = kind(5, 6, batch_first=True, **options), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = (
            nn.MultiheadAttention(6, 2, batch_first=True, dropout=0.2, **options),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x[..., :1]], -1)
        return self.head(self.attention(x, x, x)[0].mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)
        self.alias = self.head  # a module under two names

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.second(torch.tanh(self.first(x.mean(1)))))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.ParameterList([torch.randn(5, 5), torch.randn(5, 3)])
        self.others = nn.ParameterDict({"scale": torch.ones(3), "shift": torch.zeros(3)})

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return x * self.others["scale"] + self.others.shift


class Used(nn.Module):
    """Reads the weights of modules in it, and never calls them."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.scale, nn.Parameter)
        return self.scale * nn.functional.linear(x.mean(1), self.inner.weight, self.inner.bias)


class Embedded(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.table, self.head = kind(7, 6, **options), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table(x[..., 0].abs().mul(10).long() % 7)
        return self.head(found if found.dim() == 2 else found.mean(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant, dropout=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3 if dropout else 0.0), nn.Linear(8, 3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x.mean(1).requires_grad_(), use_reentrant=self.reentrant)


class Functional(nn.Module):
    """Runs a part on tensors that it computes, as a hypernetwork or a step of MAML does."""

    def __init__(self, container=False):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(()))
        self.part = nn.Sequential(self.inner, nn.Tanh()) if container else self.inner

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(1)
        fast = {name: p * self.scale for name, p in self.part.named_parameters()}
        given = {name: torch.full_like(p, 0.1) * self.scale for name, p in fast.items()}
        return torch.func.functional_call(self.part, given, (x,)) + self.part(x)


class Transformed(nn.Module):
    """Differentiates a part of itself with ``torch.func`` while it runs."""

    def __init__(self):
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.func.vmap(torch.func.grad(lambda row: self.net(row).sum()))(x.mean(1)))


def parametrized(how):
    layer = nn.Linear(5, 5)
    if how == "old weight_norm":
        layer = old_weight_norm(layer)
    elif how == "old spectral_norm":
        layer = old_spectral_norm(layer)
    else:
        layer = getattr(parametrizations, how)(layer)
    return nn.Sequential(Mean(), layer, nn.Tanh(), nn.Linear(5, 3))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def convolutional():
    return nn.Sequential(
        nn.Conv1d(4, 6, 3),
        nn.BatchNorm1d(6),
        nn.PReLU(),
        nn.GroupNorm(2, 6),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


KINDS = {
    "convolution, norms, dropout": convolutional,
    "rnn": lambda: Recurrent(nn.RNN),
    "lstm": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm, projected": lambda: Recurrent(nn.LSTM, proj_size=4),
    "gru": lambda: Recurrent(nn.GRU, dropout=0.5, num_layers=2),
    "attention": Attending,
    "attention, other widths": lambda: Attending(kdim=6, vdim=6, bias=False, add_bias_kv=True),
    "transformer layer": lambda: nn.Sequential(
        nn.TransformerEncoderLayer(5, 1, 8, batch_first=True), Mean(), nn.Linear(5, 3)
    ),
    "tied": Tied,
    "lists of parameters": Listed,
    "weights of parts": Used,
    "embedding": lambda: Embedded(nn.Embedding, padding_idx=0, scale_grad_by_freq=True),
    "bag of embeddings": lambda: Embedded(nn.EmbeddingBag),
    "weight_norm": lambda: parametrized("weight_norm"),
    "spectral_norm": lambda: parametrized("spectral_norm"),
    "orthogonal": lambda: parametrized("orthogonal"),
    "old weight_norm": lambda: parametrized("old weight_norm"),
    "old spectral_norm": lambda: parametrized("old spectral_norm"),
    "checkpoint, reentrant": lambda: Checkpointed(True),
    "checkpoint": lambda: Checkpointed(False),
    "functional_call inside": Functional,
    "functional_call of a container inside": lambda: Functional(True),
    "torch.func inside": Transformed,
}


def example(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, 5, generator=generator, dtype=torch.float64).to(dtype), torch.arange(8) % 3


def loss_of(model, step):
    x, y = example(step)
    return nn.functional.cross_entropy(model(x), y)


def build(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().double()
    with torch.no_grad():
        model(example(0)[0])  # parameters that are made in the first call
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module_trains_as_by_hand(kind) -> None:
    assert_close(*train_both(lambda: build(kind), loss_of))


@pytest.mark.parametrize("geometry", ["asam", "fisher"])
@pytest.mark.parametrize("kind", ["lstm", "tied", "weight_norm", "attention", "checkpoint"])
def test_kinds_of_modules_in_other_geometries(kind, geometry) -> None:
    assert_close(*train_both(lambda: build(kind), loss_of, geometry=geometry))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(kind) -> None:
    def make():
        torch.manual_seed(0)
        return Embedded(kind, sparse=True).double()

    ours, theirs = make(), make()
    both = [torch.optim.SparseAdam(m.table.parameters(), lr=0.1) for m in (ours, theirs)]
    heads = [torch.optim.SGD(m.head.parameters(), lr=0.1) for m in (ours, theirs)]
    optimizer = samopt.SAM(both[0], rho=RHO, direction="momentum", model=ours)
    for step in range(4):
        optimizer.zero_grad()
        heads[0].zero_grad()
        loss_of(ours, step).backward()
        assert ours.table.weight.grad.is_sparse
        optimizer.step()
        heads[0].step()
        heads[1].zero_grad()
        hand_step(both[1], lambda step=step: loss_of(theirs, step).backward())
        heads[1].step()
    assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "tied", "old weight_norm", "lists of parameters"])
def test_a_copy_between_forward_and_backward_is_a_plain_model_with_exact_weights(kind, how) -> None:
    model = build(kind)
    optimizer = one_pass(model)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    exact = bits(model)
    loss = loss_of(model, 2)
    if kind == "old weight_norm":  # torch copies no module that holds a tensor with a graph
        loss.backward()
        model[1].weight = model[1].weight.detach()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert same_bits(other, exact) and same_bits(model, exact)
    assert all(vars(module).get("_compiled_call_impl") is None for module in other.modules())

    # The copy trains alone, with weights of its own.
    plain = sgd(other.parameters())
    loss_of(other, 3).backward()
    plain.step()
    assert same_bits(model, exact) and not same_bits(other, exact)


def test_a_parameter_of_a_loss_module_is_moved_where_the_module_is_followed() -> None:
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, logits, y):
            return nn.functional.cross_entropy(logits * self.log_scale.exp(), y)

    def make():
        torch.manual_seed(0)
        return nn.ModuleList([convolutional().double(), Weighted()])

    ours, theirs = make(), make()
    optimizer = samopt.SAM(sgd(ours.parameters()), rho=RHO, direction="momentum", model=list(ours))
    stock = sgd(theirs.parameters())

    def backward(pair, step):
        x, y = example(step)
        torch.manual_seed(step)
        pair[1](pair[0](x), y).backward()

    for step in range(3):
        optimizer.zero_grad()
        backward(ours, step)
        optimizer.step()
        hand_step(stock, lambda step=step: backward(theirs, step))
    assert_close(ours, theirs)


def test_a_regulariser_outside_every_module_sees_the_exact_weights() -> None:
    ours, theirs = build("tied"), build("tied")
    optimizer, stock = one_pass(ours), sgd(theirs.parameters())
    for step in range(3):
        optimizer.zero_grad()
        (loss_of(ours, step) + 0.1 * sum(p.pow(4).sum() for p in ours.parameters())).backward()
        optimizer.step()
        exact = [p.detach().clone().requires_grad_() for p in theirs.parameters()]
        penalty = torch.autograd.grad(0.1 * sum(p.pow(4).sum() for p in exact), exact)

        def backward(step=step, penalty=penalty):
            loss_of(theirs, step).backward()
            for p, more in zip(theirs.parameters(), penalty, strict=True):
                p.grad += more

        hand_step(stock, backward)
    assert_close(ours, theirs)


class LooksUp(nn.Module):
    """Finds the weight of its layer by another way than the layer's attribute."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(6, 3), how
        self.held = {"weight": self.layer.weight}

    def forward(self, x):
        ways = {
            "parameters": lambda: next(self.parameters()),
            "named": lambda: dict(self.named_parameters())["layer.weight"],
            "state_dict": lambda: self.state_dict(keep_vars=True)["layer.weight"],
            "registry": lambda: self.layer._parameters["weight"],
            "container": lambda: self.held["weight"],
        }
        return nn.functional.linear(x, ways[self.how](), self.layer.bias)


class Routed(nn.Module):
    """One expert a step; the others have gradients of zero."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.step = 0

    def forward(self, x):
        self.step += 1
        return self.experts[self.step % 2](x)


def warnings_of(model, compute_loss, followed=None, set_to_none=True, steps=5):
    """Texts of the warnings that name gradients at the exact weights."""
    followed = model if followed is None else followed
    optimizer = samopt.SAM(sgd(model.parameters()), rho=RHO, model=followed, direction="momentum")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad(set_to_none=set_to_none)
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            compute_loss(x).backward()
            optimizer.step()
    return [str(each.message) for each in caught if "exact weights" in str(each.message)]


@pytest.mark.parametrize("how", ["parameters", "named", "state_dict", "registry", "container"])
def test_a_weight_that_a_forward_looks_up_past_its_attribute_is_named_once(how) -> None:
    model = LooksUp(how).double()
    (text,) = warnings_of(model, lambda x: model(x).square().mean())
    assert "for 1 parameters; the first is layer.weight" in text and "optimizer.backward(compute_loss)" in text


def test_weights_used_outside_the_followed_modules_or_in_evaluation_mode_are_named() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 3), "loss": nn.Linear(3, 1)}).double()

    def compute_loss(x):
        return model["loss"](model["head"](model["body"](x).tanh())).square().mean()

    assert warnings_of(model, compute_loss) == []
    (text,) = warnings_of(model, compute_loss, followed=[model["body"], model["head"]])
    assert "for 2 parameters; the first is one of shape (1, 3) outside model=" in text
    model["body"].eval()
    (text,) = warnings_of(model, compute_loss)
    assert "for 2 parameters; the first is body.weight" in text


@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_without_a_part_in_a_step_and_regularisers_are_not_named(set_to_none) -> None:
    model = Routed().double()

    def compute_loss(x):
        used = model.experts[(model.step + 1) % 2]
        return model(x).square().mean() + 0.1 * sum(p.square().sum() for p in used.parameters())

    assert warnings_of(model, compute_loss, set_to_none=set_to_none) == []


@pytest.mark.parametrize("vectorized", [False, True])
def test_derivatives_with_respect_to_the_inputs_are_those_of_the_moved_weights(vectorized) -> None:
    """A physics-informed loss: values from a call, derivatives from another through torch.func or autograd."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def residual(model, step):
        x = torch.randn(6, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        if vectorized:
            slopes = torch.func.vmap(torch.func.jacrev(model))(x).squeeze(1)
        else:
            slopes = torch.autograd.functional.jacobian(lambda z: model(z).sum(0), x, create_graph=True).squeeze(0)
        return model(x).square().mean() + (slopes[:, 0] - slopes[:, 1] - 1).square().mean()

    assert_close(*train_both(make, residual))


def test_batched_gradients_go_through_the_replaced_parameters() -> None:
    model = build("tied")
    optimizer = one_pass(model)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    x, _ = example(1)
    out = model(x)[0]
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in out]
    batched = torch.autograd.grad(out, parameters, torch.eye(3, dtype=torch.float64), is_grads_batched=True)
    for got, *want in zip(batched, *rows, strict=True):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-13)
    assert momenta_of(optimizer.base_optimizer)[0] is not None


def test_replicas_of_data_parallel_are_made_of_the_moved_weights(monkeypatch) -> None:
    """Replicas read the registry of parameters; a machine with one device calls the module itself."""
    model = nn.DataParallel(nn.Linear(2, 1).double())
    optimizer = one_pass(model)
    x = torch.ones(3, 2, dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    exact = bits(model)
    seen = []
    original = nn.DataParallel.forward

    def forward(self, *inputs):
        seen.extend(p.detach().clone() for p in self.module.parameters())
        return original(self, *inputs)

    monkeypatch.setattr(nn.DataParallel, "forward", forward)
    out = model(x)
    weight, bias = seen
    torch.testing.assert_close(out, x @ weight.T + bias)
    distance = torch.cat([(a - b).flatten() for a, b in zip(seen, exact, strict=True)]).norm()
    assert float(distance) == pytest.approx(RHO) and same_bits(model, exact)
