"""What all ranks must agree on: TRAM's distance, the figures that are logged, and who speaks."""

import warnings

import pytest
import torch
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import samopt
from samopt import sharpness
from samopt._callers.user_warnings import warn_user
from samopt.distributed import mean_over_ranks
from tests.helpers.cases import BASES, batch, bits, closure_form, parameters_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.sharded import full, fully_sharded, own_part, uneven

DOUBLE = torch.float64


def tram(wrapper, region, steps=4):
    inside = uneven()
    wrappers = {"compiled ddp": compiled, "fsdp": fully_sharded, "ddp": DistributedDataParallel}
    model = wrappers[wrapper.removesuffix(", around model=")](inside)
    optimizer = samopt.TRAM(
        BASES["sgd"](model.parameters()),
        model=inside if "around" in wrapper else model,  # as before accelerate's prepare(), or in a LightningModule
        trust_region=region,
        scale=10.0,
        sync_perturbation=True,
    )
    distances = []
    for step in range(steps):
        closure_form(optimizer, model, own_part(step))
        distances.append(optimizer.last_step.distance)
    return distances, full(parameters_of(optimizer))


def compiled(model):
    return torch.compile(DistributedDataParallel(model), backend="eager")


@pytest.mark.parametrize("wrapper", ["ddp", "ddp, around model=", "compiled ddp"])
@pytest.mark.parametrize("region", ["previous", "ema", "pretrained"])
def test_trams_distance_over_ranks_is_that_of_the_whole_batch(region, wrapper):
    model = uneven()
    optimizer = samopt.TRAM(BASES["sgd"](model.parameters()), model=model, trust_region=region, scale=10.0)
    distances = []
    for step in range(4):
        closure_form(optimizer, model, batch(DOUBLE, seed=step))
        distances.append(optimizer.last_step.distance)
    assert distances[-1] > 1e-6
    for theirs, weights in run_on_ranks(tram, wrapper, region):
        torch.testing.assert_close(theirs, distances, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weights, bits(model), rtol=1e-9, atol=1e-12)


def test_trams_distance_is_one_number_for_all_shards():
    (first, weights), (second, other_weights) = run_on_ranks(tram, "fsdp", "input_noise")
    assert first == second
    assert min(first) > 0
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def tram_in_join(**options):
    """The message of the first step whose distance not all ranks would take part in; else the steps of this rank."""
    model = DistributedDataParallel(uneven())
    optimizer = samopt.TRAM(BASES["sgd"](model.parameters()), model=model)
    before, steps = bits(model), 0
    try:
        with Join([model], **options):
            for step in range(3 - torch.distributed.get_rank()):
                closure_form(optimizer, model, own_part(step))
                steps += 1
    except RuntimeError as error:
        if "TRAM" in str(error):
            assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))
            return str(error)
    return steps


def test_a_distance_over_ranks_that_may_leave_is_refused():
    for message in run_on_ranks(tram_in_join):
        assert "inside Join(...)" in message
        assert "use Join(..., throw_on_early_termination=True)" in message


def ended_together():
    return tram_in_join(throw_on_early_termination=True)


def test_ranks_that_leave_together_share_the_distance():
    assert run_on_ranks(ended_together) == [2, 2]


def averages():
    rank = torch.distributed.get_rank()
    values = {"loss": 1.0 + rank, "norm": torch.tensor(4.0)}
    if rank == 1:
        values["measured on one rank only"] = 0.5
    return mean_over_ranks(values)


def test_ranks_log_the_mean_over_those_that_have_a_value():
    for values in run_on_ranks(averages):
        assert values == {"loss": 1.5, "norm": 4.0, "measured on one rank only": 0.5}


def measures():
    """A monitor's numbers on each rank's own batch, and their mean."""
    model = DistributedDataParallel(uneven())
    optimizer = samopt.SAM(BASES["sgd"](model.parameters()), rho=0.1, model=model)
    monitor = sharpness.SharpnessMonitor(
        model, sharpness.cross_entropy, [own_part(0)], every=1, optimizer=optimizer, max_fraction=None
    )
    closure_form(optimizer, model, own_part(0))
    own = monitor.step()
    return own, mean_over_ranks(own)


def test_the_monitor_measures_on_each_rank_and_logs_the_same_on_all():
    (first, mean), (second, other_mean) = run_on_ranks(measures)
    assert mean == other_mean
    assert first["sharpness/worst_case"] != second["sharpness/worst_case"]
    for name in ("sharpness/worst_case", "sharpness/sam", "sharpness/grad_norm"):
        assert mean[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-12)


def heard():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_user("something")
    return len(caught)


def test_the_first_rank_alone_warns():
    assert run_on_ranks(heard) == [1, 0]


def heard_of_a_lost_reference():
    model = DistributedDataParallel(uneven())
    optimizer = samopt.TRAM(BASES["sgd"](model.parameters()), model=model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(BASES["sgd"](model.parameters()).state_dict())
    return [str(warning.message)[:40] for warning in caught]


def test_the_first_rank_alone_misses_trams_reference():
    assert run_on_ranks(heard_of_a_lost_reference) == [["the state dict holds no trust region, an"], []]


def bars():
    """Whether a measure that was asked for a progress bar writes one."""
    import contextlib
    import io

    model, stream = uneven(), io.StringIO()
    with contextlib.redirect_stderr(stream):
        sharpness.worst_case(model, sharpness.cross_entropy, [batch(DOUBLE)], rho=0.1, steps=3, progress=True)
    return bool(stream.getvalue())


def test_the_first_rank_alone_shows_progress():
    assert run_on_ranks(bars) == [True, False]
