"""Models and batches that people bring and that measures once failed on: measured, or refused by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from samopt import sharpness

CURVATURE = {
    "hessian": sharpness.hessian_eigenvalues,
    "gauss-newton": sharpness.gauss_newton_eigenvalues,
    "trace": functools.partial(sharpness.hessian_trace, samples=2),
    "density": functools.partial(sharpness.spectral_density, steps=4, samples=1),
}
LOSS = nn.CrossEntropyLoss()


def points():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1).square())


@pytest.mark.parametrize("name", CURVATURE)
def test_the_curvature_of_sparse_embeddings_is_that_of_dense_ones(name):
    batch = (torch.arange(16).reshape(8, 2) % 7, points()[1])
    results = [CURVATURE[name](Words(sparse), LOSS, [batch]) for sparse in (True, False)]
    assert results[0].value == pytest.approx(results[1].value, rel=1e-6)


def without_values(kind):
    if kind == "meta":
        return nn.Linear(6, 3, device="meta")
    if kind == "lazy":
        return nn.LazyLinear(3)
    with torch.inference_mode():
        return nn.Linear(6, 3)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta", "'weight' of Linear is on the meta device and holds no numbers; load the weights"),
        ("lazy", "'weight' of LazyLinear has no shape yet; run one forward"),
        ("inference", r"'weight' of Linear was made under torch.inference_mode\(\).*measure copy.deepcopy\(model\)"),
    ],
)
def test_a_model_without_values_is_refused(kind, message):
    model = without_values(kind)
    others = {"per_layer": functools.partial(sharpness.per_layer, measure=sharpness.worst_case)}
    for measure in (
        *CURVATURE.values(),
        *others.values(),
        sharpness.worst_case,
        sharpness.fgsm,
        sharpness.quantization,
    ):
        with pytest.raises(ValueError, match=message):
            measure(model, LOSS, [points()])
    if kind == "inference":
        assert sharpness.worst_case(copy.deepcopy(model), LOSS, [points()]).value > 0


def test_a_data_set_is_not_taken_for_batches():
    """Its entries are single examples, each of which would have a worst case of its own."""
    data = TensorDataset(*points())
    with pytest.raises(TypeError, match=r"got the data set TensorDataset.*DataLoader\(dataset, batch_size=64\)"):
        sharpness.worst_case(nn.Linear(6, 3), LOSS, data)

    class Stream(IterableDataset):
        def __iter__(self):
            yield points()

    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    values = [
        sharpness.worst_case(model, LOSS, batches, steps=2).value
        for batches in (Stream(), DataLoader(data, batch_size=8), DataLoader([points()], batch_size=None))
    ]
    assert values == values[:1] * 3


class Token(nn.Module):
    """As in vision transformers: the model itself holds parameters, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x * self.token)


def test_parameters_of_the_model_itself_are_layers_of_their_own():
    result = sharpness.per_layer(Token(), LOSS, [points()], measure=sharpness.worst_case, steps=2)
    assert list(result.layers) == ["token", "head"]
    for name, layer in result.layers.items():
        assert layer.value == sharpness.worst_case(Token(), LOSS, [points()], parameters=name, steps=2).value
    alone = sharpness.per_layer(nn.Linear(6, 3), LOSS, [points()], measure=sharpness.worst_case, steps=1)
    assert list(alone.layers) == ["weight", "bias"]


class Codes(nn.Module):
    """A head beside frozen weights of whole numbers, as quantised models have them."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(6, 3)
        self.codes = nn.Parameter(torch.arange(1, 7, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return self.head(x * self.codes.float() / 4)


def test_a_path_leaves_weights_of_whole_numbers_where_they_are():
    start, end, middle = Codes(0), Codes(1), Codes(2)
    with torch.no_grad():
        for place, one, other in zip(
            middle.head.parameters(), start.head.parameters(), end.head.parameters(), strict=True
        ):
            place.copy_((one + other) / 2)
    result = sharpness.interpolate(start, LOSS, [points()], end, points=3)
    expected = [LOSS(model(points()[0]), points()[1]).item() for model in (start, middle, end)]
    assert result.losses == pytest.approx(expected, rel=1e-6)
    end.codes.data[0] = 9
    with pytest.raises(ValueError, match=r"'codes' holds torch.int8 numbers that differ .* \(dequantize them\)"):
        sharpness.interpolate(start, LOSS, [points()], end, points=3)
    assert start.codes.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["tensors", "dict"])
def test_a_stream_that_gives_every_batch_in_the_same_memory(kind):
    """As loaders with a buffer do; all batches were the last one."""
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(3)]

    def stream():
        x, y = torch.empty(8, 6), torch.empty(8, dtype=torch.long)
        for inputs, labels in parts:
            x.copy_(inputs)
            y.copy_(labels)
            yield (x, y) if kind == "tensors" else {"input": x, "labels": y}

    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    expected = sharpness.worst_case(model, LOSS, parts, steps=2)
    assert sharpness.worst_case(model, LOSS, stream(), steps=2).per_batch == expected.per_batch


def test_a_monitor_measures_on_what_it_was_given_whatever_the_loop_writes_into_it():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(6, 3), points()
    monitor = sharpness.SharpnessMonitor(model, LOSS, [(x, y)], every=1, measures=["worst_case"], max_fraction=None)
    before = monitor.step()
    x.zero_()
    assert monitor.step() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: (tensor * 100).to(torch.int8), "'weight' holds torch.int8 numbers .* torch.float32 ones"),
        (lambda tensor: tensor.to(torch.complex64), "'weight' holds torch.complex64 numbers in the weights"),
        (lambda tensor: tensor.to("meta"), "'weight' of the weights is on the meta device and holds no numbers"),
    ],
)
def test_a_path_to_numbers_of_another_kind_is_refused(change, message):
    model = nn.Linear(6, 3)
    end = {name: change(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sharpness.interpolate(model, LOSS, [points()], end)


def test_a_path_to_weights_with_more_than_the_model_has_is_warned_about():
    model = nn.Linear(6, 3)
    end = model.state_dict() | {"lora_A.weight": torch.zeros(2)}
    with pytest.warns(
        UserWarning, match="1 of the weights are none of Linear's, and are not used: lora_A.weight; check"
    ):
        sharpness.interpolate(model, LOSS, [points()], end, points=3)
