"""What a measure moves is what was asked for, and places where nothing is found are named."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from samopt import sharpness


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(6, (8,), generator=generator)) for _ in range(2)]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs):
        return self.decoder(torch.tanh(self.encoder(inputs)))


@pytest.mark.parametrize("chosen", ["decoder", "decoder.*", ["decoder.weight", "decoder.bias"]])
def test_a_tied_parameter_is_selected_by_any_of_its_names(chosen):
    loss = nn.CrossEntropyLoss()
    found = sharpness.worst_case(Tied(), loss, batches(), parameters=chosen)
    assert found == sharpness.worst_case(Tied(), loss, batches(), parameters=["encoder.weight", "decoder.bias"])


@pytest.mark.parametrize("measure", [sharpness.worst_case, sharpness.average_case, sharpness.hessian_trace])
def test_an_empty_list_of_parameters_is_refused(measure):
    with pytest.raises(ValueError, match="parameters is empty"):
        measure(Tied(), nn.CrossEntropyLoss(), batches(), parameters=[])


def test_weights_that_untie_a_tied_parameter_are_refused():
    state = copy.deepcopy(Tied().state_dict())
    state["decoder.weight"] = state["decoder.weight"] + 1
    with pytest.raises(ValueError, match=r"'encoder.weight' and 'decoder.weight' are one parameter"):
        sharpness.interpolate(Tied(), nn.CrossEntropyLoss(), batches(), state)


def double_well(model, batch):
    return (1 - model.weight**2).square().sum()


def scalar(value):
    return {"weight": torch.tensor([[value]])}


@pytest.mark.parametrize("extent", [(0.0, 1.0), (-0.3, 1.3), (-0.5, 1.7), (0.2, 0.8), (1.0, 0.0), (0.7, -0.4)])
@pytest.mark.parametrize("points", [4, 5, 11, 17])
def test_a_barrier_is_above_the_line_between_the_ends_wherever_the_places_are(extent, points):
    start, end = -0.8, 1.4  # losses 0.1296 and 0.9216
    found = sharpness.interpolate(
        nn.Linear(1, 1, bias=False), double_well, [None], scalar(end), start=scalar(start), points=points, extent=extent
    )
    places = [extent[0] + (extent[1] - extent[0]) * point / (points - 1) for point in range(points)]
    loss = [(1 - (start + (end - start) * a) ** 2) ** 2 for a in [0.0, 1.0, *places]]
    heights = [
        one - (loss[0] + (loss[1] - loss[0]) * a) for a, one in zip(places, loss[2:], strict=True) if 0 <= a <= 1
    ]
    assert found.value == pytest.approx(max([0.0, *heights]), abs=1e-5)
    assert len(found.losses) == points


def test_interpolation_needs_the_buffers_that_it_interpolates():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    weights = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"lack the buffer '1.running_mean'.*interpolate_buffers=False"):
        sharpness.interpolate(model, nn.CrossEntropyLoss(), batches(), weights)
    sharpness.interpolate(model, nn.CrossEntropyLoss(), batches(), weights, interpolate_buffers=False, points=2)


@pytest.mark.parametrize("count", [0, 3])
def test_a_landscape_has_one_or_two_directions(count):
    model = Tied()
    with pytest.raises(ValueError, match=f"one or two.*got {count}"):
        sharpness.landscape(
            model,
            nn.CrossEntropyLoss(),
            batches(),
            directions=[[torch.ones_like(w) for w in model.parameters()]] * count,
        )


def test_where_nothing_moves_a_warning_says_so():
    with pytest.warns(UserWarning, match="no weight moves"):
        sharpness.landscape(Tied(), nn.CrossEntropyLoss(), batches(), points=3, parameters="*.bias")
    with pytest.warns(UserWarning, match=r"encoder.bias, decoder.bias, so no loss rises"):
        sharpness.quantization(Tied(), nn.CrossEntropyLoss(), batches(), parameters="*.bias")


@pytest.mark.parametrize("place", [0, 2, 4])
def test_a_loss_that_is_no_number_shows_in_the_value(place):
    def loss(model, batch):
        at = round(float(model.weight.detach().sum()))
        return model.weight.sum() * (math.nan if at == place - 2 else 1)

    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    found = sharpness.landscape(model, loss, [None], points=5, radius=2.0, directions=[[torch.ones(1, 1)]])
    assert math.isnan(found.losses[place]) and math.isnan(found.value)
    ends = scalar(-2.0), scalar(2.0)
    assert math.isnan(sharpness.interpolate(model, loss, [None], ends[1], start=ends[0], points=5).value)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_noise_on_complex_weights_has_no_direction(norm):
    """Oracle: E |u|^2 is rho^2 for the normal, and rho^2 / 2 for the uniform distribution on the disc."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(20_000, dtype=torch.complex64))
    seen = []

    def loss(model, batch):
        seen.append(model.weight.detach().clone())
        return model.weight.abs().square().mean()

    found = sharpness.average_case(model, loss, [None], norm=norm, rho=0.1, samples=1)
    noise = seen[1]
    assert found.value == pytest.approx(0.01 if norm == "l2" else 0.005, rel=0.03)
    assert abs(complex(noise.mean())) < 0.003 and abs(complex((noise**2).mean())) < 3e-4
    assert norm == "l2" or float(noise.abs().max()) <= 0.1 + 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_restarts_find_the_worst_case_over_complex_weights(norm):
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([3.0 + 4.0j, 1.0j]))
    found = sharpness.worst_case(
        model, lambda model, batch: model.weight.abs().sum(), [None], norm=norm, rho=0.1, restarts=3
    )
    assert found.value == pytest.approx(0.1 * math.sqrt(2) if norm == "l2" else 0.2, rel=1e-4)


def test_complex_weights_are_rounded_part_by_part():
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([[3.0 + 1.0j, -2.0 + 0.4j]]))
    seen = []

    def loss(model, batch):
        seen.append(model.weight.detach().clone())
        return model.weight.abs().sum()

    sharpness.quantization(model, loss, [None], bits=[3])  # steps of 1
    torch.testing.assert_close(seen[1], torch.tensor([[3.0 + 1.0j, -2.0 + 0.0j]]))


def test_an_attack_needs_a_loss_that_depends_on_the_inputs():
    with pytest.raises(ValueError, match="does not depend on the inputs"):
        sharpness.fgsm(
            Tied(), lambda model, batch: functional.cross_entropy(model(batch[0].detach()), batch[1]), batches()
        )
    with pytest.raises(ValueError, match="bounds must be the smallest and the largest value"):
        sharpness.fgsm(Tied(), nn.CrossEntropyLoss(), batches(), bounds=(1.0, 0.0))


def test_a_frozen_model_can_be_attacked():
    loss = nn.CrossEntropyLoss()
    frozen = sharpness.fgsm(Tied().requires_grad_(False), loss, batches())
    assert frozen.rises == sharpness.fgsm(Tied(), loss, batches()).rises


@pytest.mark.parametrize("offset", [0.0, 1e5, 1e7])
def test_label_sharpness_far_from_zero(offset):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 3, generator=generator, dtype=torch.float64) * 1e-2 + offset
    labels = torch.randint(2, (60,), generator=generator)
    values = torch.randn(60, generator=generator, dtype=torch.float64) * 1e-3 + offset
    apart = (inputs[:, None] - inputs).norm(dim=2).fill_diagonal_(math.inf)
    assert sharpness.label_sharpness(inputs, labels).value == pytest.approx(
        float(1 / apart[labels[:, None] != labels].min())
    )
    assert sharpness.label_sharpness(inputs, values).value == pytest.approx(
        float(((values[:, None] - values).abs() / apart).max())
    )


def test_data_that_is_not_finite_is_refused():
    inputs = torch.randn(60, 3)
    inputs[5] = math.nan
    with pytest.raises(ValueError, match="finite inputs"):
        sharpness.label_sharpness(inputs, torch.arange(60) % 2)
    with pytest.raises(ValueError, match="finite points"):
        sharpness.intrinsic_dimension(inputs)


def test_parameters_in_the_same_memory_are_refused():
    torch.manual_seed(0)
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight.data = first.weight.data
    with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' are in the same memory"):
        sharpness.average_case(nn.Sequential(first, nn.Tanh(), second), nn.CrossEntropyLoss(), batches())


def test_parameters_beside_each_other_in_one_memory_are_measured():
    """As RNNs keep them on an accelerator."""
    torch.manual_seed(0)
    apart, together = nn.Linear(6, 6), nn.Linear(6, 6)
    memory = torch.cat([apart.weight.detach().reshape(-1), apart.bias.detach()])
    together.weight.data, together.bias.data = memory[:36].view(6, 6), memory[36:]
    loss = nn.CrossEntropyLoss()
    assert sharpness.worst_case(together, loss, batches()) == sharpness.worst_case(apart, loss, batches())


def test_a_ball_in_which_the_loss_is_no_number_is_warned_about():
    with pytest.warns(UserWarning, match=r"NaN at points within rho=1e\+30 on batches \[0, 1\]"):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        sharpness.worst_case(model, nn.CrossEntropyLoss(), batches(), rho=1e30)
