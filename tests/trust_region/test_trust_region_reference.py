"""A reference forward: exactly equal where the parameters are, and without a trace."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import samopt
from samopt.trust_region import DIVERGENCES, EMA, Pretrained, PreviousStep
from tests.helpers.cases import batch, bits, closure_of, loss_of, mlp, same_bits

REFERENCES: dict[str, Callable[[], Any]] = {
    "previous": PreviousStep,
    "ema": lambda: EMA(decay=0.5),
    "pretrained": Pretrained,
    "on the cpu": lambda: PreviousStep(device="cpu"),
}


class Memory(nn.Module):
    """Everything that could tell a second forward from the first: masks, statistics, counters, attributes, caches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(6, 12),
            nn.BatchNorm1d(12),
            nn.Dropout(0.4),
            nn.ReLU(),
            nn.Linear(12, 12),
            nn.BatchNorm1d(12, momentum=None),
        )
        self.head = nn.utils.spectral_norm(nn.Linear(12, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.auxiliary: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.inner(x) * (1 + 0.01 * self.calls) + random.random() + numpy.random.rand()
        self.auxiliary = hidden.mean()
        self.latest = hidden
        return self.head(nn.functional.dropout(hidden, 0.3, self.training))


class Recurrent(nn.Module):
    """Flat weights that the cell keeps outside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.view(-1, 2, 3))[0][:, -1])


class Tied(nn.Module):
    """One weight under two names, one of them parametrised."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 3)
        self.decode = nn.Linear(6, 3)
        self.decode.weight = self.encode.weight
        self.mix = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.encode(x) * self.decode(x))


MODELS = {"memory": Memory, "tied": Tied}


def build(model: type[nn.Module], region: Any, lr: float, **options: Any) -> tuple[nn.Module, samopt.TRAM]:
    torch.manual_seed(0)
    made = model()
    return made, samopt.TRAM(torch.optim.SGD(made.parameters(), lr=lr), model=made, trust_region=region, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("model", MODELS)
def test_equal_parameters_have_no_distance(model: str, reference: str, divergence: str) -> None:
    made, optimizer = build(MODELS[model], REFERENCES[reference](), 0.0, divergence=divergence)
    for step in range(4):
        optimizer.step(closure_of(optimizer, made, batch(seed=step)))
        assert optimizer.last_step.distance.item() == 0.0
    made, optimizer = build(MODELS[model], REFERENCES[reference](), 0.3, divergence=divergence)
    for step in range(3):
        optimizer.step(closure_of(optimizer, made, batch(seed=step)))
    assert optimizer.last_step.distance.item() > 0.0


def test_weights_that_a_cell_keeps_outside_its_parameters_are_exchanged() -> None:
    made, optimizer = build(Recurrent, "pretrained", 0.5)
    start = copy.deepcopy(made)
    for step in range(3):
        x, y = batch(seed=step)
        torch.manual_seed(step)
        with torch.no_grad():
            outputs = [model(x).double().log_softmax(1) for model in seeded((start, made), step)]
        torch.manual_seed(step)
        optimizer.step(closure_of(optimizer, made, (x, y)))
        expected = (outputs[0].exp() * (outputs[0] - outputs[1])).sum(1).mean().item()
        # Without a graph, torch runs another LSTM kernel on the CPU, so equal weights agree up to rounding only.
        assert optimizer.last_step.distance.item() == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert expected > 1e-4


def seeded(models: tuple[nn.Module, ...], seed: int) -> Iterator[nn.Module]:
    for model in models:
        torch.manual_seed(seed)
        yield model


@pytest.mark.parametrize("enabled_inside", [False, True])
def test_equal_parameters_have_no_distance_under_autocast(enabled_inside: bool) -> None:
    made, optimizer = build(Memory, "pretrained", 0.0)
    plain = made.forward

    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x)

    if enabled_inside:
        made.forward = cast
    for step in range(2):
        x, y = batch(seed=step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not enabled_inside):
            first = made(x)
            loss = nn.functional.cross_entropy(first.float(), y) + made(x).float().square().mean()
        loss.backward()
        assert all(p.grad is not None for p in made.parameters())
        optimizer.ascend()
        assert optimizer.radius.metrics()["distance"].item() == 0.0
        optimizer.restore()
        optimizer.step()


class Failing(nn.Module):
    """Fails in forwards without a graph, when asked to, after all its side effects."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        output = self.memory(x)
        if not torch.is_grad_enabled():
            self.memory.eval()
            torch.rand(3)
            if self.fails:
                raise ValueError("the reference failed")
        return output


@dataclass
class TensorFacts:
    identity: int
    version: int
    values: Any
    requires_grad: bool


def everything(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": tuple(torch.get_rng_state().tolist()),
        "python": random.getstate(),
        "numpy": tuple(numpy.random.get_state()[1].tolist()),
        "grad": torch.is_grad_enabled(),
        "cache": torch.is_autocast_cache_enabled(),
    }
    for name, module in model.named_modules():
        found[f"{name} attributes"] = {key: id(value) for key, value in module.__dict__.items()}
        found[f"{name} hooks"] = [dict(module._forward_hooks), dict(module._forward_pre_hooks)]
        for key, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                found[f"{name} {key}"] = TensorFacts(id(value), value._version, value.tolist(), value.requires_grad)
    return found


def change(before: Any, after: Any) -> Any:
    """What a forward did to one of the things above; the hooks are to be the same objects."""
    if isinstance(after, TensorFacts):
        return after.identity == before.identity, after.version - before.version, after.values, after.requires_grad
    if isinstance(after, dict):
        return {key: after[key] != value for key, value in before.items()}, after.keys() - before.keys()
    return (after == before,) if isinstance(after, list) else after


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("reference", ["previous", "ema", "pretrained", "input_noise"])
def test_a_reference_forward_leaves_no_trace(reference: str, fails: bool) -> None:
    made, optimizer = build(Failing, reference, 0.1)
    optimizer.step(closure_of(optimizer, made, batch()))
    twin, other = build(Failing, lambda: 0.0, 0.1)
    other.step(closure_of(other, twin, batch()))
    twin.load_state_dict(copy.deepcopy(made.state_dict()))
    x, _ = batch(seed=3)
    changes = []
    for each in (twin, made):
        torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
        each.fails = fails
        before = everything(each)
        if fails and each is made:
            with pytest.raises(ValueError, match="the reference failed"):
                each(x)
        else:
            output = each(x)
            assert output.requires_grad and each.memory.auxiliary.requires_grad
        assert each.memory.training
        after = everything(each)
        changes.append({key: change(before[key], after[key]) for key in before})
    assert changes[0].keys() == changes[1].keys()
    for key in changes[0]:
        assert changes[1][key] == changes[0][key], key


@pytest.mark.parametrize("reference", ["previous", "pretrained"])
def test_the_training_run_is_that_of_the_constant_distance(reference: str) -> None:
    """With the same radius, TRAM trains bit for bit like a run that never made a reference forward."""
    made, optimizer = build(Memory, reference, 0.1, scale=5.0)
    answers: list[Tensor] = []
    for step in range(4):
        torch.manual_seed(step), random.seed(step), numpy.random.seed(step)
        optimizer.step(closure_of(optimizer, made, batch(seed=step)))
        answers.append(optimizer.last_step.distance)
    told = iter(answers)
    twin, other = build(Memory, lambda: next(told), 0.1, scale=5.0)
    for step in range(4):
        torch.manual_seed(step), random.seed(step), numpy.random.seed(step)
        other.step(closure_of(other, twin, batch(seed=step)))
    assert max(answers) > 0
    assert same_bits(twin, bits(made))
    for (name, ours), theirs in zip(made.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_in_another_precision(dtype: torch.dtype) -> None:
    model = mlp(torch.float64)
    optimizer = samopt.TRAM(
        torch.optim.SGD(model.parameters(), lr=0.3), model=model, trust_region=PreviousStep(dtype=dtype)
    )
    for step in range(3):
        before = bits(model)
        optimizer.step(closure_of(optimizer, model, batch(torch.float64, seed=step)))
        held = optimizer.state_dict()["samopt"]["radius"]["weights"]
        for kept, weight in zip(held.values(), before, strict=True):
            assert kept.dtype is dtype
            assert torch.equal(kept, weight.to(dtype))


def test_average_in_bf16_keeps_moving() -> None:
    """A share of 1/1000 of the way is far below half an ulp; rounded stochastically its mean survives."""
    model = nn.Linear(200, 100, bias=False)
    nn.init.constant_(model.weight, 1.0)
    region = EMA(decay=0.999, dtype=torch.bfloat16)
    samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=region)
    region.advance()
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(200):
        region.advance()
    held = region.state_dict()["weights"]["weight"]
    expected = 2 - 0.999**200
    assert held.dtype is torch.bfloat16
    assert held.double().mean().item() == pytest.approx(expected, abs=5 * 0.05 / 20000**0.5)


def test_average_of_a_bf16_model_is_fp32() -> None:
    model = mlp(torch.bfloat16)
    optimizer = samopt.TRAM(
        torch.optim.SGD(model.parameters(), lr=0.3), model=model, trust_region=EMA(decay=0.9), scale=5.0
    )
    expected: list[Tensor] = []
    for step in range(4):
        weights = [p.detach().float() for p in model.parameters()]
        expected = [0.9 * e + 0.1 * w for e, w in zip(expected, weights, strict=True)] if expected else weights
        optimizer.step(closure_of(optimizer, model, batch(torch.bfloat16, seed=step)))
    held = optimizer.state_dict()["samopt"]["radius"]["weights"].values()
    for kept, weight in zip(held, expected, strict=True):
        torch.testing.assert_close(kept, weight, rtol=1e-5, atol=1e-7)


def test_one_copy_is_held_beside_the_backup() -> None:
    def live() -> int:
        gc.collect()
        storages = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if issubclass(type(each), Tensor) and each.numel() >= size
        }
        return sum(storages.values())

    size = 512 * 512
    for region, copies in (("previous", 1), ("ema", 1), ("pretrained", 1), ("input_noise", 0)):
        model = nn.Linear(512, 512, bias=False)
        before = live()
        optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=region)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 512)).square().mean().backward()
            with optimizer.perturbed():
                model(torch.ones(2, 512)).square().mean().backward()
            optimizer.step()
        optimizer.zero_grad()
        assert live() - before == (copies + 1) * 4 * size, region  # and the backup that stays between steps
        del optimizer, model


def test_pretrained_without_the_copy_in_the_checkpoint() -> None:
    def build_run() -> tuple[nn.Module, samopt.TRAM]:
        model = mlp()
        base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        return model, samopt.TRAM(base, model=model, trust_region=Pretrained(save=False), scale=10.0)

    model, optimizer = build_run()
    for step in range(2):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
    state = copy.deepcopy(optimizer.state_dict())
    assert not any(isinstance(value, Tensor) for value in state["samopt"]["radius"].values())

    resumed_model, resumed = build_run()
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    for step in range(2, 4):
        optimizer.step(closure_of(optimizer, model, batch(seed=step)))
        resumed.step(closure_of(resumed, resumed_model, batch(seed=step)))
    assert resumed.last_step.distance > 0
    assert same_bits(resumed_model, bits(model))

    late = copy.deepcopy(model)
    wrong = samopt.TRAM(
        torch.optim.SGD(late.parameters(), lr=0.3, momentum=0.9), model=late, trust_region=Pretrained(save=False)
    )
    with pytest.raises(ValueError, match=r"'0.weight' has the checksum .* make the optimizer while the model has its"):
        wrong.load_state_dict(state)


def test_a_reference_of_another_model_is_refused() -> None:
    model, other = mlp(), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    saved_by, optimizer = (
        samopt.TRAM(torch.optim.SGD(m.parameters(), lr=0.1), model=m, trust_region="pretrained") for m in (other, model)
    )
    with pytest.raises(
        ValueError, match=r"'0.weight' with shape \(5, 6\), but the model has shape \(12, 6\); load the"
    ):
        optimizer.load_state_dict(saved_by.state_dict())


def test_ones_own_trust_region() -> None:
    class Shifted:
        def measure(self, call: samopt.trust_region.ForwardCall) -> Tensor:
            assert call.index == 0
            shifted = {name: p.detach() + 0.1 for name, p in call.module.named_parameters()}
            return call.distance_to(call.rerun(shifted))

    model = mlp(torch.float64)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=Shifted())
    x, y = batch(torch.float64)
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        for p in shifted.parameters():
            p += 0.1
        reference, current = shifted(x).log_softmax(1), model(x).log_softmax(1)
    optimizer.step(closure_of(optimizer, model, (x, y)))
    expected = (reference.exp() * (reference - current)).sum(1).mean()
    torch.testing.assert_close(optimizer.last_step.distance, expected, rtol=1e-9, atol=0.0)


def test_fsdp_is_refused_by_what_exchanges_parameters() -> None:
    class FSDPModule:
        pass

    class Sharded(FSDPModule, nn.Linear):
        pass

    model = Sharded(6, 3)
    for region in ("previous", "ema", "pretrained"):
        with pytest.raises(ValueError, match='sharded by FSDP.*use trust_region="input_noise"'):
            samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region=region)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, trust_region="input_noise")
    optimizer.step(closure_of(optimizer, model, batch()))
    assert loss_of(model, batch()).isfinite()
