"""Trust regions where the model is not a plain module on the CPU: accelerators, torch.compile, several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

import samopt
from samopt.trust_region import EMA, InputNoise
from tests.helpers.cases import batch, bits

REGIONS: dict[str, Callable[[], Any]] = {
    "previous": lambda: "previous",
    "ema": lambda: EMA(decay=0.5),
    "ema in bf16": lambda: EMA(decay=0.5, dtype=torch.bfloat16),
    "pretrained": lambda: "pretrained",
    "input_noise": lambda: InputNoise(std=0.3),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.ReLU(), nn.Linear(12, 3))


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 16)):
            loss = nn.functional.cross_entropy(model(data[0][part]), data[1][part])
            loss.backward()
        return loss

    optimizer.step(closure)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose values cannot be brought to the host: reading one raises."""
    streams = SimpleNamespace(get_rng_state=lambda device: None, set_rng_state=lambda state, device: None)
    monkeypatch.setattr("samopt._replay.random_state.device_module", lambda device: streams)
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": real())
    for read in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            getattr(torch.ones((), device="meta"), read)()
    return torch.device("meta")


@pytest.mark.parametrize("divergence", ["kl", "symmetric_kl", "l2", "mmd"])
@pytest.mark.parametrize("region", REGIONS)
def test_no_value_is_read_on_the_host_in_a_step(region: str, divergence: str, unreadable: torch.device) -> None:
    model = network().to(unreadable)
    optimizer = samopt.TRAM(
        torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True),
        model=model,
        trust_region=REGIONS[region](),
        divergence=divergence,
        max_radius=1.0,
        mask=lambda call: call.arguments["input"][:, 0] > 0,
        warn_on_stall=False,
    )
    data = torch.empty(16, 6, device=unreadable), torch.empty(16, dtype=torch.long, device=unreadable)
    for _ in range(3):
        take_step(optimizer, model, data)
    assert optimizer.last_step.distance.device == optimizer.last_step.radius.device == unreadable


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("region", [*REGIONS, "on the cpu"])
def test_a_step_does_not_wait_for_the_gpu(region: str) -> None:
    made = samopt.trust_region.PreviousStep(device="cpu") if region == "on the cpu" else REGIONS[region]()
    model = network().cuda()
    optimizer = samopt.TRAM(
        torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True), model=model, trust_region=made, warn_on_stall=False
    )
    data = batch()[0].cuda(), batch()[1].cuda()
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            take_step(optimizer, model, data)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.last_step.distance.item() > 0


@pytest.mark.parametrize("region", ["previous", "ema", "pretrained", "input_noise"])
def test_a_compiled_model_is_compiled_twice_and_never_again(region: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = network()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = samopt.TRAM(
        torch.optim.SGD(model.parameters(), lr=0.3), model=compiled, trust_region=REGIONS[region](), scale=5.0
    )
    eager = network()
    expected = samopt.TRAM(
        torch.optim.SGD(eager.parameters(), lr=0.3), model=eager, trust_region=REGIONS[region](), scale=5.0
    )
    graphs = []
    for step in range(6):
        x, y = batch(seed=step)
        for each_optimizer, each_model in ((optimizer, compiled), (expected, eager)):
            torch.manual_seed(step)

            def closure(each_optimizer=each_optimizer, each_model=each_model, x=x, y=y) -> Tensor:
                each_optimizer.zero_grad()
                loss = nn.functional.cross_entropy(each_model(x), y)
                loss.backward()
                return loss

            each_optimizer.step(closure)
        graphs.append(counters["stats"]["unique_graphs"])
        torch.testing.assert_close(optimizer.last_step.distance, expected.last_step.distance, rtol=1e-3, atol=1e-7)
    assert graphs[-1] == graphs[2] <= 2
    assert not counters["graph_break"]
    assert optimizer.last_step.distance > 1e-4


def test_equal_parameters_have_no_distance_in_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.0), model=compiled)
    for step in range(3):
        take_step(optimizer, compiled, batch(seed=step))
        assert optimizer.last_step.distance.item() == 0.0


def test_a_model_compiled_in_place_has_the_distance_of_an_eager_one() -> None:
    torch._dynamo.reset()
    distances = []
    for in_place in (True, False):
        model = network()
        if in_place:
            model.compile(backend="aot_eager")
        optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model)
        for step in range(3):
            take_step(optimizer, model, batch(seed=step))
            distances.append(optimizer.last_step.distance.item())
    assert distances[:3] == pytest.approx(distances[3:], rel=1e-5, abs=1e-9)
    assert distances[0] == 0.0 and distances[1] > 0.0


def test_a_model_compiled_in_place_after_the_optimizer_was_made_is_told_so() -> None:
    torch._dynamo.reset()
    model = nn.Linear(6, 3)
    optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model.compile(backend="aot_eager")
    nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    with pytest.raises(RuntimeError, match=r"compile it with torch.compile\(model\), not model.compile\(\)"):
        optimizer.ascend()


def train_on_one_of_two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for region in ("previous", "pretrained", "input_noise"):
        model = DistributedDataParallel(network_without_masks())
        optimizer = samopt.TRAM(
            torch.optim.SGD(model.parameters(), lr=0.3), model=model, trust_region=REGIONS[region](), scale=5.0
        )
        distances = []
        for step in range(3):
            x, y = batch(seed=step)
            share = slice(0, 4) if rank == 0 else slice(4, 16)  # uneven, so that the weights matter
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[share]), y[share]).backward()
            with optimizer.perturbed():
                nn.functional.cross_entropy(model(x[share]), y[share]).backward()
            optimizer.step()
            distances.append(optimizer.last_step.distance)
        names = list(optimizer.state_dict()["samopt"]["radius"].get("weights", {}))
        torch.save((distances, bits(model), names), f"{folder}/{region} {rank}")
    torch.distributed.destroy_process_group()


def network_without_masks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


@pytest.mark.slow
def test_ranks_agree_on_the_distance_over_all_examples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_one_of_two_ranks, (str(tmp_path),), nprocs=2)
    for region in ("previous", "pretrained", "input_noise"):
        (first, weights, names), (second, others, _) = (torch.load(tmp_path / f"{region} {rank}") for rank in (0, 1))
        assert first == second
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, others, strict=True))
        assert all(not name.startswith("module.") for name in names)
        if region == "input_noise":
            continue
        model = network_without_masks()
        optimizer = samopt.TRAM(torch.optim.SGD(model.parameters(), lr=0.3), model=model, trust_region=region)
        before, start = None, network_without_masks()
        for step in range(3):
            x, y = batch(seed=step)
            with torch.no_grad():
                trusted = start if region == "pretrained" else before or model
                p, q = trusted(x).log_softmax(1), model(x).log_softmax(1)
                expected = (p.exp() * (p - q)).sum(1).mean()
            torch.testing.assert_close(first[step], expected, rtol=1e-3, atol=1e-6)
            before = network_without_masks()
            before.load_state_dict(model.state_dict())
            mean_of_two_ranks(optimizer, model, x, y, 5.0 * first[step])
        assert expected > 1e-4
        for ours, theirs in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def mean_of_two_ranks(optimizer: samopt.TRAM, model: nn.Module, x: Tensor, y: Tensor, radius: Tensor) -> None:
    """One synced step by hand: DDP's gradient is the mean of both ranks' means."""
    parameters = list(model.parameters())

    def gradient() -> tuple[Tensor, ...]:
        losses = [nn.functional.cross_entropy(model(x[part]), y[part]) for part in (slice(0, 4), slice(4, 16))]
        return torch.autograd.grad(sum(losses) / 2, parameters)

    lengths = [p.detach().abs() + 0.01 if p.dim() > 1 else torch.ones_like(p) for p in parameters]
    first = gradient()
    norm = torch.cat([(t * g).flatten() for t, g in zip(lengths, first, strict=True)]).norm()
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, t, g in zip(parameters, lengths, first, strict=True):
            p += radius * t * t * g / norm
    second = gradient()
    with torch.no_grad():
        for p, value, g in zip(parameters, saved, second, strict=True):
            p.copy_(value - 0.3 * g)
