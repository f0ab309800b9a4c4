"""Whatever is measured, and however it ends, the model and its surroundings are bit for bit what they were."""

from __future__ import annotations

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import samopt
from samopt import sharpness
from tests.helpers.cases import batch, mlp
from tests.helpers.ranks import needs_fully_shard, start_group


def conv_net(dtype=torch.float32):
    """Everything that could be left changed: normalisation statistics, dropout, a frozen layer, a layer out of step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).to(dtype)
    model[5].requires_grad_(False)
    model[1].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    return model


def images(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 1, 6, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator))
        for _ in range(2)
    ]


MEASURES = {
    "worst_case": partial(sharpness.worst_case, rho=0.5, steps=3, restarts=2),
    "worst_case linf": partial(sharpness.worst_case, rho=0.1, norm="linf", adaptive=True, steps=3),
    "average_case": partial(sharpness.average_case, rho=0.5, samples=2),
    "per_layer": partial(sharpness.per_layer, rho=0.5, steps=2),
    "hessian_eigenvalues": partial(sharpness.hessian_eigenvalues, tolerance=0.1),
    "gauss_newton_eigenvalues": partial(sharpness.gauss_newton_eigenvalues, tolerance=0.1),
    "hessian_trace": partial(sharpness.hessian_trace, samples=2),
    "spectral_density": partial(sharpness.spectral_density, steps=3, samples=1),
    "landscape": partial(sharpness.landscape, points=3, dimensions=2),
    "interpolate": lambda model, *arguments, **options: sharpness.interpolate(
        model, *arguments, {k: v * 0.5 for k, v in model.state_dict().items()}, points=3, per_layer=True, **options
    ),
    "active_units": sharpness.active_units,
    "quantization": partial(sharpness.quantization, accuracy_fn=sharpness.accuracy),
    "weight_noise": partial(sharpness.weight_noise, samples=1, scales=[0.1, 0.2]),
    "fgsm": partial(sharpness.fgsm, accuracy_fn=sharpness.accuracy, sizes=[0.1]),
    "forgetting": lambda model, *arguments, **options: sharpness.forgetting(
        model, *arguments, images(next(model.parameters()).dtype)[:1], steps=2, **options
    ),
}


def surroundings(model):
    """Everything that must not change, as comparable values."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return {
        "bits": [tensor.detach().clone() for tensor in tensors],
        "identities": [id(tensor) for tensor in tensors],
        "addresses": [tensor.data_ptr() for tensor in tensors],
        "modes": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_unchanged(before, model):
    after = surroundings(model)
    for name in before:
        if name in ("torch", "numpy"):
            assert (before[name] == after[name]).all(), name
        elif name == "bits":
            assert all(a.equal(b) for a, b in zip(before[name], after[name], strict=True))
        else:
            assert before[name] == after[name], name


def noisy(model, data):
    """A loss that draws from every random stream."""
    loss = sharpness.cross_entropy(model, data)
    return loss * (1 + 1e-6 * random.random() + 1e-6 * float(np.random.rand()) + 1e-6 * float(torch.rand(())))


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_changes_nothing(name, mode):
    model = conv_net()
    data = images()
    before = surroundings(model)
    kept = [tensor.clone() for pair in data for tensor in pair]
    MEASURES[name](model, noisy, data, mode=mode)
    assert_unchanged(before, model)
    assert all(a.equal(b) for a, b in zip(kept, (tensor for pair in data for tensor in pair), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_changes_nothing_on_an_accelerator(name):
    model = conv_net().cuda()
    before, stream = surroundings(model), torch.cuda.get_rng_state()
    MEASURES[name](model, noisy, images(), mode="train")
    assert_unchanged(before, model)
    assert torch.equal(stream, torch.cuda.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerator_finds_what_the_cpu_finds():
    on_cpu = sharpness.worst_case(conv_net(), sharpness.cross_entropy, images(), rho=0.5, steps=3)
    on_gpu = sharpness.worst_case(conv_net().cuda(), sharpness.cross_entropy, images(), rho=0.5, steps=3)
    assert on_gpu.curve == pytest.approx(on_cpu.curve, rel=1e-3)


class Fault(Exception):
    """Raised on purpose."""


@pytest.mark.parametrize("kind", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_that_fails_changes_nothing(name, kind):
    model = conv_net()
    before = surroundings(model)
    calls = []
    MEASURES[name](model, lambda m, b: calls.append(1) or noisy(m, b), images())
    for failing in sorted({1, 2, max(len(calls) // 2, 1), len(calls)}):
        count = iter(range(1, len(calls) + 1))

        def loss_fn(model, data, count=count, failing=failing):
            loss = noisy(model, data)
            if next(count) == failing:
                raise kind
            return loss

        with pytest.raises(kind):
            MEASURES[name](model, loss_fn, images())
        assert_unchanged(before, model)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_can_be_stopped_from_its_progress(name):
    model = conv_net()
    before = surroundings(model)

    def progress(done, total):
        assert done > 0
        if total is not None:
            assert done <= total * (1 + 1e-9)
        raise Fault

    with pytest.raises(Fault):
        MEASURES[name](model, noisy, images(), progress=progress)
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    "name",
    ["worst_case", "average_case", "per_layer", "hessian_trace", "spectral_density", "landscape", "interpolate"]
    + ["quantization", "weight_noise", "fgsm"],
)
def test_progress_ends_at_the_announced_cost(name):
    seen = []
    result = MEASURES[name](conv_net(), noisy, images(), progress=lambda *ends: seen.append(ends))
    assert seen[-1] == pytest.approx((result.cost, result.cost))
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_measure_repeats(name, mode):
    model = conv_net()
    first = MEASURES[name](model, noisy, images(), mode=mode)
    assert MEASURES[name](model, noisy, images(), mode=mode).to_dict() == first.to_dict()


@pytest.mark.parametrize("name", MEASURES)
def test_values_do_not_depend_on_the_surrounding_grad_mode(name):
    model = conv_net()
    expected = MEASURES[name](model, sharpness.cross_entropy, images()).to_dict()
    with torch.no_grad():
        assert MEASURES[name](model, sharpness.cross_entropy, images()).to_dict() == expected
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in images()]  # inference tensors
        assert MEASURES[name](model, sharpness.cross_entropy, data).to_dict() == expected


def test_modes_are_the_callers_choice():
    model = conv_net()
    seen = {}

    def loss_fn(model, data):
        seen.setdefault(mode, [module.training for module in model.modules()])
        return sharpness.cross_entropy(model, data)

    before = [module.training for module in model.modules()]
    for mode in ("eval", "train", "keep"):
        sharpness.average_case(model, loss_fn, images(), samples=1, mode=mode)
    assert not any(seen["eval"])
    assert all(seen["train"])
    assert seen["keep"] == before


def test_batch_norm_takes_its_averages_or_the_batchs_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = batch(torch.float64)
    sharpness_eval = sharpness.worst_case(model, sharpness.cross_entropy, [(x, y)], steps=2)
    sharpness_train = sharpness.worst_case(model, sharpness.cross_entropy, [(x, y)], steps=2, mode="train")
    model.eval()
    assert sharpness_eval.loss == float(sharpness.cross_entropy(model, (x, y)).detach())
    model.train()
    assert sharpness_train.loss == float(sharpness.cross_entropy(model, (x, y)).detach())
    assert sharpness_eval.loss != sharpness_train.loss


def test_dropout_masks_are_the_same_at_every_point():
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    data = [batch(torch.float64)]
    assert sharpness.worst_case(model, sharpness.cross_entropy, data, rho=0.0, mode="train", steps=3).value == 0
    assert sharpness.average_case(model, sharpness.cross_entropy, data, rho=0.0, mode="train").per_sample == (0.0,) * 10


def test_a_data_loader_draws_nothing_from_the_training_run():
    x, y = batch(size=32)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    model = mlp()
    before = surroundings(model)
    sharpness.worst_case(model, sharpness.cross_entropy, loader, steps=1)
    sharpness.per_layer(model, sharpness.cross_entropy, loader, steps=1)
    sharpness.SharpnessMonitor(model, sharpness.cross_entropy, loader)
    assert_unchanged(before, model)


def test_an_optimizer_with_a_model_does_not_take_a_measurement_for_a_pass():
    def run(measured):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 3))
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
        for step in range(3):
            optimizer.zero_grad()
            if measured:
                sharpness.worst_case(model, sharpness.cross_entropy, [batch(seed=9)], steps=2, mode="train")
            sharpness.cross_entropy(model, batch(seed=step)).backward()
            with optimizer.perturbed():
                sharpness.cross_entropy(model, batch(seed=step)).backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(a.equal(b) for a, b in zip(run(False), run(True), strict=True))


def test_frozen_parameters_do_not_move():
    model = mlp(torch.float64)
    model[0].requires_grad_(False)
    measure = partial(sharpness.worst_case, model, sharpness.cross_entropy, [batch(torch.float64)], rho=0.5, steps=3)
    whole = measure()
    model[0].requires_grad_(True)
    part = measure(parameters="2")
    assert whole.per_batch == part.per_batch


def test_tied_parameters_move_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([3.0, 4.0]))
            self.b = self.a

    result = sharpness.worst_case(Tied(), lambda m, _: (m.a * m.b).sum() / 2, [None], rho=0.5, steps=1)
    assert result.value == pytest.approx(5.5**2 / 2 - 12.5)


@pytest.mark.parametrize("name", ["worst_case", "average_case", "hessian_trace", "landscape"])
def test_compiled_models_are_measured_like_the_originals(name):
    model = conv_net()
    expected = MEASURES[name](model, sharpness.cross_entropy, images()).to_dict()
    compiled = torch.compile(model, backend="eager")
    assert MEASURES[name](compiled, sharpness.cross_entropy, images()).to_dict() == expected


@pytest.fixture
def lone_process(tmp_path):
    """A process group of one, which outlives the test's DDP module.

    A reducer that holds the last reference to a gloo group waits for its threads with the GIL, which they may need.
    """
    start_group(0, 1, str(tmp_path / "store"))
    yield
    torch.distributed.destroy_process_group()


def test_data_parallel_models_are_measured_without_communication(lone_process):
    model = conv_net()
    expected = sharpness.worst_case(model, sharpness.cross_entropy, images(), steps=2).to_dict()
    parallel = nn.parallel.DistributedDataParallel(model)
    called = []
    parallel.register_forward_hook(lambda *_: called.append(1))
    assert sharpness.worst_case(parallel, sharpness.cross_entropy, images(), steps=2).to_dict() == expected
    assert called == []
    sharpness.cross_entropy(parallel, images()[0]).backward()  # its reducer is not confused


@needs_fully_shard
def test_sharded_models_are_refused(lone_process):
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match="sharded over processes.*load the full state dict into a plain copy"):
        sharpness.worst_case(model, sharpness.cross_entropy, [batch()])


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", ["worst_case", "average_case", "hessian_trace", "gauss_newton_eigenvalues"])
def test_autocast_sees_every_moved_weight(name, where):
    """The cache of low-precision copies would otherwise answer with the weights of an earlier point."""
    model, data = conv_net().eval(), images()

    def inside(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sharpness.cross_entropy(model, data)

    result = MEASURES[name](model, inside, data)
    assert result.value != MEASURES[name](model, sharpness.cross_entropy, data).value
    if where == "around":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sharpness.cross_entropy(model, data[0])  # fills the cache
            around = MEASURES[name](model, sharpness.cross_entropy, data)
            after = sharpness.cross_entropy(model, data[0])
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            assert after.equal(sharpness.cross_entropy(model, data[0]))
        assert around.value == result.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["worst_case", "worst_case linf", "average_case"])
def test_low_precision_models_are_about_as_sharp(name, dtype):
    precise = MEASURES[name](conv_net(), sharpness.cross_entropy, images()).value
    rounded = MEASURES[name](conv_net(dtype), sharpness.cross_entropy, images(dtype)).value
    assert rounded == pytest.approx(precise, rel=0.1)


@pytest.mark.parametrize("name", MEASURES)
def test_low_precision_models_come_back_bit_for_bit(name):
    model = conv_net(torch.bfloat16)
    before = surroundings(model)
    MEASURES[name](model, sharpness.cross_entropy, images(torch.bfloat16))
    assert_unchanged(before, model)


def test_a_single_batch_is_not_taken_for_several():
    x, y = batch()
    for one in (x, (x, y), {"x": x}):
        with pytest.raises(TypeError, match=r"batches must be an iterable of batches, got a single batch.*\[batch\]"):
            sharpness.worst_case(mlp(), sharpness.cross_entropy, one)


def test_an_exhausted_iterator_is_refused():
    batches = iter([batch()])
    sharpness.worst_case(mlp(), sharpness.cross_entropy, batches, steps=1)
    with pytest.raises(ValueError, match="there are no batches.*an iterator can be read only once"):
        sharpness.worst_case(mlp(), sharpness.cross_entropy, batches, steps=1)


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda m, b: m(b[0]), TypeError, r"must return a scalar tensor, got a tensor of shape \[16, 3\]"),
        (lambda m, b: 1.0, TypeError, "must return a scalar tensor, got float"),
        (lambda m, b: m(b[0]).detach().mean(), ValueError, "the loss does not depend on the model's trainable"),
        ("cross_entropy", TypeError, "loss_fn must be a function loss_fn"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss_fn, error, message):
    with pytest.raises(error, match=message):
        sharpness.worst_case(mlp(), loss_fn, [batch()])


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="Sequential has no trainable parameter"):
        sharpness.worst_case(copy.deepcopy(mlp()).requires_grad_(False), sharpness.cross_entropy, [batch()])
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        sharpness.worst_case(lambda x: x, sharpness.cross_entropy, [batch()])
