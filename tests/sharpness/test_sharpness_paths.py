"""Interpolation, landscapes, layers, units and labels against values written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from benchmarks.harness.tasks import TASKS
from samopt import sharpness
from tests.helpers.cases import batch, mlp


def with_batch_norm(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for data in (batch(seed=seed), batch(seed=seed + 1)):
            model(data[0])
    return model.eval()


def blend(a, b, position):
    """The model in between, floating-point buffers included."""
    other = copy.deepcopy(a)
    state = {
        name: (1 - position) * value + position * b.state_dict()[name] if value.is_floating_point() else value
        for name, value in a.state_dict().items()
    }
    other.load_state_dict(state)
    return other


def loss_at(model, data):
    return math.fsum(float(sharpness.cross_entropy(model, d).detach()) for d in data) / len(data)


def test_interpolation_is_the_loss_of_the_blended_model():
    a, b, data = with_batch_norm(0), with_batch_norm(1), [batch(seed=5), batch(seed=6)]
    result = sharpness.interpolate(a, sharpness.cross_entropy, data, b, points=5, accuracy_fn=sharpness.accuracy)
    assert result.positions == (0.0, 0.25, 0.5, 0.75, 1.0)
    expected = [loss_at(blend(a, b, position), data) for position in result.positions]
    assert result.losses == pytest.approx(expected, rel=1e-5)
    assert (result.losses[0], result.losses[-1]) == (loss_at(a, data), loss_at(b, data))  # exactly
    hits = [sum(int((m(x).argmax(1) == y).sum()) for x, y in data) / 32 for m in (a, b)]
    assert (result.accuracies[0], result.accuracies[-1]) == pytest.approx(hits)
    chord = [expected[0] + (expected[-1] - expected[0]) * p for p in result.positions]
    assert result.value == pytest.approx(max(e - c for e, c in zip(expected, chord, strict=True)), rel=1e-4)


def test_interpolation_between_two_states_of_neither_of_which_the_model_is():
    a, b, other, data = with_batch_norm(0), with_batch_norm(1), with_batch_norm(2), [batch(seed=5)]
    options = {"points": 3, "extent": (-0.5, 1.5)}
    direct = sharpness.interpolate(a, sharpness.cross_entropy, data, b, **options)
    through = sharpness.interpolate(
        other, sharpness.cross_entropy, data, b.state_dict(), start=a.state_dict(), **options
    )
    assert through.losses == direct.losses
    assert direct.losses[0] == pytest.approx(loss_at(blend(a, b, -0.5), data), rel=1e-5)


def test_interpolation_may_keep_the_buffers():
    a, b, data = with_batch_norm(0), with_batch_norm(1), [batch(seed=5)]
    result = sharpness.interpolate(a, sharpness.cross_entropy, data, b, points=2, interpolate_buffers=False)
    mixed = copy.deepcopy(b)
    mixed[1].load_state_dict(mixed[1].state_dict() | {k: v for k, v in a[1].state_dict().items() if "running" in k})
    assert result.losses[-1] == loss_at(mixed, data) != loss_at(b, data)


def test_interpolation_layer_by_layer():
    a, b, data = with_batch_norm(0), with_batch_norm(1), [batch(seed=5)]
    result = sharpness.interpolate(a, sharpness.cross_entropy, data, b, points=3, per_layer=True)
    assert list(result.layers) == ["0", "1", "3"]
    for name, losses in result.layers.items():
        mixed = copy.deepcopy(a)
        own = {k: v for k, v in b.state_dict().items() if k.startswith(f"{name}.") and "running" not in k}
        mixed.load_state_dict(a.state_dict() | own)
        assert losses[0] == loss_at(a, data)
        assert losses[-1] == pytest.approx(loss_at(mixed, data), rel=1e-6)


def test_interpolation_moves_frozen_parameters():
    a, b, data = mlp(seed=0), mlp(seed=1), [batch()]
    a[0].requires_grad_(False)
    assert sharpness.interpolate(a, sharpness.cross_entropy, data, b, points=2).losses[-1] == loss_at(b, data)


def test_weights_that_do_not_fit_are_refused():
    model, data = mlp(), [batch()]
    lacking = {name: value for name, value in model.state_dict().items() if not name.startswith("2")}
    with pytest.raises(ValueError, match=r"the weights lack '2\.weight' and 1 more of the 4 parameters"):
        sharpness.interpolate(model, sharpness.cross_entropy, data, lacking)
    with pytest.raises(ValueError, match=r"'0\.bias' has shape \[3\] in the weights and \[12\] in the model"):
        sharpness.interpolate(model, sharpness.cross_entropy, data, model.state_dict() | {"0.bias": torch.zeros(3)})
    with pytest.raises(TypeError, match="weights must be a model or a state dict, got list"):
        sharpness.interpolate(model, sharpness.cross_entropy, data, [1])
    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        sharpness.interpolate(model, sharpness.cross_entropy, data, model, points=1)


def test_the_landscape_along_given_directions_is_that_of_moved_models():
    model, data = mlp(torch.float64), [batch(torch.float64)]
    torch.manual_seed(1)
    directions = [[torch.randn_like(p) for p in model.parameters()] for _ in range(2)]
    result = sharpness.landscape(model, sharpness.cross_entropy, data, points=5, radius=0.5, directions=directions)
    assert result.positions == (-0.5, -0.25, 0.0, 0.25, 0.5)
    for row, first in zip(result.losses, result.positions, strict=True):
        for loss, second in zip(row, result.positions, strict=True):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for p, one, two in zip(moved.parameters(), *directions, strict=True):
                    p.add_(first * one + second * two)
            assert loss == pytest.approx(loss_at(moved, data), rel=1e-12)
    assert result.centre == result.losses[2][2] == loss_at(model, data)
    assert result.value == max(max(row) for row in result.losses) - result.centre


@pytest.mark.parametrize("normalization", ["filter", "layer", "none"])
def test_random_directions_have_the_norms_of_the_model(normalization):
    """Read off the weights that the loss sees one unit along the first direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)).double()
    seen = []

    def loss_fn(model, data):
        seen.append([p.detach().clone() for p in model.parameters()])
        return sharpness.cross_entropy(model, data)

    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(4, (5,))
    sharpness.landscape(model, loss_fn, [(x, y)], points=3, normalization=normalization)
    moves = [there - here.detach() for there, here in zip(seen[2], model.parameters(), strict=True)]
    weights = [p.detach() for p in model.parameters()]
    if normalization == "filter":
        for index in (0, 2):
            torch.testing.assert_close(moves[index].flatten(1).norm(dim=1), weights[index].flatten(1).norm(dim=1))
        assert not moves[1].any()
        assert not moves[3].any()
    elif normalization == "layer":
        assert [float(m.norm()) for m in moves] == pytest.approx([float(w.norm()) for w in weights])
    else:
        size = math.sqrt(sum(float(w.square().sum()) for w in weights))
        assert math.sqrt(sum(float(m.square().sum()) for m in moves)) == pytest.approx(size)


def test_the_filter_normalised_landscape_does_not_see_a_rescaling_of_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 3, bias=False)).double()
    data = [batch(torch.float64)]
    before = sharpness.landscape(model, sharpness.cross_entropy, data).losses
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.div_(8)
    assert sharpness.landscape(model, sharpness.cross_entropy, data).losses == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 3}, "dimensions must be 1 or 2, got 3"),
        ({"points": 4}, "points must be odd and at least 3.*got 4"),
        ({"radius": 0}, "radius must be > 0, got 0"),
        ({"normalization": "unit"}, "normalization must be"),
        ({"directions": [[torch.zeros(2)]]}, r"a direction needs a tensor for each of the 4 parameters.*got \[\[2\]\]"),
    ],
)
def test_a_bad_landscape_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sharpness.landscape(mlp(), sharpness.cross_entropy, [batch()], **options)


def test_per_layer_is_the_measure_restricted():
    model, data = mlp(), [batch(), batch(seed=1)]
    result = sharpness.per_layer(
        model,
        sharpness.cross_entropy,
        data,
        measure=sharpness.average_case,
        layers=["0", "*.bias", "2.weight"],
        rho=0.1,
    )
    for name, layer in result.layers.items():
        alone = sharpness.average_case(model, sharpness.cross_entropy, data, parameters=name, rho=0.1)
        assert layer.to_dict() == alone.to_dict()
    assert list(result.layers) == ["0", "*.bias", "2.weight"]
    assert result.value == max(layer.value for layer in result.layers.values())
    assert result.cost == pytest.approx(sum(layer.cost for layer in result.layers.values()))
    with pytest.raises(ValueError, match="parameters='5' selects none"):
        sharpness.per_layer(model, sharpness.cross_entropy, data, layers=["0", "5"])


def test_layers_that_move_alone_rise_less_than_all_together():
    model, data = mlp(), [batch()]
    whole = sharpness.worst_case(model, sharpness.cross_entropy, data, rho=0.5, steps=30).value
    alone = sharpness.per_layer(model, sharpness.cross_entropy, data, rho=0.5, steps=30)
    assert 0 < min(layer.value for layer in alone.layers.values()) < alone.value < whole


def test_active_units_are_counted_over_batches_and_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias[1] = -100.0  # a channel that is never active
        model[3].bias[:3] = -100.0  # and three units
    data = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(2)]
    result = sharpness.active_units(model, sharpness.cross_entropy, data)
    maps = torch.cat([model[:2](x) for x, _ in data])
    units = torch.cat([model[:5](x) for x, _ in data])
    assert result.layers == pytest.approx(
        {"1": float((maps > 0).float().mean()), "4": float((units > 0).float().mean())}
    )
    assert result.dead == pytest.approx({"1": 0.25, "4": 0.5})
    total = int((maps > 0).sum() + (units > 0).sum()) / (maps.numel() + units.numel())
    assert result.value == pytest.approx(total)
    above = sharpness.active_units(model, sharpness.cross_entropy, data, layers=["3"], threshold=0.5)
    hidden = torch.cat([model[:4](x) for x, _ in data])
    assert above.value == pytest.approx(float((hidden.abs() > 0.5).float().mean()))


def test_active_units_say_what_they_need():
    model, data = mlp(), [batch()]
    with pytest.raises(ValueError, match="has no module that is a ReLU or the like"):
        sharpness.active_units(model, sharpness.cross_entropy, data)
    with pytest.raises(ValueError, match=r"layers must name modules of Sequential, got \['9'\]; there are 0, 1, 2"):
        sharpness.active_units(model, sharpness.cross_entropy, data, layers=["9"])
    with pytest.raises(ValueError, match=r"layers \['2'\] were never called"):
        sharpness.active_units(model, lambda m, b: m[:2](b[0]).mean(), data, layers=["1", "2"])
    with pytest.raises(ValueError, match="threshold must be >= 0"):
        sharpness.active_units(model, sharpness.cross_entropy, data, threshold=-1.0)
    lstm = nn.LSTM(6, 4)
    with pytest.raises(TypeError, match="layer '' returned tuple, not a tensor"):
        sharpness.active_units(lstm, lambda m, b: m(b[0])[0].mean(), data, layers=[""])


def by_hand(inputs, labels):
    """The largest ratio over unequal pairs, and where it is, in fp64, one pair at a time."""
    best, where = 0.0, None
    for i in range(len(inputs)):
        for j in range(i):
            if labels[i] != labels[j]:
                distance = float((inputs[i].double() - inputs[j].double()).norm())
                if 1 / distance > best:
                    best, where = 1 / distance, (j, i)
    return best, where


def test_label_sharpness_of_points_drawn_by_hand():
    inputs = torch.tensor([[0.0, 0.0], [0.1, 0.0], [3.0, 4.0], [0.0, 1.0]])
    result = sharpness.label_sharpness(inputs, torch.tensor([0, 0, 1, 2]))
    assert result.value == pytest.approx(1.0)  # 0 and 3 at distance 1; 0 and 1 have equal labels
    assert result.pair == (0, 3)
    assert result.per_example == pytest.approx((1.0, 1 / math.hypot(0.1, 1), 1 / math.hypot(3, 3), 1.0))


def test_label_sharpness_of_values_is_their_lipschitz_constant():
    inputs = torch.linspace(0, 1, 50).unsqueeze(1)
    assert sharpness.label_sharpness(inputs, 3.0 * inputs).value == pytest.approx(3.0, rel=1e-4)
    assert sharpness.label_sharpness(inputs, torch.zeros(50)).value == 0
    assert sharpness.label_sharpness(inputs, torch.zeros(50)).pair is None


def test_label_sharpness_of_twins_is_infinite():
    inputs = torch.randn(40, 3)
    inputs[7] = inputs[31]
    labels = torch.zeros(40, dtype=torch.long)
    assert sharpness.label_sharpness(inputs, labels).value == 0
    labels[7] = 1
    result = sharpness.label_sharpness(inputs, labels)
    assert (result.value, result.pair) == (math.inf, (7, 31))


def test_label_sharpness_tells_near_twins_apart():
    inputs = 100 + torch.randn(600, 5, dtype=torch.float64)
    inputs[3] = inputs[555] + torch.tensor([1e-8, 0, 0, 0, 0], dtype=torch.float64)
    labels = torch.arange(600)
    assert sharpness.label_sharpness(inputs, labels).value == pytest.approx(1e8, rel=1e-4)


def test_label_sharpness_of_real_images():
    pool = TASKS["digits"].load(None)
    inputs, labels = pool.inputs[:300].flatten(1), pool.labels[:300]
    result = sharpness.label_sharpness(pool.inputs[:300], labels)
    value, pair = by_hand(inputs, labels)
    assert result.value == pytest.approx(value, rel=1e-6)
    assert result.pair == pair
    assert result.value < sharpness.label_sharpness(pool.inputs, pool.labels).value  # more examples, nearer neighbours


def test_label_sharpness_needs_a_label_for_each_input():
    with pytest.raises(ValueError, match="needs n >= 2 inputs and n labels, got 3 and 2"):
        sharpness.label_sharpness(torch.randn(3, 2), torch.tensor([0, 1]))
