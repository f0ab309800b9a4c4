"""Losses in low precision, normalised logits, and how many examples a batch has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from samopt import sharpness
from samopt.sharpness._measuring.batches import batch_size, read_batches


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 6, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator))
        for _ in range(2)
    ]


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), functional.cross_entropy, nn.CrossEntropyLoss(torch.ones(3))])
def test_a_torch_loss_of_low_precision_outputs_is_in_fp32(dtype, loss):
    found = sharpness.worst_case(mlp(dtype), loss, batches(dtype), rho=0.02)
    expected = sharpness.worst_case(mlp(dtype), sharpness.cross_entropy, batches(dtype), rho=0.02)
    assert found.per_batch == expected.per_batch and found.loss == expected.loss


def test_class_weights_in_low_precision_still_work():
    loss = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="the loss is in bfloat16, whose steps are 0.0078"):
        sharpness.worst_case(mlp(torch.bfloat16), loss, batches(torch.bfloat16), rho=0.5, steps=1)


def test_a_loss_of_ones_own_in_low_precision_is_warned_about_once():
    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=r"smaller rises cannot be seen.*fp32") as caught:
        sharpness.average_case(mlp(torch.bfloat16), loss, batches(torch.bfloat16))
    assert len(caught) == 1


def test_targets_in_low_precision():
    data = [(x, torch.randn(16, 3).bfloat16()) for x, _ in batches(torch.bfloat16)]
    found = sharpness.worst_case(mlp(torch.bfloat16), nn.MSELoss(), data, steps=1)

    def by_hand(model, batch):
        return functional.mse_loss(model(batch[0]).float(), batch[1].float())

    assert found.value == sharpness.worst_case(mlp(torch.bfloat16), by_hand, data, steps=1).value


@pytest.mark.parametrize(
    ("model", "loss", "shapes", "text"),
    [
        (nn.Linear(6, 1), nn.BCEWithLogitsLoss(), ((4, 6), (4, 1)), "two classes or more"),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), nn.BCEWithLogitsLoss(), ((4, 6), (4,)), "not known"),
        (nn.Conv2d(6, 3, 1), nn.CrossEntropyLoss(), ((4, 6, 2, 2), (4, 3, 2, 2)), "not known"),
        (nn.Conv1d(6, 3, 1), nn.CrossEntropyLoss(), ((4, 6, 5), (4, 3, 5)), "not known"),
        (mlp(), lambda net, batch: net[2](net[1](net[0](batch[0]))).mean(), ((4, 6), (4,)), "changed nothing"),
        (mlp(), lambda net, batch: net.forward(batch[0]).mean(), ((4, 6), (4,)), "changed nothing"),
    ],
)
@pytest.mark.parametrize("measure", [sharpness.worst_case, sharpness.average_case])
def test_logits_that_cannot_be_normalised_are_refused(measure, model, loss, shapes, text):
    data = [tuple(torch.rand(shape) for shape in shapes)]
    with pytest.raises(ValueError, match=text):
        measure(model, loss, data, normalize_logits=True)
    assert not model._forward_hooks


@dataclass
class Graphs:
    nodes: torch.Tensor
    target: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((np.zeros((7, 2)), np.zeros(7)), 7),
        ((["a", "b"], ["c", "d"]), 2),
        ({"text": ["a", "b", "c"]}, 3),
        ({"text": ["a", "b", "c"], "labels": [0, 1, 2]}, 3),
        (([torch.zeros(3, 8, 8)] * 2, [{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(1, 4)}]), 2),
        (([torch.zeros(3, 8, 8)] * 2, [torch.zeros(5, 4), torch.zeros(1, 4)]), 2),
        ([{"image": torch.zeros(3, 8, 8)}] * 4, 4),
        (Graphs(torch.zeros(9, 2), torch.zeros(9)), 9),
        ((torch.zeros(6, 2), (torch.zeros(6), torch.zeros(6, 4))), 6),
        ([{"x": torch.zeros(6, 2)}, {"y": torch.zeros(6)}], 6),
    ],
)
def test_the_number_of_examples(batch, size):
    assert batch_size(batch) == size


@pytest.mark.parametrize("other", [["a"] * 8, np.zeros(8), {"text": ["a"] * 8}, Graphs(torch.zeros(8), torch.zeros(8))])
def test_what_cannot_be_cut_into_pieces_is_refused(other):
    with pytest.raises(TypeError, match="m=2 asks for pieces.*cannot be cut"):
        read_batches([(other, torch.zeros(8))], 2)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ((8, 3), (8,)),
        ((3,), ()),
        ((4, 3, 5, 5), (4, 5, 5)),
        ((4, 5, 3), (4, 5)),
    ],
)
def test_accuracy_is_the_share_of_largest_logits_on_their_class(logits, labels):
    outputs, classes = torch.randn(logits), torch.randint(3, labels)
    found = sharpness.accuracy(nn.Identity(), (outputs, classes))
    axis = 1 if len(logits) == 4 else -1
    hits = [
        float(row.argmax()) == float(label)
        for row, label in zip(outputs.movedim(axis, -1).reshape(-1, 3), classes.reshape(-1), strict=True)
    ]
    assert float(found) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.randn(8, 1), torch.randint(2, (8,)), "the largest of two logits or more, got logits of shape .8, 1."),
        (torch.randn(8), torch.randint(2, (8,)), "for one output an example write accuracy_fn"),
        (torch.randn(8, 3), torch.randint(3, (8, 1)), "a whole number for each prediction, .* labels of shape .8, 1."),
        (torch.randn(8, 8), torch.rand(8, 8), "a whole number for each prediction.*torch.float32"),
        (torch.randn(8, 8), torch.eye(8, dtype=torch.long), "a whole number for each prediction"),
        (torch.randn(8, 3), torch.rand(8), "dtype torch.float32; write accuracy_fn"),
    ],
)
def test_accuracy_refuses_labels_that_are_no_classes_of_the_logits(logits, labels, message):
    """Broadcasting, or the one logit that is always the largest, gave a number."""
    with pytest.raises(ValueError, match=message):
        sharpness.accuracy(nn.Identity(), (logits, labels))
