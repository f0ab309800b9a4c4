"""Curvature against exact Hessians, finite differences and matrices written out by hand."""

from __future__ import annotations

import math
import re

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, hessian, jacrev

import samopt
from samopt import sharpness
from samopt.sharpness._measuring.results import mean_and_error
from samopt.sharpness.curvature.spectral_density import tridiagonalize
from tests.helpers.cases import batch, mlp
from tests.helpers.quadratics import Weights, normal, quadratic, symmetric


def flat_loss(model, data):
    """The model's loss as a function of one flat vector, and that vector."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]
    vector = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    def logits(vector, x):
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return functional_call(model, weights, (x,))

    def loss(vector):
        return sum(nn.functional.cross_entropy(logits(vector, x), y) for x, y in data) / len(data)

    return loss, logits, vector


def exact_hessian(model, data):
    loss, _, vector = flat_loss(model, data)
    return hessian(loss)(vector)


def exact_gauss_newton(model, data):
    """The mean of ``J^T (diag p - p p^T) J``, example by example."""
    _, logits, vector = flat_loss(model, data)
    total = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    for x, _ in data:
        jacobian = jacrev(logits)(vector, x)
        probabilities = logits(vector, x).softmax(dim=1)
        for j, p in zip(jacobian, probabilities, strict=True):
            total += j.T @ (torch.diag(p) - torch.outer(p, p)) @ j / len(x) / len(data)
    return total


DATA = [batch(torch.float64, seed=1), batch(torch.float64, seed=2)]


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("size", [5, 80])
def test_eigenvalues_of_a_quadratic(size, which):
    matrix = symmetric(size)
    result = sharpness.hessian_eigenvalues(
        Weights(normal(size, seed=3)), quadratic(matrix), [None], k=3, which=which, tolerance=1e-9
    )
    eigenvalues = torch.linalg.eigvalsh(matrix).tolist()
    key = {"largest": lambda v: -v, "smallest": lambda v: v, "magnitude": lambda v: -abs(v)}[which]
    assert result.values == pytest.approx(sorted(eigenvalues, key=key)[:3], rel=1e-8)
    assert max(result.residuals) < 1e-6
    assert result.value == result.values[0]


def test_hessian_eigenvalues_are_the_exact_hessians():
    model = mlp(torch.float64)
    exact = torch.linalg.eigvalsh(exact_hessian(model, DATA))
    result = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, DATA, k=3, tolerance=1e-8)
    assert result.values == pytest.approx(exact.flip(0)[:3].tolist(), rel=1e-7)
    bottom = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, DATA, which="smallest", tolerance=1e-8)
    assert bottom.value == pytest.approx(float(exact[0]), rel=1e-7)


def test_the_largest_eigenvalue_is_that_of_finite_differences():
    model = mlp(torch.float64)
    loss, _, vector = flat_loss(model, DATA)
    gradient = torch.func.grad(loss)
    steps = 1e-5 * torch.eye(len(vector), dtype=torch.float64)
    differences = torch.stack([(gradient(vector + step) - gradient(vector - step)) / 2e-5 for step in steps])
    top = float(torch.linalg.eigvalsh((differences + differences.T) / 2)[-1])
    result = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, DATA, tolerance=1e-8)
    assert result.value == pytest.approx(top, rel=1e-6)


def test_gauss_newton_eigenvalues_are_the_exact_ones():
    model = mlp(torch.float64)
    exact = torch.linalg.eigvalsh(exact_gauss_newton(model, DATA))
    result = sharpness.gauss_newton_eigenvalues(model, sharpness.cross_entropy, DATA, k=4, tolerance=1e-8)
    assert result.values == pytest.approx(exact.flip(0)[:4].tolist(), rel=1e-7)
    lowest = sharpness.gauss_newton_eigenvalues(model, sharpness.cross_entropy, DATA, k=120, which="smallest")
    assert abs(lowest.value) < 1e-9


def test_gauss_newton_of_a_linear_model_is_its_hessian():
    model = nn.Linear(6, 3).double()
    options = {"k": 3, "tolerance": 1e-8}
    hess = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, DATA, **options)
    gauss = sharpness.gauss_newton_eigenvalues(model, sharpness.cross_entropy, DATA, **options)
    assert gauss.values == pytest.approx(hess.values, rel=1e-7)


@pytest.mark.parametrize("measure", [sharpness.hessian_eigenvalues, sharpness.gauss_newton_eigenvalues])
def test_the_curvature_of_one_example_under_a_linear_softmax_is_in_closed_form(measure):
    """``H = (diag p - p p^T) (x) x x^T``: the eigenvalues of the first factor times ``||x||^2``."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    data = [(normal(1, 5, seed=1), torch.tensor([2]))]
    p = model(data[0][0])[0].softmax(dim=0).detach()
    expected = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p)) * data[0][0].square().sum()
    result = measure(model, sharpness.cross_entropy, data, k=3, tolerance=1e-9)
    torch.testing.assert_close(torch.tensor(result.values, dtype=torch.float64), expected.flip(0)[:3])
    trace = sharpness.hessian_trace(model, sharpness.cross_entropy, data, samples=400)
    assert abs(trace.value - float(expected.sum())) < 4 * trace.standard_error
    assert trace.standard_error < 0.1 * float(expected.sum())


def test_gauss_newton_follows_every_call_of_the_model():
    model = nn.Linear(2, 1, bias=False).double()
    x, z = normal(5, 2), normal(5, 2, seed=1)

    def contrast(model, data):
        return (model(x) - model(z)).square().sum() / 2

    expected = float(torch.linalg.eigvalsh((x - z).T @ (x - z))[-1])
    assert sharpness.gauss_newton_eigenvalues(model, contrast, [None]).value == pytest.approx(expected)


def test_a_penalty_on_the_weights_counts_in_the_hessian_only():
    model = nn.Linear(6, 3, bias=False).double()

    def loss_fn(model, data):
        return sharpness.cross_entropy(model, data) + 5.0 * model.weight.square().sum()

    plain = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, DATA, tolerance=1e-8).value
    assert sharpness.hessian_eigenvalues(model, loss_fn, DATA, tolerance=1e-8).value == pytest.approx(plain + 10)
    assert sharpness.gauss_newton_eigenvalues(model, loss_fn, DATA, tolerance=1e-8).value == pytest.approx(plain)


def test_a_block_of_the_hessian():
    model = mlp(torch.float64)
    block = exact_hessian(model, DATA)[-39:, -39:]  # the last layer's 36 weights and 3 biases
    result = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, DATA, parameters="2", tolerance=1e-8)
    assert result.value == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-7)


def test_a_linear_loss_has_no_curvature():
    model = Weights(normal(50))
    slope = normal(50, seed=1)
    result = sharpness.hessian_trace(model, lambda model, batch: model.vector() @ slope, [None], samples=3)
    assert (result.value, result.standard_error) == (0.0, 0.0)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_the_trace_is_within_its_error(matrix):
    model = mlp(torch.float64)
    exact = {"hessian": exact_hessian, "gauss_newton": exact_gauss_newton}[matrix](model, DATA)
    result = sharpness.hessian_trace(model, sharpness.cross_entropy, DATA, samples=200, matrix=matrix)
    beside = exact - torch.diag(torch.diag(exact))
    error = math.sqrt(2 * float(beside.square().sum()) / 200)  # Hutchinson's estimator, entries of +1 and -1
    assert result.standard_error == pytest.approx(error, rel=0.25)
    assert abs(result.value - float(exact.trace())) < 4 * error
    assert result.size == len(exact)


def test_the_density_is_the_gauss_quadrature_of_the_spectrum():
    matrix = symmetric(30)
    result = sharpness.spectral_density(Weights(normal(30)), quadratic(matrix), [None], steps=30, samples=100)
    nodes, weights = (torch.tensor(values, dtype=torch.float64) for values in (result.nodes, result.weights))
    assert float(weights.sum()) == pytest.approx(1)
    power = torch.eye(30, dtype=torch.float64)
    for degree in range(1, 5):
        power = power @ matrix
        moment = float((weights * nodes**degree).sum())
        spread = 2 * float(power.square().sum()) / 30**2 / 100  # of x.A^k.x over normal x of unit length, roughly
        assert abs(moment - float(power.trace()) / 30) < 5 * math.sqrt(spread)
    assert result.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)


def test_the_density_integrates_to_one():
    result = sharpness.spectral_density(Weights(normal(40)), quadratic(symmetric(40)), [None], steps=10, samples=3)
    grid = torch.linspace(min(result.nodes) - 1, max(result.nodes) + 1, 20001, dtype=torch.float64).tolist()
    heights = torch.tensor([result.density(at) for at in grid])
    assert float(torch.trapezoid(heights, torch.tensor(grid))) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_lanczos_reproduces_the_moments_of_its_start(reorthogonalize):
    matrix, start = symmetric(30), normal(30, seed=7)
    diagonal, beside = tridiagonalize(lambda v: matrix @ v, start.clone(), 6, reorthogonalize)
    above = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + above + above.T
    unit = start / start.norm()
    for degree in range(12):
        exact = float(unit @ torch.linalg.matrix_power(matrix, degree) @ unit)
        assert float(torch.linalg.matrix_power(small, degree)[0, 0]) == pytest.approx(exact, rel=1e-9)


def test_lanczos_stops_in_an_invariant_subspace():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    start = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    diagonal, beside = tridiagonalize(lambda v: matrix @ v, start, 4, True)
    assert (len(diagonal), len(beside)) == (2, 1)


def adam_preconditioner(state, betas, eps):
    step = float(state["step"])
    return (1 - betas[0] ** step) * ((state["exp_avg_sq"] / (1 - betas[1] ** step)).sqrt() + eps)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), lambda s: 1.0, 2 / 0.1),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda s: 1.0, 2 * 1.9 / 0.1),
    "dampened": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda s: 1.0,
        2 * 1.9 / 0.5 / 0.1,
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda s: 1.0,
        2 * 1.9 / 2.8 / 0.1,
    ),
    "adam": (
        lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
        lambda s: adam_preconditioner(s, (0.9, 0.999), 1e-3),
        38 / 0.01,
    ),
    "adamw": (
        lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, betas=(0.5, 0.9)),
        lambda s: adam_preconditioner(s, (0.5, 0.9), 1e-3),
        6 / 0.01,
    ),
    "rmsprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3),
        lambda s: s["square_avg"].sqrt() + 1e-3,
        2 / 0.01,
    ),
    "adagrad": (
        lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-3),
        lambda s: s["sum"].sqrt() + 1e-3,
        2 / 0.01,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_preconditioned_eigenvalues(name):
    build, preconditioner, threshold = OPTIMIZERS[name]
    matrix = symmetric(40) @ symmetric(40)
    model = Weights(normal(40, seed=3))
    optimizer = build(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        quadratic(matrix)(model, None).backward()
        optimizer.step()
    result = sharpness.preconditioned_eigenvalues(model, quadratic(matrix), [None], optimizer, k=2, tolerance=1e-9)
    p = torch.as_tensor(preconditioner(optimizer.state[model.w0])).expand(40).double()
    exact = torch.linalg.eigvals(matrix / p[:, None]).real.sort(descending=True).values
    assert result.values == pytest.approx(exact[:2].tolist(), rel=1e-7)
    assert result.threshold == pytest.approx(threshold)


@pytest.mark.parametrize("name", ["sgd", "momentum", "dampened", "nesterov", "adam"])
def test_beyond_its_threshold_an_optimizer_diverges(name):
    """The oracle is the optimizer itself, on a one-dimensional quadratic with its preconditioner frozen."""
    build, _, _ = OPTIMIZERS[name]
    for factor, diverges in ((0.98, False), (1.02, True)):
        model = Weights([1.0])
        optimizer = build(model.parameters())
        if name == "adam":  # its second moment is held at 1, and old enough to need no correction
            group = optimizer.param_groups[0]
            group["betas"], group["eps"] = (0.9, 1.0 - 1e-15), 0.0
            state = {
                "step": torch.tensor(1e9),
                "exp_avg": torch.zeros(1).double(),
                "exp_avg_sq": torch.ones(1).double(),
            }
            optimizer.state[model.w0] = state
        with_p = sharpness.preconditioned_eigenvalues(
            model, lambda model, batch: 0.5 * model.vector().square().sum(), [None], optimizer
        )
        curvature = factor * with_p.threshold / with_p.value
        for _ in range(3000):
            model.w0.grad = curvature * model.w0.detach()
            if name == "adam":
                state["exp_avg_sq"].fill_(1.0)
                state["step"].fill_(1e9)
            optimizer.step()
        assert (float(model.w0.detach().abs()) > 1e3) == diverges


def test_full_batch_training_on_digits_sharpens_to_its_threshold_and_stays_there():
    """Cohen et al. 2021, figure 1: the largest eigenvalue rises to 2 / lr, then hovers there."""
    inputs, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(inputs[:200]).float() / 16
    data = x - x.mean(0), nn.functional.one_hot(torch.from_numpy(labels[:200]), 10).float()

    def squared_error(model, data):
        return 0.5 * (model(data[0]) - data[1]).square().sum(dim=1).mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.6)
    ratios = {}
    for step in range(901):
        if step in (0, 300, 600, 750, 900):
            result = sharpness.preconditioned_eigenvalues(model, squared_error, [data], optimizer, tolerance=0.01)
            ratios[step] = result.value / result.threshold
        optimizer.zero_grad()
        squared_error(model, data).backward()
        optimizer.step()
    assert ratios[0] < 0.6 < ratios[300]
    assert all(0.9 < ratios[step] < 1.1 for step in (600, 750, 900))


def test_learning_rates_of_groups_are_part_of_the_preconditioner():
    model = Weights([1.0], [2.0])
    optimizer = torch.optim.SGD([{"params": [model.w0], "lr": 0.1}, {"params": [model.w1], "lr": 0.4}])
    result = sharpness.preconditioned_eigenvalues(
        model, lambda model, batch: 0.5 * (3 * model.w0**2 + model.w1**2).sum(), [None], optimizer, k=2
    )
    assert result.values == pytest.approx((4.0, 3.0))
    assert result.threshold == pytest.approx(20)


def test_the_optimizer_may_be_wrapped():
    model = mlp()
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    wrapped = samopt.SAM(base, rho=0.05, model=model)

    def closure():
        wrapped.zero_grad()
        loss = sharpness.cross_entropy(model, batch())
        loss.backward()
        return loss

    wrapped.step(closure)
    values = [
        sharpness.preconditioned_eigenvalues(model, sharpness.cross_entropy, [batch()], optimizer).value
        for optimizer in (base, wrapped)
    ]
    assert values[0] == values[1]


def stepped_elsewhere():
    return torch.optim.SGD(mlp().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), ValueError, "Adam has no 'exp_avg_sq' .* after its first step"),
        (lambda m: stepped_elsewhere(), ValueError, "SGD does not update every weight that is measured"),
        (lambda m: torch.optim.Rprop(m.parameters()), TypeError, "the preconditioner of Rprop is not known"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.0), ValueError, "the learning rate is 0"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(optimizer, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        sharpness.preconditioned_eigenvalues(model, sharpness.cross_entropy, [batch()], optimizer(model))


def test_attention_is_differentiated_twice():
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 12)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.project(x).chunk(3, dim=-1)
            return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(dim=1))

    model = Attention().double()
    data = [(normal(8, 5, 4), torch.randint(3, (8,)))]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = float(torch.linalg.eigvalsh(exact_hessian(model, data))[-1])
    result = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, data, tolerance=1e-8)
    assert result.value == pytest.approx(exact, rel=1e-7)


@torch.library.custom_op("samopt_tests::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@torch.library.custom_op("samopt_tests::square_backward", mutates_args=())
def square_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 2 * gradient * x


square.register_autograd(
    lambda ctx, gradient: square_backward(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def ctc(outputs):
    sizes = torch.tensor([len(outputs)]), torch.tensor([1])
    return nn.functional.ctc_loss(outputs[:, None].log_softmax(2), torch.tensor([[1]]), *sizes)


# Which of torch's own operations have a second derivative changes between its releases: torch 2.14 has one of cdist.
OPERATIONS = {
    "tanh": torch.tanh,
    "custom": square,
    "cdist": lambda outputs: torch.cdist(outputs, torch.zeros(1, 3, dtype=outputs.dtype)),
    "pdist": torch.pdist,
    "ctc": ctc,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_without_second_derivative_is_explained(name):
    """Oracle: stock torch, which differentiates twice or refuses."""

    def loss_fn(model, data):
        return OPERATIONS[name](model(data[0])).square().mean()

    def flat(vector):
        parts = vector.split([weight.numel() for weight in weights])
        moved = {key: part.view_as(weight) for key, part, weight in zip(names, parts, weights, strict=True)}
        return OPERATIONS[name](functional_call(model, moved, (data[0],))).square().mean()

    model, data = mlp().double(), batch(torch.float64)
    names, weights = zip(*model.named_parameters(), strict=True)
    try:
        expected = torch.autograd.functional.hessian(flat, torch.cat([w.detach().flatten() for w in weights]))
    except RuntimeError as error:
        assert name != "tanh"
        reason = re.escape(str(error).splitlines()[0])
        with pytest.raises(RuntimeError, match=f"curvature needs second derivatives.*{reason}.*worst_case"):
            sharpness.hessian_eigenvalues(model, loss_fn, [data])
    else:
        assert name != "custom"
        found = sharpness.hessian_eigenvalues(model, loss_fn, [data])
        assert found.value == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-3)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubeOnce(Cube):
    backward = staticmethod(once_differentiable(Cube.backward))


@pytest.mark.parametrize("measure", [sharpness.hessian_eigenvalues, sharpness.gauss_newton_eigenvalues])
def test_a_function_that_is_marked_once_differentiable_is_refused(measure):
    """Torch differentiates it twice without an error, as if its derivative were constant."""

    def loss_with(cube):
        return lambda model, data: nn.functional.cross_entropy(cube(model(data[0])), data[1])

    model = nn.Sequential(*mlp(), nn.Identity()).double()
    model[-1].forward = Cube.apply
    data = batch(torch.float64)
    found = measure(model, nn.CrossEntropyLoss(), [data])
    model[-1].forward = lambda x: x**3
    assert found.value == pytest.approx(measure(model, nn.CrossEntropyLoss(), [data]).value, rel=1e-3)
    model[-1].forward = CubeOnce.apply
    with pytest.raises(RuntimeError, match="backward of CubeOnce computes them in a way.*worst_case"):
        measure(model, nn.CrossEntropyLoss(), [data])
    with pytest.raises(RuntimeError, match="backward of CubeOnce computes them in a way.*worst_case"):
        measure(mlp().double(), loss_with(CubeOnce.apply), [data])


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (sharpness.hessian_eigenvalues, {"k": 0}, "k must be at least 1, got 0"),
        (sharpness.hessian_eigenvalues, {"k": 1000}, "k must be at most 123, the number of weights, got 1000"),
        (sharpness.hessian_eigenvalues, {"which": "top"}, "which must be"),
        (sharpness.hessian_eigenvalues, {"tolerance": 0}, "tolerance must be > 0"),
        (sharpness.hessian_eigenvalues, {"k": 3, "basis": 3}, "basis must be larger than k=3, got 3"),
        (sharpness.hessian_trace, {"samples": 0}, "samples must be at least 1, got 0"),
        (sharpness.hessian_trace, {"matrix": "fisher"}, "matrix must be"),
        (sharpness.spectral_density, {"steps": 0}, "steps must be at least 1, got 0"),
        (sharpness.spectral_density, {"width": 0}, "width must be > 0"),
    ],
)
def test_a_bad_option_is_refused(measure, options, message):
    with pytest.raises(ValueError, match=message):
        measure(mlp(), sharpness.cross_entropy, [batch()], **options)


def test_gauss_newton_says_what_it_needs():
    model = mlp()
    with pytest.raises(ValueError, match="loss_fn did not call the model"):
        sharpness.gauss_newton_eigenvalues(model, lambda m, b: m[2].weight.square().sum(), [None])
    model.append(type("Layer", (nn.Module,), {"forward": lambda self, x: {"out": x}})())
    with pytest.raises(TypeError, match="returned dict; wrap the model"):
        sharpness.gauss_newton_eigenvalues(model, lambda m, b: m(b[0])["out"].sum(), [batch()])


def test_eigenvalues_that_do_not_converge_say_so():
    model = Weights(normal(400))
    matrix = torch.diag(torch.linspace(1, 1 + 1e-13, 400, dtype=torch.float64))
    matrix[0, 0] = 1e-3
    with pytest.raises(RuntimeError, match="did not converge to tolerance=1e-16.*larger tolerance or a larger basis"):
        sharpness.hessian_eigenvalues(
            model, quadratic(matrix + 1e-14 * symmetric(400)), [None], k=4, basis=5, tolerance=1e-16
        )


# --- errors over batches, and warm starts ---------------------------------------------------------------------------


def test_the_first_eigenvalue_is_the_mean_of_its_batches_quotients():
    model, batches = mlp(torch.float64), [batch(torch.float64, seed, size) for seed, size in ((0, 12), (1, 4))]
    result = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches, tolerance=1e-10)
    assert (12 * result.per_batch[0] + 4 * result.per_batch[1]) / 16 == pytest.approx(result.value, rel=1e-8)
    assert result.standard_error == pytest.approx(mean_and_error(result.per_batch, [12, 4])[1])


def test_an_eigenvalues_error_is_its_derivative_in_the_shares_of_the_batches():
    model, batches = mlp(torch.float64), [batch(torch.float64, seed, 8) for seed in range(3)]
    result = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches, tolerance=1e-12)

    def at(shares):
        def loss_fn(m, _):
            return sum(s * sharpness.cross_entropy(m, b) for s, b in zip(shares, batches, strict=True))

        return sharpness.hessian_eigenvalues(model, loss_fn, [None], tolerance=1e-12).value

    for index in range(3):
        up, down = ([1 / 3 + (sign if i == index else 0) for i in range(3)] for sign in (1e-4, -1e-4))
        assert result.per_batch[index] == pytest.approx((at(up) - at(down)) / 2e-4, rel=1e-5)


def test_a_trace_is_the_mean_of_its_batches_traces():
    model, batches = mlp(torch.float64), [batch(torch.float64, seed, size) for seed, size in ((0, 12), (1, 4))]
    whole = sharpness.hessian_trace(model, sharpness.cross_entropy, batches, samples=4)
    each = [sharpness.hessian_trace(model, sharpness.cross_entropy, [one], samples=4).value for one in batches]
    assert whole.per_batch == pytest.approx(each, rel=1e-10)
    assert whole.value == pytest.approx((12 * each[0] + 4 * each[1]) / 16, rel=1e-10)


@pytest.mark.parametrize("k", [1, 2])
def test_a_warm_start_finds_the_same_eigenvalues_at_less_cost(k):
    model, batches = mlp(torch.float64), [batch(torch.float64, 0, 32)]
    start = sharpness.WarmStart()
    options = {"k": k, "tolerance": 1e-3}
    cold = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches, **options)
    first = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches, start=start, **options)
    assert first == cold
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    cold = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches, **options)
    warm = sharpness.hessian_eigenvalues(model, sharpness.cross_entropy, batches, start=start, **options)
    assert warm.values == pytest.approx(cold.values, rel=2e-3)
    assert warm.cost < 0.8 * cold.cost


def test_a_warm_start_of_another_size_is_a_cold_one():
    start = sharpness.WarmStart()
    small, large = mlp(torch.float64), nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    sharpness.hessian_eigenvalues(small, sharpness.cross_entropy, [batch(torch.float64)], start=start)
    expected = sharpness.hessian_eigenvalues(large, sharpness.cross_entropy, [batch(torch.float64)])
    assert (
        sharpness.hessian_eigenvalues(large, sharpness.cross_entropy, [batch(torch.float64)], start=start) == expected
    )
