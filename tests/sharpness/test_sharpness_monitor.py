"""The monitor: when it measures, what it keeps, what it costs, and that training does not notice."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest
import torch
from torch import nn

import samopt
from samopt import sharpness
from samopt.sharpness._measuring.time_budget import Budget, OverBudget
from tests.helpers.cases import batch, closure_of, mlp
from tests.helpers.quadratics import Weights


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def monitor_of(model=None, **options):
    options = {"every": 1, "max_fraction": None} | options
    return sharpness.SharpnessMonitor(model or mlp(), sharpness.cross_entropy, [batch(), batch(seed=1)], **options)


def taking(clock, seconds, evaluations=10, total=True):
    """A measure that takes some time, and says how far it is."""

    def measure(model, loss_fn, batches, *, progress):
        for done in range(1, evaluations + 1):
            clock.now += seconds / evaluations
            progress(float(done), float(evaluations) if total else None)
        return sharpness.worst_case(model, loss_fn, batches, steps=1)

    return measure


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("samopt.sharpness.monitor.time.perf_counter", clock)
    return clock


def test_it_measures_every_so_many_steps():
    monitor = monitor_of(every=3)
    logged = [monitor.step() for _ in range(7)]
    assert [bool(values) for values in logged] == [False, False, True, False, False, True, False]
    assert [record["step"] for record in monitor.history] == [3, 6]
    assert [bool(monitor.step(step)) for step in (8, 9, 10)] == [False, True, False]


def test_by_default_it_logs_the_worst_and_the_average_case_of_the_presets():
    model = mlp()
    data = [batch(), batch(seed=1)]
    worst = sharpness.worst_case(model, sharpness.cross_entropy, data, rho=0.5, adaptive=True, steps=10)
    average = sharpness.average_case(model, sharpness.cross_entropy, data, rho=0.05, adaptive=True)
    monitor = monitor_of(model)
    assert monitor.step() == {"sharpness/worst_case": worst.value, "sharpness/average_case": average.value}
    assert monitor.history[0]["measures"]["worst_case"] == worst.to_dict()


def test_a_preset_is_named_and_a_layer_is_logged_by_its_name():
    model = mlp()
    monitor = monitor_of(model, measures={"one_step": {}, "per_layer": {"steps": 1}})
    values = monitor.step()
    expected = sharpness.worst_case(model, sharpness.cross_entropy, [batch(), batch(seed=1)], rho=0.05, steps=1)
    assert values["sharpness/one_step"] == expected.value
    assert set(values) == {f"sharpness/{name}" for name in ("one_step", "per_layer", "per_layer/0", "per_layer/2")}


def test_the_first_measurement_is_made_whatever_it_costs_and_later_ones_are_not(clock):
    monitor = monitor_of(measures={"slow": taking(clock, 30.0)}, max_fraction=0.05)
    assert list(monitor.step()) == ["sharpness/slow"]
    clock.now += 100.0
    assert monitor.step() == {}
    resumed = monitor_of(measures={"slow": taking(clock, 30.0)}, max_fraction=0.05)
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert resumed.step() == {} and resumed.has_measured


def test_a_run_shorter_than_every_is_measured_at_its_end():
    monitor = monitor_of(every=None)
    assert [monitor.step() for _ in range(5)] == [{}] * 5
    assert set(monitor.finish()) == {"sharpness/worst_case", "sharpness/average_case"}
    assert monitor.history[0]["step"] == 5
    assert monitor.finish() == {}


def test_eigenvalues_start_from_the_last_measurement():
    monitor = monitor_of(measures=["lambda_max"])
    costs = [(monitor.step(), monitor.history[-1]["measures"]["lambda_max"]["cost"])[1] for _ in range(3)]
    assert costs[1] < 0.7 * costs[0] and costs[2] < 0.7 * costs[0]


def test_the_optimizers_metrics_may_be_averaged():
    model = mlp()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    monitor = monitor_of(model, optimizer=optimizer, average_metrics=True, every=3, measures=["one_step"])
    steps, values = [], {}
    for seed in range(6):
        optimizer.step(closure_of(optimizer, model, batch(seed=seed)))
        steps.append(optimizer.last_step.to_dict())
        values = monitor.step()
    for name, key in (("grad_norm", "grad_norm"), ("sharpness", "sam"), ("radius", "radius")):
        assert values[f"sharpness/{key}"] == pytest.approx(sum(step[name] for step in steps[3:]) / 3, rel=1e-6)


def test_measures_may_be_functions_partials_or_named():
    assert sorted(monitor_of(measures=[sharpness.worst_case, sharpness.hessian_trace]).measures) == [
        "hessian_trace",
        "worst_case",
    ]
    rho = partial(sharpness.average_case, rho=0.1, samples=1)
    assert list(monitor_of(measures=[rho]).measures) == ["average_case"]
    assert list(monitor_of(measures={"mine": rho}).step()) == ["sharpness/mine"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"max_fraction": 0.0}, ValueError, r"max_fraction must be in \(0, 1\], got 0"),
        ({"max_fraction": 2}, ValueError, "use None for no limit"),
        ({"measures": []}, ValueError, "measures is empty"),
        ({"measures": ["sharpest"]}, ValueError, "must be one of worst_case, .* got 'sharpest'"),
        ({"measures": [sharpness.worst_case] * 2}, ValueError, "two measures are called 'worst_case'; give a dict"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, TypeError, "optimizer must be a samopt optimizer"),
    ],
)
def test_a_bad_option_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        monitor_of(**options)


def test_the_optimizers_metrics_join_the_record():
    model = mlp()
    optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    monitor = monitor_of(model, optimizer=optimizer)
    optimizer.step(closure_of(optimizer, model, batch()))
    values = monitor.step()
    metrics = optimizer.last_step.to_dict()
    renamed = {"sam" if name == "sharpness" else name: metrics[name] for name in metrics if name != "loss"}
    assert {name: values[f"sharpness/{name}"] for name in renamed} == renamed
    assert monitor.history[0]["metrics"] == metrics


def test_the_history_is_appended_to_a_file_line_by_line(tmp_path):
    path = tmp_path / "logs" / "sharpness.jsonl"
    monitor = monitor_of(path=path, every=2)
    for _ in range(6):
        monitor.step()
    assert [json.loads(line) for line in path.read_text().splitlines()] == monitor.history
    again = monitor_of(path=path, every=2)
    again.load_state_dict(monitor.state_dict())
    again.step(), again.step()
    assert [record["step"] for record in map(json.loads, path.read_text().splitlines())] == [2, 4, 6, 8]
    assert [record["step"] for record in again.history] == [2, 4, 6, 8]


def test_the_file_is_strict_json_where_the_loss_becomes_infinite(tmp_path):
    path = tmp_path / "sharpness.jsonl"
    model = Weights([1.0])
    monitor = sharpness.SharpnessMonitor(
        model,
        lambda model, batch: -torch.log(2 - model.w0).sum(),
        [None],
        every=1,
        path=path,
        max_fraction=None,
        measures={"worst": partial(sharpness.worst_case, rho=1.0, steps=1)},
    )
    assert monitor.step() == {"sharpness/worst": float("inf")}
    assert monitor.history[0]["measures"]["worst"]["value"] == float("inf")
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["measures"]["worst"]["value"] is None
    assert record["measures"]["worst"]["loss"] == 0


def test_training_does_not_notice_it():
    def run(monitored):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))
        optimizer = samopt.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05, model=model)
        measures = [sharpness.worst_case, sharpness.hessian_trace]
        monitor = monitor_of(model, measures=measures, optimizer=optimizer) if monitored else None
        for step in range(4):
            optimizer.step(closure_of(optimizer, model, batch(seed=step)))
            if monitor is not None:
                monitor.step()
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(a.equal(b) for a, b in zip(run(False), run(True), strict=True))


def test_what_would_take_more_than_its_share_is_stopped_and_noted(clock):
    seconds = iter([0.0, 30.0])
    monitor = monitor_of(
        measures={"slow": lambda *given, progress: taking(clock, next(seconds))(*given, progress=progress)},
        max_fraction=0.05,
    )
    monitor.step()
    clock.now += 100.0
    assert monitor.step() == {}
    assert monitor.history[-1]["measures"] == {}
    assert monitor.history[-1]["skipped"]["slow"] == (
        "takes about 30 s, but 5 s are left of a share of 0.05 of the time since the start; raise max_fraction (None: "
        "no limit), or measure fewer examples or something cheaper"
    )
    assert clock.now == 103.0  # one evaluation of ten told enough


def test_what_is_known_to_take_too_long_is_not_begun(clock):
    monitor = monitor_of(measures={"slow": taking(clock, 30.0)}, max_fraction=0.05)
    monitor.measure()
    assert clock.now == 30.0
    monitor.step()
    clock.now += 100.0
    before = clock.now
    monitor.step()
    assert clock.now == before
    assert "slow" in monitor.history[-1]["skipped"]


def test_an_expensive_measure_runs_less_often_rather_than_never(clock):
    monitor = monitor_of(measures={"slow": taking(clock, 30.0)}, max_fraction=0.05)
    for _ in range(400):
        clock.now += 10.0
        monitor.step()
    ran = [record["step"] for record in monitor.history if record["measures"]]
    spent = 30.0 * (len(ran) - 1)  # the first one is not charged
    assert 0.03 * clock.now < spent <= 0.05 * clock.now + 3.0
    assert len(ran) == len(set(ran)) >= 3


def test_a_cheap_measure_still_runs_beside_an_expensive_one(clock):
    measures = {"slow": taking(clock, 1000.0, evaluations=1000), "fast": taking(clock, 0.01)}
    monitor = monitor_of(measures=measures, max_fraction=0.05)
    for _ in range(300):
        clock.now += 10.0
        monitor.step()
    assert sum("fast" in record["measures"] for record in monitor.history) > 200


def test_without_a_known_total_time_is_up_when_it_is_up(clock):
    seconds = iter([0.0, 30.0])

    def measure(*given, progress):
        return taking(clock, next(seconds), evaluations=30, total=False)(*given, progress=progress)

    monitor = monitor_of(measures={"open": measure}, max_fraction=0.05)
    monitor.step()
    clock.now += 100.0
    monitor.step()
    assert 105.0 <= clock.now <= 107.0
    assert "open" in monitor.history[-1]["skipped"]
    left = clock.now
    monitor.step()
    assert clock.now == left  # what was not enough is not tried again at once


def test_the_share_is_kept_over_a_whole_run(clock):
    monitor = monitor_of(measures={"a": taking(clock, 2.0), "b": taking(clock, 7.0, total=False)}, max_fraction=0.1)
    for _ in range(1000):
        clock.now += 1.0
        monitor.step()
    training = 1000.0
    first = 2.0 + 7.0  # not charged
    assert 0.04 * clock.now < clock.now - training - first < 0.1 * clock.now + 1.0


def test_a_budget_is_resumed(clock):
    monitor = monitor_of(measures={"slow": taking(clock, 30.0)}, max_fraction=0.05)
    monitor.measure()
    clock.now += 500.0
    state = json.loads(json.dumps(monitor.state_dict()))
    clock.now += 9999.0  # the time between the two runs does not count
    resumed = monitor_of(measures={"slow": taking(clock, 30.0)}, max_fraction=0.05)
    resumed.load_state_dict(state)
    resumed.step()
    assert "slow" in resumed.history[-1]["skipped"]
    clock.now += 700.0
    resumed.step()
    assert "slow" in resumed.history[-1]["measures"]


def test_real_time_is_bounded():
    clock_seconds = 0.0
    model = nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 3))
    monitor = monitor_of(model, measures=[partial(sharpness.worst_case, steps=200)], max_fraction=0.2)
    monitor.step()  # the first one is not charged
    start = time.perf_counter()
    while time.perf_counter() - start < 1.5:
        sharpness.cross_entropy(model, batch()).backward()
        begin = time.perf_counter()
        monitor.step()
        clock_seconds += time.perf_counter() - begin
    assert clock_seconds < 0.5 * (time.perf_counter() - start)
    assert any("skipped" in record for record in monitor.history)


def test_a_measure_that_fails_later_is_left_out_with_a_warning():
    model = mlp()
    monitor = monitor_of(model, measures=["one_step"])
    assert monitor.step()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="sharpness measure 'one_step' failed at step 2: the loss of batch 0 is nan"):
        assert monitor.step() == {}
    assert "ValueError: the loss of batch 0 is nan" in monitor.history[-1]["skipped"]["one_step"]


def test_a_measure_that_fails_at_once_raises():
    monitor = monitor_of(measures={"bad": partial(sharpness.worst_case, rho=-1)})
    with pytest.raises(ValueError, match="rho must be >= 0"):
        monitor.step()


def test_a_budget_without_limit_never_stops():
    clock = Clock()
    budget = Budget(None, clock)
    budget.start()
    with budget.spend("all", limited=True) as progress:
        clock.now += 1e9
        progress(1.0, 1e9)
    assert budget.spent == 1e9


def test_an_error_inside_still_counts_its_time():
    clock = Clock()
    budget = Budget(0.5, clock)
    budget.start()
    with pytest.raises(ZeroDivisionError), budget.spend("x", limited=False):
        clock.now += 3
        raise ZeroDivisionError
    assert budget.spent == 3
    with pytest.raises(OverBudget), budget.spend("x", limited=True) as progress:
        clock.now += 1
        progress(1.0, 1.0)
